"""The plan of a window of steps: each worker's report, and the plan that the merged reports define, in NumPy.

A worker reports for each step the longest sizes of its examples, the number of its valid positions, sequences and rows,
and the step at which it failed. One maximum and one sum over the workers merge the reports: the size of a message does
not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from distpad.data.config import Config

_LONGEST = 2**31  # of a size
NOTHING = -(2.0**60)  # in a maximum: this worker has no value


class StepPlan(NamedTuple):
    """One step's sizes and counts, the same on all workers, before it runs.

    Attributes:
      agreed: the longest size of each ragged axis over all replicas, at least 1.
      sizes: the padded size of each ragged axis: a boundary of the buckets, or ``agreed``.
      rows: real rows over all replicas.
      tokens, sequences: ``[losses]``, over all replicas and all micro-batches of the optimiser step.
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
    """A window's planned steps, whether the epoch ends with them, and the failure after them.

    Attributes:
      begins: ``[window]``, the fingerprints of the steps up to each, over all workers.
      alike: the number of workers with examples, if there are several and all of them read the same; else 0.
      skipped: the number of examples that each step skipped, over all workers.
    """

    steps: list[StepPlan]
    is_last: bool
    failure: Failure | None
    begins: list[int]
    alike: int
    skipped: list[int]


@dataclass
class Report:
    """One worker's report of a window; steps after its last example are zero.

    Attributes:
      longest: ``[window, axes]``, the longest sizes over the worker's replicas.
      tokens, sequences: ``[window, losses]``.
      rows, skipped: ``[window]``, the examples that are rows, and those that were skipped.
      begins: ``[window]``, the fingerprints of the worker's steps up to each.
      digest: the hash of the worker's first examples, 0 without examples, or if it is not compared.
      continues: False if the worker has no example after the window.
      failed_at: the step at which it failed, or None.
    """

    longest: np.ndarray
    tokens: np.ndarray
    sequences: np.ndarray
    rows: np.ndarray
    skipped: np.ndarray
    begins: np.ndarray
    digest: float = 0.0
    continues: bool = True
    failed_at: int | None = None

    @classmethod
    def blank(cls, config: Config, window: int) -> Report:
        """The report of a worker without examples."""
        counts = np.zeros([2, window, len(config.tokens)])
        return cls(np.zeros([window, len(config.axes)]), *counts, *np.zeros([3, window]))


def pack(report: Report, worker: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack a report into two float64 vectors, for the maximum and for the sum over all workers."""
    failed = 0.0
    if report.failed_at is not None:  # the earliest step wins, then the first worker
        failed = (len(report.rows) - report.failed_at) * workers + workers - 1 - worker + 1
    digests = [report.digest, -report.digest] if report.digest else [NOTHING, NOTHING]
    maxima = np.concatenate([[failed, report.continues, *digests], report.longest.ravel()])
    counts = report.rows, report.skipped, report.begins, report.tokens.ravel(), report.sequences.ravel()
    return maxima.astype(np.float64), np.concatenate([[bool(report.digest)], *counts]).astype(np.float64)


def check(maxima: np.ndarray, sums: np.ndarray, window: int, workers: int) -> None:
    """Raise ValueError for merged vectors that no reports have. The same on all workers."""
    (failed, continues), longest, whole = maxima[:2], maxima[4:], sums[: 1 + 2 * window]
    is_whole = np.array_equal(whole, np.rint(whole)) and np.array_equal(longest, np.rint(longest))
    is_in_range = min(sums.min(), longest.min(initial=0), failed) >= 0 and longest.max(initial=0) < _LONGEST
    if not (is_whole and is_in_range and continues in (0, 1) and failed <= (window + 1) * workers):
        raise ValueError(f"counts or sizes that no batch has, up to {max(sums.max(), longest.max(initial=0)):g}")


def merge(
    maxima: np.ndarray,
    sums: np.ndarray,
    *,
    config: Config,
    window: int,
    workers: int,
    full_rows: int | None,
    sizes_of: Callable[[int, tuple[int, ...]], tuple[int, ...]],
) -> Merged:
    """Return the plan that the merged vectors define, the same on all workers.

    Args:
      maxima, sums: the maximum and the sum over all workers of their ``pack``.
      window: micro-batches in the window, a multiple of ``accumulation_steps``.
      workers: number of workers.
      full_rows: rows of a full step over all replicas; a step with fewer ends the epoch. None: no step is dropped.
      sizes_of: computes the padded sizes from the step's index in the window and the longest sizes.
    """
    group = config.accumulation_steps
    (failed, continues, digest, negative), longest = maxima[:4], maxima[4:].reshape(window, -1)
    rows, skipped, begins = sums[1 : 1 + 3 * window].reshape(3, window)
    tokens, sequences = sums[1 + 3 * window :].reshape(2, window, -1)
    failure = _failure(failed, window, workers)
    usable = window if failure is None else failure.step
    found = _leading((rows + skipped)[:usable] >= (full_rows or 1))
    # batches without rows complete a short last group, but not with drop_remainder, nor before a failure
    completes = full_rows is None and failure is None
    steps = (-(-found // group) if completes else found // group) * group
    if found < usable:
        failure = None  # the epoch ends before the step that failed
    is_last = failure is None and (steps < window or not continues)
    plans: list[StepPlan] = []
    of_groups = [each.reshape(window // group, group, -1).sum(axis=1) for each in (tokens, sequences)]
    for step in range(steps):
        counts = [each[step // group] for each in of_groups]
        if rows[step] or not plans:  # at first, all examples may be skipped
            agreed = tuple(max(1, int(size)) for size in longest[step])
            plans.append(StepPlan(agreed, sizes_of(step, agreed), int(rows[step]), *counts))
        else:  # completes a group, or skips all: in the shape of the step before, since its own may be on no boundary
            plans.append(StepPlan(plans[-1].agreed, plans[-1].sizes, 0, *counts))
    alike = int(sums[0]) if sums[0] > 1 and digest == -negative else 0
    return Merged(plans, is_last, failure, begins.astype(int).tolist(), alike, skipped[:steps].astype(int).tolist())


def _failure(code: float, window: int, workers: int) -> Failure | None:
    if code <= 0:
        return None
    steps_left, workers_after = divmod(int(code) - 1, workers)
    return Failure(window - steps_left, workers - 1 - workers_after)


def _leading(good: np.ndarray) -> int:
    """The number of leading true values."""
    return int(np.argmin(good)) if not good.all() else len(good)


def fingerprint(text: str | bytes) -> float:
    """48 bits of a hash: a float64 holds them exactly."""
    data = text.encode() if isinstance(text, str) else text
    return float(int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "big"))


def differences(texts: Sequence[str]) -> list[str]:
    """Name the differences between the workers' JSON objects, as "lookahead is 32 on worker 0, 16 on worker 1"."""
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
