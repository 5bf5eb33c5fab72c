"""How far gradients are from those of one device, and what mistake would explain it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distpad import backends

# What two exact ways of computing the same may differ by. Half precision rounds in the model itself.
LIMITS = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}
# A variable whose gradients cancel out (the bias of attention's keys) has rounding alone for a gradient: it is measured
# by this part of the largest gradient of all variables, at least.
_LEAST = 1e-2
_EXPLAINED = 1e-3  # so close a hypothesis must come, or a tenth of the error that it explains

Gradients = Sequence[np.ndarray]


def off_by(found: Gradients, expected: Gradients) -> np.ndarray:
    """max|g - g*| / max|g*| of each variable; infinity where it is no number."""
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
    """What is wrong with gradients that are off, the same on all workers. Collective among workers.

    Args:
      found: of each replica of this worker.
      expected: of one device with all rows.
      of_own: the mean of what one device gives for each replica's own rows.
      names: of the variables.
      value: of the loss, on one device.
    """
    replicas, number = backend.num_replicas, "the number of replicas"
    own_mean = "each replica's own mean: each divides by its own count"
    total = [backend.host_sum(np.asarray(np.sum(column, axis=0, dtype=np.float64))) for column in zip(*found)]
    joined = [gradient / (replicas if backend.gradient_reduction == "mean" else 1) for gradient in total]
    factor = float(backend.host_max(np.array([_factor(found[0], expected)]))[0])
    hypotheses: list[tuple[str, Sequence[Gradients], Gradients, float]] = []
    if replicas > 1:
        hypotheses = [
            (f"gradients are {replicas} times too large: a factor of {number}", found, expected, replicas),
            (f"gradients are {replicas} times too small: a factor of {number}", found, expected, 1 / replicas),
            (f"gradients are the mean of {own_mean}", found, of_own, 1),
            (f"gradients are {replicas} times the mean of {own_mean}", found, of_own, replicas),
            (f"gradients are 1/{replicas} of the mean of {own_mean}", found, of_own, 1 / replicas),
            ("gradients differ between replicas: they were not reduced", [joined], expected, 1),
        ]
    hypotheses.append(
        (f"gradients are {factor:.6g} times those of one device, in all variables", found, expected, factor)
    )
    explained = [
        max(off_by(gradients, [factor * gradient for gradient in base]).max() for gradients in each)
        for _, each, base, factor in hypotheses
    ]
    errors = backend.host_max(np.max([off_by(gradients, expected) for gradients in found], axis=0))
    wrong = [_is_strange([*expected, np.asarray(value)]), any(map(_is_strange, found)), _apart(backend, expected)]
    strange = backend.host_max(np.array(wrong, np.float64))
    rest = backend.host_max(np.array(explained))
    worst = int(np.argmax(errors))
    if strange[0]:
        return "loss or gradients of one device are NaN or infinite themselves, at places that count"
    if strange[1]:
        return f"gradients are NaN or infinite on several replicas, and not on one device; first in {names[worst]}"
    if strange[2]:
        return "workers have different variables. Call distpad.broadcast_variables before the first step"
    for (text, *_), error in zip(hypotheses, rest):
        if error <= min(_EXPLAINED, errors[worst] / 10):
            return text
    good = int(np.sum(errors <= errors[worst] / 1000))
    others = f"; {good} of {len(names)} variables are not off, or far less" if good else ", and all others too"
    return f"gradients of {names[worst]} are off by {errors[worst]:.2g} of their size{others if len(names) > 1 else ''}"


def _is_strange(given: Gradients) -> bool:
    return not all(np.isfinite(gradient).all() for gradient in given)


def _factor(found: Gradients, expected: Gradients) -> float:
    """The number that comes nearest to found / expected."""
    product, square = (
        sum(float(np.sum(np.asarray(f, np.float64) * g)) for f, g in zip(one, expected)) for one in (found, expected)
    )
    return product / square if square else 0.0


def _apart(backend: backends.Backend, expected: Gradients) -> bool:
    """Whether one device's gradients are other ones on other workers."""
    flat = np.concatenate([np.ravel(gradient).astype(np.float64) for gradient in expected])
    widths = backend.host_max(flat) + backend.host_max(-flat)
    return bool(np.max(widths, initial=0) > _EXPLAINED * np.max(np.abs(flat), initial=0))
