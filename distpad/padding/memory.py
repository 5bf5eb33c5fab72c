"""Memory of batches, aligned so that TensorFlow takes an array without a copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Arrays of this size and above are zeroed by the kernel, in huge pages, faster than by NumPy. NumPy 1 has small pages.
_ZEROED_BYTES = 2**22 if int(np.__version__.split(".")[0]) >= 2 else None
ALIGNMENT = 64  # bytes, as distpad/backends/tensors.py requires


def zeros(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An aligned array of zeros."""
    return empty(shape, dtype, zeros=True)


def empty(shape: Sequence[int], dtype: np.dtype, *, zeros: bool = False) -> np.ndarray:
    """An aligned array, with ``zeros`` or with any values."""
    if dtype.hasobject or not dtype.itemsize:
        return np.zeros(shape, dtype) if zeros else np.empty(shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    by_kernel = zeros and _ZEROED_BYTES is not None and size >= _ZEROED_BYTES
    memory = (np.zeros if by_kernel else np.empty)(size + ALIGNMENT, np.uint8)
    begin = -memory.__array_interface__["data"][0] % ALIGNMENT
    memory = memory[begin : begin + size]
    if zeros and not by_kernel:
        memory.fill(0)
    return memory.view(dtype).reshape(shape)


def scalars(*given: Any) -> list[np.ndarray]:
    """Aligned float64 arrays of numbers, or of short vectors."""
    width = ALIGNMENT // 8
    memory = empty([len(given) * width], np.dtype(np.float64))
    found = []
    for begin, each in zip(range(0, len(memory), width), given):
        shape = np.shape(each)
        here = memory[begin : begin + (shape[0] if shape else 1)]
        here[:] = each
        found.append(here if shape else here.reshape(()))
    return found
