"""No less than float32: tensors widened, and a gradient times a number."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def scaled(gradient: Any, factor: Any) -> Any:
    """A gradient times a scalar, in its own dtype, computed in float32 at least; sparse ones stay sparse."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(scaled(gradient.values, factor), gradient.indices, gradient.dense_shape)
    wide = widened(gradient.dtype)
    return tf.cast(tf.cast(gradient, wide) * tf.cast(factor, wide), gradient.dtype)


def widened(dtype: tf.DType) -> tf.DType:
    """float32 for half precision, in which squares overflow at 256 and sums lose their last digits."""
    return tf.float32 if dtype.size < 4 else dtype


def wide(tensor: Any) -> Any:
    """Half precision widened before anything is computed: float16 squares overflow at 256."""
    if isinstance(tensor, tf.Tensor) and tensor.dtype in (tf.float16, tf.bfloat16):
        return tf.cast(tensor, tf.float32)
    return tensor
