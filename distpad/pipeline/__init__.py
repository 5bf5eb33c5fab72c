"""The input pipeline: read ahead, agree on a window of steps, pad, hand over."""

from distpad.pipeline.batches import PaddedBatches
from distpad.pipeline.features import Pad
from distpad.pipeline.padder import Batch

__all__ = ["Batch", "Pad", "PaddedBatches"]
