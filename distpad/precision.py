"""Precision: tensors of float16 and bfloat16 become float32 before anything is computed."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors

MOST_AXES = 8  # the highest rank that tf.pad and others take
# what TensorFlow raises for arrays, lists and objects that it cannot convert, beside ValueError and TypeError
_PLAIN = (numbers.Number, np.generic, str, bytes)
_FAILED = (tf.errors.OpError, ArithmeticError, AttributeError, MemoryError, RecursionError, SystemError, RuntimeError)


def to_tensor(given: Any, name: str, dtype: Any = None) -> tf.Tensor:
    """``tf.convert_to_tensor`` for arguments of users. Raises: TypeError, ValueError, with the ``name`` in the message.

    TensorFlow would never return for a list that contains itself, and copies arrays that are larger than the memory.
    """
    rule = "a tensor, an array or a list of numbers"
    if errors.is_deep(given):
        raise ValueError(f"{name} is nested more than 32 times, expected {rule}")
    for leaf in [] if tf.is_tensor(given) else tf.nest.flatten(given):
        if isinstance(leaf, np.ndarray):
            if leaf.dtype.kind in "mM" or leaf.dtype.names:  # TensorFlow crashes on a list of arrays of times
                raise TypeError(f"{name} is an array of dtype {leaf.dtype}, expected {rule}")
            errors.check_memory(name, leaf.shape, leaf.dtype)
            if max(leaf.shape, default=0) >= 2**31:
                raise ValueError(f"{name} is an array of shape {leaf.shape}, expected sizes below 2**31")
        elif not (tf.is_tensor(leaf) or isinstance(leaf, _PLAIN) or hasattr(type(leaf), "__array__")):
            raise TypeError(f"{name} is {errors.shown(given)}, expected {rule}")
    try:
        return tf.convert_to_tensor(given, dtype)
    except (ValueError, TypeError, *_FAILED) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} is {errors.shown(given)}, expected {rule}. {str(error)[:200]}") from error


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
    if errors.is_deep(value):
        raise ValueError("labels or predictions are nested more than 32 times, expected tensors or nests of tensors")
    is_list = isinstance(value, list) and all(np.isscalar(leaf) for leaf in tf.nest.flatten(value))
    if isinstance(value, (dict, list, tuple)) and not is_list:
        return (
            tf.nest.map_structure(lambda x: as_tensor(x) if isinstance(x, tf.Tensor) else x, value) if nests else value
        )
    tensor = to_tensor(value, "a tensor of labels or predictions")
    if (tensor.shape.rank or 0) > MOST_AXES:
        raise ValueError(f"labels or predictions have rank {tensor.shape.rank}, expected at most {MOST_AXES} axes")
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
