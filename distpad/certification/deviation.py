"""The error of gradients against those of one device, and the mistake that explains the error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from distpad import backends

# The largest difference between two exact computations. Half precision rounds inside the model.
LIMITS = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}
# Gradients that cancel out (of the bias of attention's keys) are rounding alone. The error of each variable is relative
# to this part of the largest gradient of all variables, at least.
_LEAST = 1e-2
_EXPLAINED = 1e-3  # the error that an explanation may leave, or a tenth of the error that it explains

Gradients = Sequence[np.ndarray]


class Line(NamedTuple):
    """One line of a certificate: the kind of case, the dtype, the number of cases, the largest relative error, and its
    limit."""

    kind: str
    dtype: str
    cases: int
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN does not pass


def off_by(found: Gradients, expected: Gradients) -> np.ndarray:
    """max|g - g*| / max|g*| of each variable; infinity where a gradient is NaN."""
    sizes = [float(np.max(np.abs(gradient), initial=0)) for gradient in expected]
    least = _LEAST * max(sizes, default=0)
    errors = [
        float(np.max(np.abs(np.asarray(f, np.float64) - e), initial=0)) / (max(size, least) or 1.0)
        for f, e, size in zip(found, expected, sizes)
    ]
    return np.nan_to_num(np.array(errors), nan=np.inf)


def diagnosis(
    backend: backends.Backend,
    found: Sequence[Gradients],
    expected: Gradients,
    of_own: Gradients,
    names: Sequence[str],
    value: float,
) -> str:
    """What is wrong with the gradients, the same text on all workers. Collective among workers.

    Args:
      found: the gradients on each replica of this worker.
      expected: the gradients of one device for all rows.
      of_own: the mean of one device's gradients for the rows of each replica.
      names: of the variables.
      value: of the loss on one device.
    """
    errors = backend.host_max(np.max([off_by(gradients, expected) for gradients in found], axis=0))
    on_one = not _all_finite([*expected, np.asarray(value)])
    on_many = not all(map(_all_finite, found))
    flags = np.array([on_one, on_many, _differ_between_workers(backend, expected)], np.float64)
    one_is_nan, many_are_nan, differ = backend.host_max(flags)
    hypotheses = _hypotheses(backend, found, expected, of_own)
    left = backend.host_max(np.array([hypothesis.error() for hypothesis in hypotheses]))
    worst = int(np.argmax(errors))
    if one_is_nan:
        return "the loss or the gradients of one device are NaN or infinite themselves, at valid positions"
    if many_are_nan:
        return f"gradients are NaN or infinite on several replicas, and not on one device; first in {names[worst]}"
    if differ:
        return "workers have different variables. Call distpad.broadcast_variables before the first step"
    for hypothesis, error in zip(hypotheses, left):
        if error <= min(_EXPLAINED, errors[worst] / 10):
            return hypothesis.text
    right = int(np.sum(errors <= errors[worst] / 1000))
    others = (
        f"; {right} of {len(names)} variables are right, or off by far less" if right else ", and so are all others"
    )
    return f"gradients of {names[worst]} are off by {errors[worst]:.2g} of their size{others if len(names) > 1 else ''}"


class _Hypothesis(NamedTuple):
    """A text that holds where all gradients in ``found`` are ``factor`` times those in ``base``."""

    text: str
    found: Sequence[Gradients]
    base: Gradients
    factor: float

    def error(self) -> float:
        expected = [self.factor * gradient for gradient in self.base]
        return max(float(off_by(gradients, expected).max()) for gradients in self.found)


def _hypotheses(
    backend: backends.Backend, found: Sequence[Gradients], expected: Gradients, of_own: Gradients
) -> list[_Hypothesis]:
    """The known mistakes, the likeliest first. Collective among workers."""
    replicas, number = backend.num_replicas, "the number of replicas"
    own_mean = "each replica's own mean: each divides by its own count"
    total = [backend.host_sum(np.asarray(np.sum(column, axis=0, dtype=np.float64))) for column in zip(*found)]
    reduced = [gradient / (replicas if backend.gradient_reduction == "mean" else 1) for gradient in total]
    factor = float(backend.host_max(np.array([_factor(found[0], expected)]))[0])
    factor_text = f"gradients are {factor:.6g} times those of one device, in all variables"
    any_factor = _Hypothesis(factor_text, found, expected, factor)
    if replicas == 1:
        return [any_factor]
    return [
        _Hypothesis(f"gradients are {replicas} times too large: a factor of {number}", found, expected, replicas),
        _Hypothesis(f"gradients are {replicas} times too small: a factor of {number}", found, expected, 1 / replicas),
        _Hypothesis(f"gradients are the mean of {own_mean}", found, of_own, 1),
        _Hypothesis(f"gradients are {replicas} times the mean of {own_mean}", found, of_own, replicas),
        _Hypothesis(f"gradients are 1/{replicas} of the mean of {own_mean}", found, of_own, 1 / replicas),
        _Hypothesis("gradients differ between replicas: they were not reduced", [reduced], expected, 1),
        any_factor,
    ]


def _all_finite(gradients: Gradients) -> bool:
    return all(np.isfinite(gradient).all() for gradient in gradients)


def _factor(found: Gradients, expected: Gradients) -> float:
    """The factor c with the least squared difference between ``found`` and c times ``expected``."""
    product, square = (
        sum(float(np.sum(np.asarray(f, np.float64) * g)) for f, g in zip(one, expected)) for one in (found, expected)
    )
    return product / square if square else 0.0


def _differ_between_workers(backend: backends.Backend, expected: Gradients) -> bool:
    """Whether workers have different gradients of one device. Collective among workers."""
    flat = np.concatenate([np.ravel(gradient).astype(np.float64) for gradient in expected])
    widths = backend.host_max(flat) + backend.host_max(-flat)
    return bool(np.max(widths, initial=0) > _EXPLAINED * np.max(np.abs(flat), initial=0))
