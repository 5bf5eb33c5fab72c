"""Padding on the host: pure functions from lists of sequences to batches, and back."""

from distpad.padding.batch import Padded, pad, unpad
from distpad.padding.keras import pad_sequences

__all__ = ["Padded", "pad", "pad_sequences", "unpad"]
