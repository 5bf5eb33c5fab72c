"""certify: proof, on the engine in hand, that a step on all replicas is the step of one device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors, gradients, losses

_ROWS, _LENGTH, _FEATURES, _CLASSES = 3, 6, 5, 4  # of one replica's batch, and of the built-in model
_LIMITS = {"float64": 1e-12, "float32": 1e-5}
_AVERAGES = ("token", "sequence_sum", "sequence_mean", 7.5)
_KINDS = (
    "random lengths",
    "random masks",
    "sample weights",
    "NaN in padding",
    "an empty replica",
    "all padding",
    "accumulation",
)


class Line(NamedTuple):
    """One line of a certificate: what was compared, how often, the largest relative error, and what it may be."""

    kind: str
    dtype: str
    cases: int
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN does not pass


class Certificate(NamedTuple):
    """The result of ``certify``; ``str()`` prints it as a table.

    >>> Certificate("local", 1, 1, (Line("random lengths", "float64", 3, 2e-16, 1e-12),)).passed
    True
    """

    engine: str
    num_replicas: int
    num_workers: int
    lines: tuple[Line, ...]

    @property
    def max_relative_error(self) -> float:
        """The largest max|g - g*| / max|g*| of any variable in any case."""
        return max((line.error for line in self.lines), key=lambda error: np.inf if np.isnan(error) else error)

    @property
    def passed(self) -> bool:
        return all(line.passed for line in self.lines)

    def __str__(self) -> str:
        head = f"distpad certificate: {self.engine}, {self.num_replicas} replicas on {self.num_workers} workers"
        form = "{:<18} {:<8} {:>5}  {:>9}  {:>7}  {}"
        table = [form.format("gradients of", "dtype", "cases", "error", "limit", "passed")]
        for line in self.lines:
            marks = ("no", "yes")
            figures = (f"{line.error:.1e}", f"{line.limit:.0e}", marks[line.passed])
            table.append(form.format(line.kind, line.dtype, line.cases, *figures))
        verdict = (
            "passed" if self.passed else f"NOT PASSED: gradients are off by {self.max_relative_error:.1%} of their size"
        )
        return "\n".join([head, *table, verdict])


def certify(*, loss: Any = None, cases: int = 32, seed: int = 0, backend: Any = None) -> Certificate:
    """Compare the reduced gradients of random steps with those of one device on the concatenated batch.

    A linear model under a masked softmax cross-entropy is run on all replicas: random lengths, masks and sample
    weights, NaN in padded predictions, an empty replica, a step of padding alone, and two accumulated micro-batches
    over one denominator, in float64 and float32. The one device is NumPy in float64, written out by position.

    Args:
      loss: what to certify in place of ``DistributedLoss``: a callable
        ``(y_true, y_pred, sample_weight=None, *, lengths, mask) -> this replica's share``; ``mask`` may be None. Only
        "token" is then asked of it.
      cases: how many random steps at least; as many of each kind and dtype.
      seed: of the random steps; the same on all workers.
      backend: left out, it is detected; with a strategy, call it in its scope, outside ``run``.

    Returns: the ``Certificate``, the same on all workers.

    Raises:
      ValueError: ``cases`` below 1, ``seed`` below 0. TypeError: one of them is no whole number.

    Collective: all workers call it.

    >>> certify(cases=12, backend="local").passed
    True
    """
    errors.whole_number("certify", "cases", cases, least=1)
    errors.whole_number("certify", "seed", seed, least=0)
    resolved = backends.resolve(backend, function="certify")
    lines = []
    for kind, dtype in itertools.product(_KINDS, _LIMITS):
        if loss is not None and kind == "accumulation":
            continue  # a denominator is something that only DistributedLoss takes
        repeats = -(-cases // (len(_KINDS) * len(_LIMITS)))
        found = [_error(resolved, loss, kind, dtype, [seed, number], number) for number in range(repeats)]
        error = resolved.host_max(np.array([np.nan_to_num(found, nan=np.inf).max()]))[0]  # of the worst worker
        lines.append(Line(kind, dtype, repeats, float(error), _LIMITS[dtype]))
    return Certificate(resolved.name, resolved.num_replicas, resolved.num_workers, tuple(lines))


def _error(backend: backends.Backend, loss: Any, kind: str, dtype: str, seed: list[int], number: int) -> float:
    """The largest relative error of this worker's replicas in one random step."""
    turn = number + _KINDS.index(kind)  # so that few cases ask for all averages, too
    average = _AVERAGES[turn % 4 if loss is None and kind != "accumulation" else 0]
    micro = 2 if kind == "accumulation" else 1
    drawn = [
        [_draw(kind, r, backend.num_replicas, [*seed, m]) for m in range(micro)] for r in range(backend.num_replicas)
    ]
    every = [batch for batches in drawn for batch in batches]
    kernel = np.random.default_rng(seed).normal(size=[_FEATURES, _CLASSES])
    tokens = float(sum(batch["lengths"].sum() for batch in every)) if micro > 1 else None
    loss_fn = loss or losses.DistributedLoss(_cross_entropy, average=average, backend=backend)
    step = _step(backend, loss_fn, kernel.astype(dtype), kind, tokens)
    expected = _reference(every, kernel, average, kind)
    scale = np.abs(expected).max() or 1.0
    results = backend.run(step, lambda r: [_cast(batch, dtype) for batch in drawn[r]])
    return max(float(np.max(np.abs(result.numpy() - expected)) / scale) for result in results)


def _draw(kind: str, replica: int, replicas: int, seed: list[int]) -> dict[str, np.ndarray]:
    """A replica's batch; every replica can draw any other's."""
    random = np.random.default_rng([*seed, replica])
    rows = 0 if kind == "an empty replica" and replica == replicas - 1 else _ROWS
    return {
        "x": random.normal(size=[rows, _LENGTH, _FEATURES]),
        "y": random.integers(0, _CLASSES, size=[rows, _LENGTH]),
        "weight": random.uniform(0, 2, size=[rows, _LENGTH]),
        "mask": random.random(size=[rows, _LENGTH]) < 0.6,
        "lengths": random.integers(0, 1 if kind == "all padding" else _LENGTH + 1, size=[rows]),
    }


def _cast(batch: dict[str, np.ndarray], dtype: str) -> dict[str, tf.Tensor]:
    dtypes = {"float64": dtype, "int64": "int32", "bool": "bool"}
    return {name: tf.constant(array, dtypes[array.dtype.name]) for name, array in batch.items()}


def _cross_entropy(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y_true, y_pred)


def _step(backend: backends.Backend, loss_fn: Any, kernel: np.ndarray, kind: str, tokens: float | None) -> Callable:
    """What each replica runs: its micro-batches' gradients, summed, and reduced as the engine does."""

    def step(batches: list[dict[str, tf.Tensor]]) -> tf.Tensor:
        weights = tf.constant(kernel)
        parts = []
        for batch in batches:
            with tf.GradientTape() as tape:
                tape.watch(weights)
                logits = batch["x"] @ weights
                if kind == "NaN in padding":
                    real = tf.sequence_mask(batch["lengths"], _LENGTH)[..., tf.newaxis]
                    logits = tf.where(real, logits, tf.cast(np.nan, logits.dtype))
                extra = {} if tokens is None else {"denominator": tokens}
                weight = batch["weight"] if kind == "sample weights" else None
                mask = batch["mask"] if kind == "random masks" else None
                loss = loss_fn(batch["y"], logits, weight, lengths=batch["lengths"], mask=mask, **extra)
            parts += gradients.gradient(tape, loss, [weights], backend=backend)
        return backend.reduce_in_optimizer([tf.add_n(parts)])[0]

    return step


def _reference(batches: list[dict[str, np.ndarray]], kernel: np.ndarray, average: Any, kind: str) -> np.ndarray:
    """The gradient by the kernel on one device: NumPy, position by position, nothing shared with the product."""
    total, tokens, sequences = np.zeros_like(kernel), 0.0, 0
    names = ("x", "y", "weight", "mask", "lengths")
    for x, y, weight, mask, length in (row for batch in batches for row in zip(*(batch[name] for name in names))):
        w = {"sample weights": weight, "random masks": mask.astype(float)}.get(kind, np.ones(_LENGTH))[:length]
        if w.sum() == 0:
            continue
        tokens, sequences = tokens + w.sum(), sequences + 1
        odds = np.exp(x[:length] @ kernel)
        error = odds / odds.sum(-1, keepdims=True) - np.eye(_CLASSES)[y[:length]]
        own = x[:length].T @ (error * w[:, None])
        total += own / w.sum() if average == "sequence_mean" else own
    count = average if not isinstance(average, str) else tokens if average == "token" else sequences
    return total / count if count else total
