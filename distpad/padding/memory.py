"""Memory of batches, aligned so that TensorFlow takes an array without a copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from distpad import errors

# Arrays of this size and above are zeroed by the kernel, in huge pages, faster than by NumPy. NumPy 1 has small pages.
_ZEROED_BYTES = 2**22 if int(np.__version__.split(".")[0]) >= 2 else None
ALIGNMENT = 64  # bytes, as distpad/backends/tensors.py requires


def empty(shape: Sequence[int], dtype: np.dtype, *, zeros: bool = False) -> np.ndarray:
    """An aligned array, with ``zeros`` or with any values."""
    errors.check_memory("a padded batch", shape, dtype)
    if dtype.hasobject or not dtype.itemsize:
        return np.zeros(shape, dtype) if zeros else np.empty(shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    by_kernel = zeros and _ZEROED_BYTES is not None and size >= _ZEROED_BYTES
    with errors.within_memory("a padded batch"):
        memory = (np.zeros if by_kernel else np.empty)(size + ALIGNMENT, np.uint8)
    begin = -memory.__array_interface__["data"][0] % ALIGNMENT
    memory = memory[begin : begin + size]
    if zeros and not by_kernel:
        memory.fill(0)
    return memory.view(dtype).reshape(shape)


class Arena:
    """Aligned memory that the small arrays of a batch share: one allocation takes as long as a small array.

    Args:
      size: bytes; each array takes a multiple of ``ALIGNMENT``.
    """

    def __init__(self, size: int) -> None:
        self._memory = empty([size], np.dtype(np.uint8), zeros=True)
        self._used = 0

    def zeros(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """The next array, of zeros."""
        size, begin = math.prod(shape) * dtype().itemsize, self._used
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        found: np.ndarray = self._memory[begin : begin + size].view(dtype).reshape(shape)
        return found

    def copy(self, given: Any) -> np.ndarray:
        """The next array, a copy of a NumPy array or number."""
        found = self.zeros(np.shape(given), given.dtype.type)
        found[...] = given
        return found
