"""check_finite: names the replica and the examples of a loss or a gradient that is not finite."""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors, precision
from distpad.backends import detection
from distpad.backends.base import Backend

_NAME = "check_finite"
_SHOWN = 16  # example indices in a message
_found: list[tuple[int, str]] = []  # steps and texts, until a window sync takes the first to all workers
_planned: collections.deque[tuple[int, np.ndarray]] = collections.deque(maxlen=2**12)  # steps, and their examples here
_LATEST = 2**44  # a step, as a number
_is_used = False


def check_finite(values: Any, batch: Any, *, name: str = "loss", backend: Any = None) -> None:
    """Let all workers raise if a value of a replica's step is NaN or infinite, naming the replica and its examples.

    Call it in the step, in each replica's code, with what the replica has before anything is reduced: its own losses or
    gradients. The next window sync of ``PaddedBatches`` carries what is found to all workers, and so does one more
    exchange at the end of an epoch; then their loops raise DistpadError. So up to ``lookahead`` steps follow the first
    bad one. The step has no collective of its own, but one number of it is read on the host. ``jit_compile=True`` does
    not compile it.

        losses = ...  # [batch, ...]: then the examples of the bad rows are named
        distpad.check_finite(losses, batch)
        gradients = tape.gradient(loss, variables)
        distpad.check_finite(gradients, batch, name="gradient")  # names all examples of the replica's batch

    Args:
      values: one tensor, whose first axis may be the rows of the batch, or a list of gradients, each a tensor,
        ``tf.IndexedSlices`` or None.
      batch: the replica's ``Batch``.
      name: what the values are, for the message.
      backend: see ``distpad.backends.resolve``.

    Raises:
      TypeError, ValueError: ``values`` are no tensors, ``batch`` is not a batch of PaddedBatches, or ``name`` not a
        string.
      DistpadError: in the loop over the batches, on all workers: a value is not finite.

    >>> from distpad import Pad, PaddedBatches
    >>> batches = PaddedBatches([{"y": [1]}, {"y": [2]}], 1, padding={"y": Pad()}, tokens="y")
    >>> for batch in batches:
    ...     check_finite([1 / batch.indices[0]], batch)
    Traceback (most recent call last):
    distpad.errors.DistpadError: check_finite: loss is not finite on replica 0 (worker 0), for examples [0].
    """
    indices: Any = getattr(batch, "indices", None)
    kind, rule = type(batch).__name__, "a batch of PaddedBatches"
    errors.require(_NAME, indices is not None, "batch", kind, rule, error=TypeError)
    errors.require(_NAME, isinstance(name, str), "name", errors.shown(name), "a string", error=TypeError)
    engine = detection.resolve_step(backend, function=_NAME)
    errors.require(_NAME, not errors.is_deep(values), "values", "nested more than 32 times", "a list of tensors")
    kind, rule = type(values).__name__, "a tensor or a list of tensors"
    errors.require(_NAME, not isinstance(values, Mapping), "values", f"a {kind}", rule, error=TypeError)
    is_single = not isinstance(values, (list, tuple)) and not hasattr(values, "values")
    given = values if isinstance(values, (list, tuple)) else [values]
    parts = [getattr(value, "values", value) for value in given if value is not None]
    tensors = [precision.to_tensor(part, f"{_NAME}: values") for part in parts]
    finite = [_is_finite(tensor) for tensor in tensors if tensor.dtype.is_floating or tensor.dtype.is_complex]
    if not finite:
        return
    rows = tf.ones_like(indices, tf.bool)
    if is_single and finite[0].shape.rank and finite[0].shape[0] == indices.shape[0]:
        rows = ~tf.reduce_all(finite[0], axis=[*range(1, finite[0].shape.rank)])
    note(~tf.reduce_all(tf.stack([*map(tf.reduce_all, finite)])), indices, rows, name, engine)


def _is_finite(tensor: tf.Tensor) -> tf.Tensor:
    if tensor.dtype.is_complex:
        return tf.math.is_finite(tf.math.real(tensor)) & tf.math.is_finite(tf.math.imag(tensor))
    return tf.math.is_finite(tensor)


def note(is_bad: tf.Tensor, indices: tf.Tensor, rows: tf.Tensor, name: str, backend: Backend) -> None:
    """Note the rows of a replica, if ``is_bad``, for the next window sync. In a replica's code."""
    global _is_used
    _is_used = True

    def noted() -> tf.Tensor:
        function = functools.partial(_note, name, backend.worker_index)
        return tf.numpy_function(function, [backend.replica_index(), tf.boolean_mask(indices, rows)], tf.int32)

    tf.cond(is_bad, noted, lambda: tf.constant(0))


def _note(name: str, worker: int, replica: np.ndarray, indices: np.ndarray) -> np.ndarray:
    real = [index for index in indices.tolist() if index >= 0]
    shown = str(real[:_SHOWN]) if len(real) <= _SHOWN else f"{str(real[:_SHOWN])[:-1]}, ...]"
    where = f"replica {replica} (worker {worker})"
    text = f"{_NAME}: {name} is not finite on {where}, for examples {shown if real else 'of filler rows alone'}."
    # a thread of tf.data may plan steps meanwhile; filler rows are bad only after a bad step
    steps = (at for at, planned in reversed([*_planned]) if real[0] in planned) if real else iter([_LATEST])
    _found.append((next(steps, 0), text))
    return np.int32(0)


def is_used() -> bool:
    """Whether this process has called check_finite."""
    return _is_used


def planned(epoch: int, step: int, indices: np.ndarray) -> None:
    """Note the examples of a step of this worker: a bad step makes all replicas bad in the next, by the weights."""
    _planned.append((min(epoch << 24 | step, _LATEST - 1), indices))


def found() -> str | None:
    """What this process found in the earliest step, or None."""
    return min(_found)[1] if _found else None


def urgency(backend: Backend) -> int:
    """A number that is highest on the worker that found something in the earliest step; 0: nothing was found."""
    if not _found:
        return 0
    return (_LATEST - min(_found)[0]) * backend.num_workers + backend.num_workers - backend.worker_index


def worker_of(urgency: float, backend: Backend) -> int:
    """The worker with this urgency."""
    return backend.num_workers - 1 - (int(urgency) - 1) % backend.num_workers


def clear() -> None:
    """All workers know what was found."""
    _found.clear()
