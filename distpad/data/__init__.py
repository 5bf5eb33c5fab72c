"""The input pipeline: read ahead, synchronise a window of steps, pad, move to the devices."""

from distpad.data.batches import PaddedBatches
from distpad.data.collate import Batch
from distpad.data.columns import Columns
from distpad.data.derived import Indices, Lengths, Mask
from distpad.data.sampler import LengthSampler
from distpad.data.schema import Pad

__all__ = ["Batch", "Columns", "Indices", "LengthSampler", "Lengths", "Mask", "Pad", "PaddedBatches"]
