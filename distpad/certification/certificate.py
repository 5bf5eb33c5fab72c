"""certify: proof, on the engine in hand, that a step on all replicas is the step of one device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors, gradients, losses
from distpad.certification import comparison, deviation

_ROWS, _LENGTH, _FEATURES, _CLASSES = 3, 6, 5, 4  # of one replica's batch, and of the built-in model
_DTYPES = ("float64", "float32")
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

    Attributes:
      engine, num_replicas, num_workers: where it was made.
      lines: what was compared.
      padded: for a model: how far its own gradients change where the same rows are padded further; nothing that
        ``passed`` asks for. None where it cannot be told.
      notes: of layers whose training on many devices is not that of one, and of what was done about them.
      diagnosis: what explains the first line that did not pass.

    >>> Certificate("local", 1, 1, (Line("random lengths", "float64", 3, 2e-16, 1e-12),)).passed
    True
    """

    engine: str
    num_replicas: int
    num_workers: int
    lines: tuple[Line, ...]
    padded: Line | None = None
    notes: tuple[str, ...] = ()
    diagnosis: str = ""

    @property
    def max_relative_error(self) -> float:
        """The largest max|g - g*| / max|g*| of any variable in any case.

        A variable whose gradient cancels out, such as the bias of attention's keys, has nothing but rounding for g*: in
        a model, max|g*| is taken for a hundredth of that of all variables, at least.
        """
        return max((line.error for line in self.lines), key=lambda error: np.inf if np.isnan(error) else error)

    @property
    def passed(self) -> bool:
        return all(line.passed for line in self.lines)

    def _size(self) -> str:
        finite = [line.error for line in self.lines if np.isfinite(line.error)]
        off = f"off by {max(finite, default=0):.1%} of their size"
        return off if len(finite) == len(self.lines) else f"{off}, and NaN or infinite in some cases"

    def __str__(self) -> str:
        head = f"distpad certificate: {self.engine}, {self.num_replicas} replicas on {self.num_workers} workers"
        form = "{:<18} {:<8} {:>5}  {:>9}  {:>7}  {}"
        table = [form.format("gradients of", "dtype", "cases", "error", "limit", "passed")]
        for line in (*self.lines, *([self.padded] if self.padded else [])):
            judged = line is not self.padded
            limit, mark = (f"{line.limit:.0e}", "yes" if line.passed else "no") if judged else ("-", "not judged")
            table.append(form.format(line.kind, line.dtype, line.cases, f"{line.error:.1e}", limit, mark))
        notes = [f"note: {note}" for note in self.notes]
        verdict = "passed" if self.passed else f"NOT PASSED: gradients are {self._size()}"
        diagnosis = [f"diagnosis: {self.diagnosis}"] if self.diagnosis else []
        return "\n".join([head, *table, *notes, *diagnosis, verdict])


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

    With a ``model``, a ``loss`` and a ``batch``, its rows are dealt to the replicas: unevenly, under random lengths,
    masks and weights, with an empty replica, as padding alone, and as two accumulated micro-batches over one
    denominator. The one device runs the same model beside the engine, under a plain average of its own. A loss that is
    no ``DistributedLoss`` is taken at its word: what it gives on one device for all rows, it must give on many.

    With a ``step`` and a ``batch``, the step is run on the replicas, and beside the engine on one device; or, given
    ``model`` and ``loss`` too, it is held against those. Penalties and clipping must be left out of it then. With the
    ``model`` alone, layers and variables are named.

    Without model and step, a linear model under a masked softmax cross-entropy is run: random lengths, masks and
    sample weights, NaN in padded predictions, an empty replica, a step of padding alone, and two accumulated
    micro-batches over one denominator, in float64 and float32. The one device is NumPy in float64, by position.

    Args:
      model: a Keras model (functional, sequential or subclassed), made in the engine's scope. With several workers all
        get the variables of worker 0. Layers that are random, or that make rows depend on each other, are named in the
        notes, and the model is then compared with ``training=False``.
      loss: a ``DistributedLoss``; or any callable
        ``(y_true, y_pred, sample_weight=None, *, lengths=None, mask=None) -> this replica's share``, which is given
        what it takes of what the batch has. Without a model it is certified in place of ``DistributedLoss``; only
        "token" is then asked of it.
      step: ``step(batch) -> reduced gradients``, a list or a nest; called inside each replica, in a graph.
      batch: rows for all replicas together, at least one, the same on all workers: a mapping or a NamedTuple of arrays
        with the rows along axis 0, or a tuple as for Keras's ``fit``. A model takes "x", a loss "y" (both may be nests)
        and those of "lengths" ``[rows]``, "mask" and "sample_weight" that are there. A step gets its batch in the form
        that was given, and may give its arrays any names. Each case draws about three rows a replica.
      cases: how many random steps at least; as many of each kind and dtype.
      seed: of the random steps; the same on all workers.
      backend: left out, it is detected; with a strategy, call it in its scope, outside ``run``.

    Returns: the ``Certificate``, the same on all workers.

    Raises:
      ValueError: ``cases`` below 1, ``seed`` below 0; a batch that differs between workers, has no rows, or not the
        same number of them in all arrays; a loss that is no scalar, or that ``DistributedLoss`` refuses.
      TypeError: one of them is of the wrong kind.

    Collective: all workers call it.

    >>> certify(cases=12).passed
    True
    >>> model = tf.keras.Sequential([tf.keras.Input([None, 2]), tf.keras.layers.Dense(3)])
    >>> loss = losses.DistributedLoss(tf.keras.losses.MeanSquaredError(reduction="none"))
    >>> batch = {"x": np.ones([4, 5, 2], "float32"), "y": np.ones([4, 5, 3], "float32"), "lengths": [5, 2, 0, 3]}
    >>> certify(model, loss, batch=batch, cases=7).passed
    True
    """
    errors.integer("certify", "cases", cases, least=1)
    errors.integer("certify", "seed", seed, least=0)
    resolved = backends.resolve(backend, function="certify")
    if model is not None or step is not None or batch is not None:
        _check_own(model, loss, step, batch)
        result = comparison.compare(model, loss, step, batch, cases, seed, resolved)
        lines = [Line(*line) for line in result.lines]
        padded = Line(*result.padded) if result.padded else None
        return _certificate(resolved, lines, padded, tuple(result.notes), result.diagnosis)
    lines, diagnosis = [], ""
    for kind, dtype in itertools.product(_KINDS, _DTYPES):
        if loss is not None and kind == "accumulation":
            continue  # a denominator is something that only DistributedLoss takes
        repeats = -(-cases // (len(_KINDS) * len(_DTYPES)))
        steps = [_compared(resolved, loss, kind, dtype, [seed, number], number) for number in range(repeats)]
        mine = [max(deviation.off_by([one], [step.expected])[0] for one in step.found) for step in steps]
        each = resolved.host_max(np.array(mine))  # of the worst worker
        lines.append(Line(kind, dtype, repeats, float(each.max()), deviation.LIMITS[dtype]))
        if not lines[-1].passed and not diagnosis:
            worst = steps[int(each.argmax())]
            found = [[one] for one in worst.found]
            text = deviation.diagnosis(resolved, found, [worst.expected], [worst.of_own], ["the kernel"], value=0.0)
            diagnosis = f"{kind}: {text}"
    return _certificate(resolved, lines, None, (), diagnosis)


def _certificate(backend: backends.Backend, lines: list[Line], *more: Any) -> Certificate:
    return Certificate(backend.name, backend.num_replicas, backend.num_workers, tuple(lines), *more)


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
            raise TypeError(errors.sentence("certify", name, repr(given), "a callable"))
    if model is not None and not hasattr(model, "trainable_variables"):
        raise TypeError(errors.sentence("certify", "model", type(model).__name__, "a Keras model"))


class _Compared(NamedTuple):
    """The gradient on each replica of this worker, that of one device, and the mean of one for each replica's rows."""

    found: list[np.ndarray]
    expected: np.ndarray
    of_own: np.ndarray


def _compared(backend: backends.Backend, loss: Any, kind: str, dtype: str, seed: list[int], number: int) -> _Compared:
    """One random step."""
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
    of_own = np.mean([_reference(batches, kernel, average, kind) for batches in drawn], axis=0)
    results = backend.run(step, lambda r: [_cast(batch, dtype) for batch in drawn[r]])
    return _Compared([result.numpy() for result in results], expected, of_own)


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
