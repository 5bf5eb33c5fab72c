"""Nests of tensors, flattened and checked together with the axes, values and lengths of their tensors."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import errors, precision
from distpad.collectives import shapes

MOST_AXES = 8  # the highest rank that tf.pad takes


class Leaf(NamedTuple):
    """One tensor of a nest on this replica, with its arguments; ``where`` is its path, such as ``['label']``."""

    tensor: tf.Tensor
    axis: int
    value: Any
    lengths: tf.Tensor | None
    where: str


def leaves_of(
    function: str, tensors: Any, axis: Any, value: Any, lengths: Any, *, numbers: bool = False
) -> tuple[list[Leaf], Exception | None]:
    """Flatten ``tensors`` and the nests of its arguments; one axis or value serves all tensors.

    Errors are returned, not raised, so that all replicas raise together. The leaf of an error is replaced by one that
    can take part in the all-gather.

    Args:
      function: the name of the public function, for messages.
      tensors, axis, value, lengths: arguments of the public function.
      numbers: whether a tensor of strings is an error.

    Returns: the leaves, and the first error or None.

    Raises: ValueError: ``tensors`` is empty.
    """
    if errors.is_deep(tensors):
        raise ValueError(errors.sentence(function, "tensors", "nested more than 32 times", "a short nest of tensors"))
    flat = tf.nest.flatten(tensors)
    if not flat:
        raise ValueError(errors.sentence(function, "tensors", "empty", "at least one tensor"))
    argument_error: Exception | None = None
    columns = []
    for name, given in (
        ("axis", axis),
        ("value", value),
        ("lengths", _lists_as_arrays(lengths)),
    ):
        column = [given] * len(flat)
        if errors.is_deep(given):
            argument_error = ValueError(errors.sentence(function, name, "nested more than 32 times", "a short nest"))
            column = [{"axis": 1, "value": 0}.get(name)] * len(flat)
        elif tf.nest.is_nested(tensors) and tf.nest.is_nested(given):
            try:
                tf.nest.assert_same_structure(tensors, given)
                column = tf.nest.flatten(given)
            except (ValueError, TypeError):
                argument_error = ValueError(errors.sentence(function, name, given, "a nest like that of tensors"))
                column = [{"axis": 1, "value": 0}.get(name)] * len(flat)
        columns.append(column)
    leaves = []
    for where, tensor, *others in zip(_paths(tensors), flat, *columns):
        known = tf.zeros([0, 0])
        try:
            known = _tensor(function, where, tensor)
            if numbers:
                check_numbers(function, where, known.dtype)
            leaves.append(_leaf(function, where, known, *others))
        except (ValueError, TypeError) as error:
            argument_error = argument_error or error
            if known.dtype == tf.string:  # no engine gathers strings
                known = tf.zeros_like(known, tf.float32)
            leaves.append(Leaf(known, min(1, known.shape.rank - 1), tf.zeros([], known.dtype), None, where))
    return leaves, argument_error


def _tensor(function: str, where: str, given: Any) -> tf.Tensor:
    """Return a leaf of ``tensors`` as a tensor of known rank. Raises: TypeError, ValueError."""
    if isinstance(given, (int, float, str)):  # lists are nests here, as everywhere in TensorFlow
        remedy = "distpad.pad pads nested lists of numbers."
        raise TypeError(
            errors.sentence(function, f"tensors{where}", errors.shown(given), "a tensor or an array", remedy)
        )
    if isinstance(given, (tf.RaggedTensor, tf.SparseTensor)):
        kind, remedy = type(given).__name__, "Use distpad.pad first."
        raise TypeError(errors.sentence(function, f"tensors{where}", kind, "a padded tensor", remedy))
    try:
        tensor = precision.to_tensor(given, f"tensors{where}")
    except (ValueError, TypeError) as error:
        kind, remedy = type(given).__name__, "distpad.pad pads ragged arrays."
        raise TypeError(errors.sentence(function, f"tensors{where}", kind, "a tensor or an array", remedy)) from error
    if tensor.shape.rank is None:
        raise ValueError(errors.sentence(function, f"the rank of tensors{where}", "unknown", "a known one (set_shape)"))
    if tensor.shape.rank > MOST_AXES:
        found, remedy = f"of rank {tensor.shape.rank}", "Merge axes with tf.reshape."
        raise ValueError(errors.sentence(function, f"tensors{where}", found, f"at most {MOST_AXES} axes", remedy))
    return tensor


def check_numbers(function: str, where: str, dtype: tf.DType) -> None:
    """Raise TypeError for a dtype that no engine gathers."""
    if not (dtype.is_integer or dtype.is_floating or dtype.is_complex or dtype.is_bool):
        remedy = "Gather numbers, such as ids, and convert them to text afterwards."
        raise TypeError(errors.sentence(function, f"the dtype of tensors{where}", dtype.name, "numbers", remedy))


def _leaf(function: str, where: str, tensor: tf.Tensor, axis: Any, value: Any, lengths: Any) -> Leaf:
    """Return a tensor with its arguments. Raises: TypeError, ValueError, for errors that one replica can see."""
    try:
        axis = operator.index(axis)
    except TypeError as error:
        raise TypeError(errors.sentence(function, "axis", errors.shown(axis), "an integer")) from error
    rank = tensor.shape.rank
    axis = axis % rank if -rank <= axis < rank else axis  # out of range: an error on all replicas
    try:
        padding = precision.to_tensor(bool(value) if tensor.dtype == tf.bool else value, "value", tensor.dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(errors.sentence(function, "value", errors.shown(value), f"a {tensor.dtype.name}")) from error
    if padding.shape.rank:
        raise ValueError(errors.sentence(function, "value", errors.shown(value), "one number for each tensor"))
    if lengths is not None and axis == 0:
        raise ValueError(errors.sentence(function, f"lengths of tensors{where}", "given", "none where axis is 0"))
    if lengths is not None:
        try:
            lengths = shapes.check_lengths(lengths)
            if rank:
                shapes.broadcast(shapes.Source("lengths", lengths), shapes.sizes_of(tensor, 1))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{function}: {error} (tensors{where}).") from error
    return Leaf(tensor, axis, padding, lengths, where)


def _lists_as_arrays(lengths: Any) -> Any:
    """Convert lists of integers in a nest to arrays, since tf.nest would take each integer for a leaf."""
    if errors.is_deep(lengths):
        return lengths
    if isinstance(lengths, dict):
        return {key: _lists_as_arrays(item) for key, item in lengths.items()}
    if isinstance(lengths, (list, tuple)):
        if all(isinstance(item, (int, np.integer)) and -(2**63) <= item < 2**63 for item in lengths):
            return np.array(lengths, np.int64)
        items = [_lists_as_arrays(item) for item in lengths]
        return type(lengths)(*items) if hasattr(lengths, "_fields") else type(lengths)(items)
    return lengths


def _paths(nest: Any, prefix: str = "") -> list[str]:
    """Return the path of each leaf as code, such as ``['label']``, in the order of ``tf.nest.flatten``."""
    if isinstance(nest, dict):
        return [path for key in sorted(nest) for path in _paths(nest[key], f"{prefix}[{key!r}]")]
    if isinstance(nest, (list, tuple)):
        return [path for i, item in enumerate(nest) for path in _paths(item, f"{prefix}[{i}]")]
    return [prefix]
