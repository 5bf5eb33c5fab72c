"""Precision: tensors of float16 and bfloat16 become float32 before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf


def as_tensor(value: Any, *, widen: bool = True, nests: bool = False) -> Any:
    """Convert an array, a variable or nested lists of numbers to a tensor of float32 at least.

    Composite tensors are returned unchanged.

    Args:
      value: anything that ``tf.convert_to_tensor`` takes, a composite tensor, or a nest of tensors.
      widen: whether half precision becomes float32; False keeps the dtype.
      nests: whether the tensors of a nest are widened too; False returns a nest unchanged.
    """
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        return value
    is_list = isinstance(value, list) and all(np.isscalar(leaf) for leaf in tf.nest.flatten(value))
    if isinstance(value, (dict, list, tuple)) and not is_list:
        return (
            tf.nest.map_structure(lambda x: as_tensor(x) if isinstance(x, tf.Tensor) else x, value) if nests else value
        )
    tensor = tf.convert_to_tensor(value)
    return tf.cast(tensor, tf.float32) if widen and tensor.dtype in (tf.float16, tf.bfloat16) else tensor


def scale(gradient: Any, factor: Any) -> Any:
    """Multiply a gradient by a scalar in float32 at least; its dtype stays, and a sparse gradient stays sparse."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(scale(gradient.values, factor), gradient.indices, gradient.dense_shape)
    wide = widened(gradient.dtype)
    return tf.cast(tf.cast(gradient, wide) * tf.cast(factor, wide), gradient.dtype)


def widened(dtype: tf.DType) -> tf.DType:
    """Return float32 for half precision, in which squares overflow at 256 and sums lose their last digits."""
    return tf.float32 if dtype.size < 4 else dtype
