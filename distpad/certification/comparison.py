"""The comparison of gradients on all replicas with those of one device, case by case."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from distpad import backends
from distpad.certification import deviation, rows, steps


class Case(NamedTuple):
    """One dealt batch and both sides of its comparison.

    Attributes:
      parts: the micro-batches of each replica.
      found: the gradients on each replica of this worker.
      device: the result of one device for all rows.
    """

    parts: list[list[rows.Fields]]
    found: list[deviation.Gradients]
    device: steps.Device

    @property
    def error(self) -> float:
        """The largest error of any variable on any replica of this worker; infinity where the loss is not finite."""
        if not np.isfinite(self.device.value):
            return np.inf
        return max(float(deviation.off_by(found, self.device.gradients).max()) for found in self.found)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A step on all replicas and the same step on one device.

    Attributes:
      draw: ``(kind, number of rows, seed) -> rows``.
      on_replicas: the step on all replicas.
      on_one_device: the step on one device.
      backend: the engine.
      names: of the variables; empty where they are unknown.
      takes_no_rows: whether a replica may have no rows.
      takes_denominator: whether accumulated micro-batches share a denominator.
    """

    draw: Callable[[rows.Kind, int, Sequence[int]], rows.Fields]
    on_replicas: steps.Replicas
    on_one_device: steps.OneDevice
    backend: backends.Backend
    names: Sequence[str] = ()
    takes_no_rows: bool = True
    takes_denominator: bool = False

    def case(self, kind: rows.Kind, seed: int, number: int) -> Case:
        """Draw the rows of a case, deal the rows to the replicas, and compute both sides. Collective."""
        replicas, micro = self.backend.num_replicas, 2 if kind is rows.Kind.ACCUMULATION else 1
        sizes = rows.sizes_of_parts(replicas * micro, replicas, [seed])  # the same in all cases, to reuse traces
        if kind is rows.Kind.EMPTY_REPLICA:
            sizes[-1] = 0 if self.takes_no_rows else 1
        drawn = self.draw(kind, sum(sizes), [seed, number, kind.number])
        dealt = rows.split(drawn, sizes)
        parts = [dealt[r * micro : (r + 1) * micro] for r in range(replicas)]
        if micro > 1 and self.takes_denominator:
            device = self.on_one_device(drawn)
            return Case(parts, self.on_replicas(lambda r: (parts[r], [np.float64(device.divisor)])), device)
        found = self.on_replicas(lambda r: (parts[r], []))  # first, since its errors are clearer
        return Case(parts, found, self.on_one_device(drawn))

    def diagnosis(self, case: Case) -> str:
        """The mistake that explains the error of a case. Collective among workers."""
        joined = [rows.joined(micro_batches) for micro_batches in case.parts]
        own = [self.on_one_device(batch).gradients for batch in joined if rows.number_of(batch)]
        of_own = [sum(column) / self.backend.num_replicas for column in zip(*own)]
        expected = case.device.gradients
        names = self.names or [f"gradient {i}, of shape {gradient.shape}" for i, gradient in enumerate(expected)]
        return deviation.diagnosis(self.backend, case.found, expected, of_own, names, case.device.value)


class Subject(NamedTuple):
    """The built-in model, or the user's model or step.

    Attributes:
      kinds: the kinds of case, in the order of their lines.
      comparisons: for each dtype, one or more comparisons, which take turns case by case.
      padded: for a model: the effect of more padding on the gradients of one device; None where it is unknown.
      notes: on the model and the batch.
    """

    kinds: list[rows.Kind]
    comparisons: list[list[Comparison]]
    padded: deviation.Line | None = None
    notes: tuple[str, ...] = ()


class Result(NamedTuple):
    """The result of ``compare``.

    Attributes:
      lines: one for each kind and dtype.
      diagnosis: the mistake that explains the first line that did not pass.
      is_zero: whether all gradients of the first line are 0.
    """

    lines: list[deviation.Line]
    diagnosis: str
    is_zero: bool


def compare(subject: Subject, cases: int, seed: int) -> Result:
    """Run at least ``cases`` cases, equally many of each kind and dtype. Collective."""
    repeats = -(-cases // (len(subject.kinds) * len(subject.comparisons)))
    lines, diagnosis, is_zero = [], "", False
    for turn, kind in enumerate(subject.kinds):
        for comparisons in subject.comparisons:
            comparison, case, error = _worst(comparisons, kind, turn, repeats, seed)
            dtype = case.device.dtype
            lines.append(deviation.Line(kind.text, dtype, repeats, error, deviation.LIMITS[dtype]))
            if not lines[-1].passed and not diagnosis:
                diagnosis = f"{kind.text}: {comparison.diagnosis(case)}"
            if len(lines) == 1:
                is_zero = not any(map(np.any, case.device.gradients))
    return Result(lines, diagnosis, is_zero)


def _worst(
    comparisons: Sequence[Comparison], kind: rows.Kind, turn: int, repeats: int, seed: int
) -> tuple[Comparison, Case, float]:
    """The case with the largest error on any worker, and its comparison. One case is kept: models may be large."""
    worst: tuple[Comparison, Case, float] | None = None
    for number in range(repeats):
        comparison = comparisons[(turn + number) % len(comparisons)]
        case = comparison.case(kind, seed, number)
        error = float(comparison.backend.host_max(np.array([case.error]))[0])
        if worst is None or error > worst[2]:
            worst = comparison, case, error
    assert worst is not None
    return worst
