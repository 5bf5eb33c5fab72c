"""Counts: what a step's loss is divided by, counted ahead of the step."""

from __future__ import annotations

from typing import Any, NamedTuple


class Counts(NamedTuple):
    """The global valid positions and sequences of one optimiser step, as float64 scalars.

    ``tokens`` is the number of valid positions over all replicas of all workers and all micro-batches of the step;
    ``sequences`` the number of rows that have any. ``DistributedLoss(..., denominator=counts)`` takes from them what
    its average needs.

    Attributes:
      tokens, sequences: over all replicas and all micro-batches of the optimiser step.
      local: ``[2]`` float64, this replica's own tokens and sequences in this micro-batch; None where nobody counted.
      replicas: float64 scalar, the number of replicas over which the counts run; None where it is not known.

    >>> Counts(tokens=12.0, sequences=3.0).tokens
    12.0
    """

    tokens: Any
    sequences: Any
    local: Any = None
    replicas: Any = None


class WeightedCounts(Counts):
    """Counts in which each position counts with its sample weight: the loss must be given the same weights.

    >>> isinstance(WeightedCounts(tokens=7.5, sequences=3.0), Counts)
    True
    """

    __slots__ = ()


class LossInputs(NamedTuple):
    """What a batch carries for one loss.

    Attributes:
      lengths: ``[batch]`` int32, the valid positions of each row of the feature that the loss averages over.
      sample_weight: the weights as the loss takes them, ``[batch]`` or ``[batch, length]``; ``()``, a nest of no
        tensors, where there are none.
      counts: ``Counts``, or ``WeightedCounts`` where there are weights.

    >>> LossInputs(lengths=[2, 1], sample_weight=(), counts=Counts(3.0, 2.0)).counts.tokens
    3.0
    """

    lengths: Any
    sample_weight: Any
    counts: Any
