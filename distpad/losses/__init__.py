"""Losses averaged over the valid positions of all replicas: weights, sums, counts, and CTC."""

from distpad.losses.counts import Counts, LossInputs, WeightedCounts
from distpad.losses.ctc import CTC
from distpad.losses.distributed import DistributedLoss

__all__ = ["CTC", "Counts", "DistributedLoss", "LossInputs", "WeightedCounts"]
