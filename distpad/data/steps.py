"""Steps: which examples of a source each step of a worker has, before they are read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from distpad.data.chunks import Rows
from distpad.data.sampler import LengthSampler


class Step(NamedTuple):
    """One micro-batch of a source, for all replicas of this worker.

    Attributes:
      batch_size: rows of a replica.
      indices: the example indices of each replica.
      rows: the examples, one replica's after the other's.
      is_check: whether the step lies before the loaded position, and only its fingerprint is compared.
      is_last: whether the source is known to have no further step.
    """

    batch_size: int
    indices: list[np.ndarray]
    rows: Rows = ()
    is_check: bool = False
    is_last: bool = False


def in_order(batch_size: int, replicas: int, checks: int, step: int, count: int | None = None) -> Iterator[Step]:
    """Yield a worker's steps in the order of its source: the first ``checks`` steps, then the steps from ``step`` on.

    Without a ``count`` of examples the steps do not end. The replicas share the examples of the last step evenly.
    """
    size = batch_size * replicas
    for number in itertools.chain(range(checks), itertools.count(step)):
        begin = number * size
        end = begin + size if count is None else min(begin + size, count)
        if begin < end:
            indices = [np.arange(begin, end)]
            indices = indices if replicas == 1 else np.array_split(indices[0], replicas)
            yield Step(batch_size, indices, is_check=number < step, is_last=end == count and number >= step)
        elif number >= checks:
            return


def sampled(
    sampler: LengthSampler, replicas: Sequence[int], num_replicas: int, epoch: int, step: int
) -> Iterator[Step]:
    """Yield the steps of this worker's replicas by a sampler's plan, from ``step`` on.

    If ``step`` is not 0, the first step of the epoch precedes them, and is compared.

    Args:
      replicas: the indices of this worker's replicas among ``num_replicas``.
    """
    plan = sampler.of_epoch(epoch)
    for number in [0] * bool(step) + [*range(step, len(plan.steps))]:
        batches = plan.deal(number, num_replicas, replicas)
        indices = [batch[batch >= 0] for batch in batches]
        yield Step(
            len(batches[0]), indices, is_check=number < step, is_last=number >= step and number + 1 == len(plan.steps)
        )


def cut(step: Step, count: int) -> Step:
    """The step with the first ``count`` of its examples, shared evenly by the replicas."""
    if count == sum(map(len, step.indices)):
        return step
    return step._replace(indices=np.array_split(np.concatenate(step.indices)[:count], len(step.indices)))
