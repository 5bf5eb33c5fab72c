"""Collectives: tensors padded alike on all replicas, tensors gathered, and the checked all-gather that both use."""

from distpad.collectives.global_max import gather, pad_to_global_max
from distpad.collectives.shapes import PreLengths

__all__ = ["PreLengths", "gather", "pad_to_global_max"]
