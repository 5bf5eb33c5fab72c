"""Counts: what a step's loss is divided by, counted ahead of the step."""

from __future__ import annotations

from typing import Any, NamedTuple


class Counts(NamedTuple):
    """The global valid positions and sequences of one optimiser step, as float64 scalars.

    ``DistributedLoss(..., denominator=counts)`` takes from them what its average needs.

    Attributes:
      tokens: the number of valid positions over all replicas of all workers and all micro-batches of the step.
      sequences: the number of rows that have any.
      local: ``[2]`` float64, this replica's own tokens and sequences in this micro-batch; None where nobody counted
        them. The loss compares them with what it averages over.
      replicas: the number of replicas that ``tokens`` and ``sequences`` span, float64; None where it is not known. The
        loss compares it with the number of replicas that it runs on.

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
    """What a batch of ``PaddedBatches`` carries for one loss: ``DistributedLoss(...)(y_true, y_pred, batch=...)``.

    Attributes:
      lengths: ``[batch]`` int32, the valid positions of each row.
      sample_weight: ``[batch]`` or ``[batch, length, ...]``; ``()``, an empty nest, where positions are not weighted.
      counts: ``Counts``, the loss's denominator.

    >>> LossInputs(lengths=[2, 1], sample_weight=(), counts=Counts(3.0, 2.0)).counts.tokens
    3.0
    """

    lengths: Any
    sample_weight: Any
    counts: Any
