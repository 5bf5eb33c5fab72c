"""Compare what a user trains with to one device: all the ways of dealing a batch, and what is to be said of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from distpad import backends, errors, gradients, losses
from distpad.certification import batch as batches
from distpad.certification import deviation, layers, rows, steps


class Compared(NamedTuple):
    """One kind of case: how many there were, and the largest relative error, the same on all workers."""

    kind: str
    dtype: str
    cases: int
    error: float
    limit: float


class Result(NamedTuple):
    """All of it. ``padded`` is informational: what more padding makes of the model; None where it cannot be told."""

    lines: list[Compared]
    padded: Compared | None
    notes: list[str]
    diagnosis: str


class _Case(NamedTuple):
    """A dealt batch: each replica's micro-batches, what its step gave on each replica here, and one device."""

    parts: list[list[rows.Fields]]
    found: list[steps.Gradients]
    device: steps.Device

    @property
    def error(self) -> float:
        """The largest of any variable on any replica here; a loss that is no number is off, whatever its gradient."""
        if not np.isfinite(self.device.value):
            return np.inf
        return max(float(deviation.off_by(found, self.device.gradients).max()) for found in self.found)


class Comparison:
    """What is compared, how: the user's step on the replicas, and one device's.

    Args:
      model: or None, where ``step`` alone knows it.
      loss: or None, where ``step`` is held against itself on one device.
      step: or None, where ``model`` and ``loss`` make the step.
      given: the batch.
      training: how the model is called.
    """

    def __init__(
        self, model: Any, loss: Any, step: Any, given: batches.Given, training: bool, backend: backends.Backend
    ) -> None:
        self.model, self.loss, self.backend = model, loss, backend
        self.fields, self.counted, self.is_step = given.fields, given.counted, step is not None
        if loss is None:
            self.alone = steps.own_on_one_device(step, given.form, model)
        else:
            self.alone = steps.on_one_device(model, loss, training)
        if step is None:
            self.together = steps.on_replicas(model, loss, training, backend)
        else:
            self.together = steps.own_on_replicas(step, given.form, model, backend)
        self.takes_none = self._takes_no_rows()

    def _takes_no_rows(self) -> bool:
        """Whether a replica may have no rows at all: some layers of Keras fail on them."""
        try:
            self.alone(self.counted(rows.first(self.fields, 0)))
        except Exception:
            return False
        return True

    def kinds(self) -> list[str]:
        found = rows.kinds(self.fields, self.loss, is_step=self.is_step)
        return found if self.takes_none or "all padding" in found else [k for k in found if k != "an empty replica"]

    def worst(self, kind: str, repeats: int, seed: int) -> tuple[_Case, float]:
        """The case of this kind whose gradients are furthest off on any worker."""
        worst: tuple[_Case, float] | None = None
        for number in range(repeats):
            case = self._case(kind, [seed, number])
            error = float(self.backend.host_max(np.array([case.error]))[0])
            if worst is None or error > worst[1]:
                worst = case, error  # of a large model there is room for one
        assert worst is not None
        return worst

    def _case(self, kind: str, seed: list[int]) -> _Case:
        replicas, micro = self.backend.num_replicas, 2 if kind == "accumulation" else 1
        sizes = rows.sizes_of_parts(replicas * micro, replicas, seed[:1])
        empty = kind == "an empty replica"
        if empty and self.takes_none:
            sizes[-1] = 0
        drawn = rows.draw(self.fields, self.loss, kind, sum(sizes), [*seed, len(kind)], is_step=self.is_step)
        if empty and not self.takes_none:
            dealt = rows.split(drawn, sizes)
            drawn, sizes[-1] = rows.joined([*dealt[:-1], rows.filling(dealt[-1])]), 1
        drawn = self.counted(drawn)
        dealt = rows.split(drawn, sizes)
        parts = [dealt[r * micro : (r + 1) * micro] for r in range(replicas)]
        if micro > 1 and not isinstance(self.loss.average, float):
            device = self.alone(drawn)
            return _Case(parts, self.together(lambda r: (parts[r], [np.float64(device.divisor)])), device)
        found = self.together(lambda r: (parts[r], []))  # first, since the loss itself says best what it refuses
        return _Case(parts, found, self.alone(drawn))

    def explained(self, case: _Case) -> str:
        """What is wrong in a case whose gradients are off."""
        joined = [rows.joined(micro_batches) for micro_batches in case.parts]
        own = [self.alone(self.counted(batch)).gradients for batch in joined if rows.number_of(batch)]
        of_own = [sum(column) / self.backend.num_replicas for column in zip(*own)]
        names = [f"gradient {i}, of shape {gradient.shape}" for i, gradient in enumerate(case.device.gradients)]
        if self.model is not None:
            names = [getattr(variable, "path", variable.name) for variable in self.model.trainable_variables]
        return deviation.diagnosis(self.backend, case.found, case.device.gradients, of_own, names, case.device.value)

    def padded(self) -> Compared | None:
        """How far one device's own gradients change where the same rows are padded further."""
        further = rows.padded_further(self.fields, self.loss)
        if further is None:
            return None
        try:
            device, other = (self.alone(self.counted(rows.first(fields))) for fields in (self.fields, further))
        except Exception:
            return None  # the model takes no other length
        error = float(deviation.off_by(other.gradients, device.gradients).max())
        return Compared("padded further", device.dtype, 1, error, deviation.LIMITS[device.dtype])


def compare(model: Any, loss: Any, step: Any, batch: Any, cases: int, seed: int, backend: backends.Backend) -> Result:
    """Compare the reduced gradients of dealt batches with those of one device. Collective among workers."""
    given = batches.checked(batch, ("x", "y") if loss is not None else (), backend)
    notes = _prepared(model, given, backend) if model is not None else []
    training = not notes or step is not None
    if not training:
        notes.append("compared with training=False, where these layers do neither")
    notes += _alike(model, backend) if model is not None else []
    comparison = Comparison(model, loss, step, given, training, backend)
    kinds = comparison.kinds()
    if not comparison.takes_none:
        notes.append(
            "no batch of 0 rows can be taken: "
            + (
                "the empty replica has one row that does not count"
                if "an empty replica" in kinds
                else "no replica is empty"
            )
        )
    if backend.num_replicas > 1 and not isinstance(loss, losses.DistributedLoss):
        what = "step" if loss is None else "loss"
        notes.append(f"the {what} is held against itself on one device: a factor that it has there too is not seen")
    lines, diagnosis = [], ""
    for kind in kinds:
        repeats = -(-cases // len(kinds))
        case, error = comparison.worst(kind, repeats, seed)
        line = Compared(kind, case.device.dtype, repeats, error, deviation.LIMITS[case.device.dtype])
        if error > line.limit and not diagnosis:
            diagnosis = f"{kind}: {comparison.explained(case)}"
        lines.append(line)
        if kind == kinds[0] and not any(map(np.any, case.device.gradients)):
            notes.append("all gradients are 0: nothing counts in this batch, and nothing was compared")
    return Result(lines, comparison.padded(), notes, diagnosis)


def _prepared(model: Any, given: batches.Given, backend: backends.Backend) -> list[str]:
    """Build the model where it is not, and look for layers whose training is not that of one device."""
    with backend.scope():
        if "x" in given.fields and not (getattr(model, "built", True) and model.trainable_variables):
            steps.predict(model, rows.first(given.fields)["x"], False)
    if not model.trainable_variables:
        raise ValueError(errors.sentence("certify", "model", "one without trainable variables", "at least one"))
    return layers.notes_on(model)


def _alike(model: Any, backend: backends.Backend) -> list[str]:
    """Give all workers the variables of the first, as before training; a note where they had others."""
    if backend.num_workers == 1:
        return []
    held = np.concatenate([np.ravel(variable.numpy()).astype(np.float64) for variable in model.trainable_variables])
    gradients.broadcast_variables(model.variables, backend=backend)
    after = np.concatenate([np.ravel(variable.numpy()).astype(np.float64) for variable in model.trainable_variables])
    if not backend.host_max(np.array([float(not np.array_equal(held, after))]))[0]:
        return []
    return ["workers had different variables; all have those of worker 0 now, as by distpad.broadcast_variables"]
