"""The plan of a window of steps: what each worker reports, and what follows when all reports are merged. Pure, NumPy.

A worker reports for each step the longest sizes of its examples, its valid positions and sequences, its rows, and where
it failed. Reports are merged by one maximum and one sum over the workers, so that a message does not grow with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class StepPlan(NamedTuple):
    """What all workers know of one step before it runs.

    Attributes:
      agreed: the longest size over all replicas of each ragged axis, at least 1.
      sizes: what the axes are padded to: a boundary of the buckets, or ``agreed``.
      rows: real rows over all replicas.
      tokens, sequences: of each loss, over all replicas and all micro-batches of the optimiser step, ``[losses]``.
    """

    agreed: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: int
    tokens: np.ndarray
    sequences: np.ndarray


class Failure(NamedTuple):
    """The first step at which a worker failed, and the worker."""

    step: int
    worker: int


class Merged(NamedTuple):
    """A window's plans, whether the epoch ends with them, and a failure behind them."""

    steps: list[StepPlan]
    is_last: bool
    failure: Failure | None


@dataclass
class Report:
    """What one worker reports of a window; steps beyond its data stay zero.

    Attributes:
      longest: ``[window, axes]``, over the worker's replicas.
      tokens, sequences: ``[window, losses]``.
      rows: ``[window]``.
      failed_at: the step at which it failed, or None.
    """

    longest: np.ndarray
    tokens: np.ndarray
    sequences: np.ndarray
    rows: np.ndarray
    failed_at: int | None = None

    @classmethod
    def blank(cls, window: int, axes: int, losses: int) -> Report:
        return cls(np.zeros([window, axes]), np.zeros([window, losses]), np.zeros([window, losses]), np.zeros([window]))


def pack(report: Report, worker: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """A report as the two vectors of which the maximum and the sum over all workers are taken, float64."""
    failed = 0.0
    if report.failed_at is not None:  # the earliest step wins, then the first worker
        failed = (len(report.rows) - report.failed_at) * workers + workers - 1 - worker + 1
    maxima = np.concatenate([[failed], report.longest.ravel()])
    sums = np.concatenate([report.rows, report.tokens.ravel(), report.sequences.ravel()])
    return maxima.astype(np.float64), sums.astype(np.float64)


def merge(
    maxima: np.ndarray,
    sums: np.ndarray,
    *,
    window: int,
    axes: int,
    losses: int,
    workers: int,
    sizes_of: Callable[[int, tuple[int, ...]], tuple[int, ...]],
    accumulation_steps: int,
    full_rows: int | None,
) -> Merged:
    """The plans that follow from the merged vectors: the same on all workers.

    Args:
      maxima, sums: over all workers, of what ``pack`` made.
      window: micro-batches, a multiple of ``accumulation_steps``.
      axes: ragged axes of all features.
      sizes_of: what the axes of a step are padded to, given its place in the window and their longest sizes.
      full_rows: of a step over all replicas, where steps with fewer are dropped; None: none are.
    """
    longest = maxima[1:].reshape(window, axes)
    rows = sums[:window]
    tokens, sequences = sums[window:].reshape(2, window, losses)
    failure = _failure(maxima[0], window, workers)
    usable = window if failure is None else failure.step
    if full_rows is None:
        steps = (
            -(-_leading(rows[:usable] > 0) // accumulation_steps) * accumulation_steps
        )  # a short last group is filled up
        steps = min(steps, usable // accumulation_steps * accumulation_steps) if failure else steps
        ended = steps < usable // accumulation_steps * accumulation_steps
    else:
        full = _leading(rows[:usable] >= full_rows)
        steps = full // accumulation_steps * accumulation_steps
        ended = full < usable
    if ended:
        failure = None  # the epoch ends before the step that failed
    is_last = failure is None and steps < window
    plans = []
    for step in range(steps):
        begin = step // accumulation_steps * accumulation_steps
        group = slice(begin, begin + accumulation_steps)
        counts = tokens[group].sum(axis=0), sequences[group].sum(axis=0)
        if rows[step]:
            agreed = tuple(max(1, int(size)) for size in longest[step])
            plans.append(StepPlan(agreed, sizes_of(step, agreed), int(rows[step]), *counts))
        else:  # fills up a group: of the shape before it, since one of its own might be on no boundary
            plans.append(plans[-1]._replace(rows=0))
    return Merged(plans, is_last, failure)


def _failure(code: float, window: int, workers: int) -> Failure | None:
    if code <= 0:
        return None
    left, behind = divmod(int(code) - 1, workers)
    return Failure(window - left, workers - 1 - behind)


def _leading(good: np.ndarray) -> int:
    """How many are true before the first that is not."""
    return int(np.argmin(good)) if not good.all() else len(good)


def fingerprint(text: str | bytes) -> float:
    """48 bits of a hash: a float64 holds them exactly."""
    data = text.encode() if isinstance(text, str) else text
    return float(int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "big"))


def differences(texts: Sequence[str]) -> list[str]:
    """What differs between the workers' JSON objects: "window is 32 on worker 0, 16 on worker 1"."""
    flat = [_flattened(json.loads(text)) if text else {} for text in texts]
    known = [i for i, text in enumerate(texts) if text]
    found = []
    for key in sorted(set().union(*flat)):
        values = {worker: flat[worker].get(key, "missing") for worker in known}
        first = values[known[0]]
        other = next((worker for worker in known if values[worker] != first), None)
        if other is not None:
            found.append(f"{key} is {first} on worker {known[0]}, {values[other]} on worker {other}")
    return found


def _flattened(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _flattened(item, f"{prefix}.{key}".lstrip(".")).items()}
    return {prefix: json.dumps(value)}
