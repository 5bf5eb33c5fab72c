"""Memory of batches, aligned so that TensorFlow takes an array without a copy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

ALIGNMENT = 64  # bytes, as distpad/backends/tensors.py requires


def zeros(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An aligned array of zeros. They are not written: the kernel hands out memory of zeros."""
    dtype = np.dtype(dtype)
    if dtype.hasobject:
        return np.zeros(shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    begin = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def scalars(count: int) -> list[np.ndarray]:
    """Aligned float64 scalars, as arrays without axes."""
    width = ALIGNMENT // 8
    rows = zeros([count * width], np.dtype(np.float64))
    return [rows[width * i : width * i + 1].reshape(()) for i in range(count)]
