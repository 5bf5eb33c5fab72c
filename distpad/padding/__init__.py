"""Padding on the host: pure functions from lists of sequences to batches and back, and buckets of lengths."""

from distpad.padding.batch import Padded, pad, unpad
from distpad.padding.buckets import Buckets
from distpad.padding.keras import pad_sequences

__all__ = ["Buckets", "Padded", "pad", "pad_sequences", "unpad"]
