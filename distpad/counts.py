"""Counts: what a step's loss is divided by, counted ahead of the step."""

from __future__ import annotations

from typing import Any, NamedTuple


class Counts(NamedTuple):
    """The global valid positions and sequences of one optimiser step, as float64 scalars.

    ``tokens`` is the number of valid positions over all replicas of all workers and all micro-batches of the step;
    ``sequences`` the number of rows that have any. ``DistributedLoss(..., denominator=counts)`` takes from them what
    its average needs.

    >>> Counts(tokens=12.0, sequences=3.0).tokens
    12.0
    """

    tokens: Any
    sequences: Any


class WeightedCounts(Counts):
    """Counts in which each position counts with its sample weight: the loss must be given the same weights.

    >>> isinstance(WeightedCounts(tokens=7.5, sequences=3.0), Counts)
    True
    """

    __slots__ = ()
