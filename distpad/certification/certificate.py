"""certify: compare a step on all replicas with the step of one device, and print the result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors
from distpad.certification import comparison, deviation, linear, own


class Certificate(NamedTuple):
    """The result of ``certify``; ``str()`` prints it as a table.

    Attributes:
      engine, num_replicas, num_workers: where it was made.
      lines: the results, one for each kind of case and dtype, with ``kind``, ``dtype``, ``cases``, ``error``, ``limit``
        and ``passed``.
      padded: for a model: how far the gradients of one device change where the same rows are padded further. ``passed``
        does not depend on it. None where it cannot be measured.
      notes: layers whose training on many devices differs from that on one, and what was done about them.
      diagnosis: the mistake that explains the first line that did not pass.

    >>> line = deviation.Line("random lengths", "float64", cases=3, error=2e-16, limit=1e-12)
    >>> Certificate("local", 1, 1, (line,)).passed
    True
    """

    engine: str
    num_replicas: int
    num_workers: int
    lines: tuple[deviation.Line, ...]
    padded: deviation.Line | None = None
    notes: tuple[str, ...] = ()
    diagnosis: str = ""

    @property
    def max_relative_error(self) -> float:
        """The largest max|g - g*| / max|g*| of any variable in any case.

        Gradients that cancel out, such as those of the bias of attention's keys, are rounding alone. So max|g*| of a
        variable counts as at least a hundredth of the largest of all variables.
        """
        return max((line.error for line in self.lines), key=lambda error: np.inf if np.isnan(error) else error)

    @property
    def passed(self) -> bool:
        return all(line.passed for line in self.lines)

    def __str__(self) -> str:
        head = f"distpad certificate: {self.engine}, {self.num_replicas} replicas on {self.num_workers} workers"
        form = "{:<18} {:<8} {:>5}  {:>9}  {:>7}  {}"
        table = [form.format("gradients of", "dtype", "cases", "error", "limit", "passed")]
        for line in (*self.lines, *([self.padded] if self.padded else [])):
            limit, mark = f"{line.limit:.0e}", "yes" if line.passed else "no"
            if line is self.padded:
                limit, mark = "-", "not judged"
            table.append(form.format(line.kind, line.dtype, line.cases, f"{line.error:.1e}", limit, mark))
        notes = [f"note: {note}" for note in self.notes]
        diagnosis = [f"diagnosis: {self.diagnosis}"] if self.diagnosis else []
        return "\n".join([head, *table, *notes, *diagnosis, self._verdict()])

    def _verdict(self) -> str:
        if self.passed:
            return "passed"
        finite = [line.error for line in self.lines if np.isfinite(line.error)]
        off = f"NOT PASSED: gradients are off by {max(finite, default=0):.1%} of their size"
        return off if len(finite) == len(self.lines) else f"{off}, and NaN or infinite in some cases"


def certify(
    model: Any = None,
    loss: Any = None,
    *,
    step: Any = None,
    batch: Any = None,
    cases: int = 32,
    seed: int = 0,
    backend: Any = None,
) -> Certificate:
    """Compare the reduced gradients of random steps with those of one device on the concatenated batch.

    With a ``model``, a ``loss`` and a ``batch``, the rows of the batch are dealt to the replicas: unevenly, under
    random lengths, masks and weights, with an empty replica, as padding alone, and as two accumulated micro-batches
    with one denominator. One device runs the same model with a plain average in place of ``DistributedLoss``. Any other
    loss is compared with itself: its value on one device, for all rows, is the expected one.

    With a ``step`` and a ``batch``, the step runs on the replicas, and on one device; or, given ``model`` and ``loss``
    too, it is compared with those. Leave penalties and clipping out of the step then. With the ``model`` alone, the
    certificate names layers and variables.

    Without model and step, a linear model under a masked softmax cross-entropy runs: random lengths, masks and sample
    weights, NaN in padded predictions, an empty replica, a step of padding alone, and two accumulated micro-batches
    with one denominator, in float64 and float32. One device is NumPy in float64, position by position.

    Args:
      model: a Keras model (functional, sequential or subclassed), made in the engine's scope. With several workers, all
        get the variables of worker 0. Notes name layers that are random, or that make rows depend on each other; the
        model is then compared with ``training=False``.
      loss: a ``DistributedLoss``; or any callable
        ``(y_true, y_pred, sample_weight=None, *, lengths=None, mask=None) -> this replica's local contribution``. It
        gets the fields of the batch that it has arguments for. Without a model, it replaces the ``DistributedLoss`` of
        the linear model, and must be the average "token".
      step: ``step(batch) -> reduced gradients``, a list or a nest; called inside each replica, in a graph.
      batch: rows for all replicas together, at least one, the same on all workers: a mapping or a NamedTuple of arrays
        with the rows along axis 0, or a tuple as for Keras's ``fit``. A model takes "x", a loss takes "y" (both may be
        nests), and "lengths" ``[rows]``, "mask" and "sample_weight" where the batch has them. A step gets the batch in
        its original form, with any names. Each case draws about three rows a replica.
      cases: the least number of random steps; each kind and dtype gets equally many.
      seed: of the random steps; the same on all workers.
      backend: detected by default. Under a strategy, call ``certify`` in the strategy's scope, outside ``run``.

    Returns: the ``Certificate``, the same on all workers.

    Raises:
      ValueError: ``cases`` is below 1 or ``seed`` below 0; the batch differs between workers, has no rows, or has
        different numbers of rows in its arrays; the loss is no scalar, or ``DistributedLoss`` refuses it.
      TypeError: an argument has the wrong type.

    Collective: all workers call it.

    >>> certify(cases=12).passed
    True
    >>> import distpad, tensorflow as tf
    >>> model = tf.keras.Sequential([tf.keras.Input([None, 2]), tf.keras.layers.Dense(3)])
    >>> loss = distpad.DistributedLoss("mse")
    >>> batch = {"x": np.ones([4, 5, 2], "float32"), "y": np.ones([4, 5, 3], "float32"), "lengths": [5, 2, 0, 3]}
    >>> certify(model, loss, batch=batch, cases=7).passed
    True
    """
    errors.integer("certify", "cases", cases, least=1)
    errors.integer("certify", "seed", seed, least=0)
    engine = backends.resolve(backend, function="certify")
    with _without_tensor_float_32():
        if model is None and step is None and batch is None:
            subject = linear.subject(loss, seed, engine)
        else:
            _check_own(model, loss, step, batch)
            subject = own.subject(model, loss, step, batch, engine)
        result, notes = comparison.compare(subject, cases, seed), subject.notes
    if result.is_zero:
        notes += ("all gradients are 0: nothing counts in this batch, and nothing was compared",)
    where = engine.name, engine.num_replicas, engine.num_workers
    return Certificate(*where, tuple(result.lines), subject.padded, notes, result.diagnosis)


@contextlib.contextmanager
def _without_tensor_float_32() -> Iterator[None]:
    """GPUs since Ampere round the factors of float32 products to 10 bits by default, too few for the limit."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def _check_own(model: Any, loss: Any, step: Any, batch: Any) -> None:
    if model is None and step is None:
        raise ValueError(errors.sentence("certify", "batch", "given alone", "with a model and a loss, or with a step"))
    if batch is None:
        raise ValueError(errors.sentence("certify", "batch", "None", "one, since a model or step is given"))
    if loss is None and step is None:
        raise ValueError(errors.sentence("certify", "loss", "None", "one, or a step, since a model is given"))
    if model is None and loss is not None:
        raise ValueError(errors.sentence("certify", "model", "None", "one, since a loss and a batch are given"))
    for name, given in (("model", model), ("loss", loss), ("step", step)):
        if given is not None and (not callable(given) or isinstance(given, type)):
            raise TypeError(errors.sentence("certify", name, errors.shown(given), "a callable"))
    if model is not None and not hasattr(model, "trainable_variables"):
        raise TypeError(errors.sentence("certify", "model", type(model).__name__, "a Keras model"))
