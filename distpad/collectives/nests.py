"""Nests of tensors with the arguments that belong to each: read, checked, and laid side by side."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.collectives import shapes

MOST_AXES = 8  # tf.pad takes no tensor of a higher rank


class Leaf(NamedTuple):
    """One tensor of the nest, on this replica."""

    tensor: tf.Tensor
    axis: int
    value: Any
    lengths: tf.Tensor | None
    where: str


def leaves_of(
    function: str, tensors: Any, axis: Any, value: Any, lengths: Any, *, numbers: bool = False
) -> tuple[list[Leaf], Exception | None]:
    """Flatten the nests side by side; single axes and values serve every tensor. ``numbers``: refuse what no engine
    gathers.

    What is wrong is returned, since it may be wrong on this replica alone: the exchange raises it on all. A leaf that
    it concerns is then one that the exchange can do with.
    """
    flat = tf.nest.flatten(tensors)
    if not flat:
        raise ValueError(errors.sentence(function, "tensors", "empty", "at least one tensor"))
    argument_error: Exception | None = None
    columns = []
    for name, given in (("axis", axis), ("value", value), ("lengths", _lists_as_arrays(lengths))):
        column = [given] * len(flat)
        if tf.nest.is_nested(tensors) and tf.nest.is_nested(given):
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
            if known.dtype == tf.string:  # no exchange can do with it
                known = tf.zeros_like(known, tf.float32)
            leaves.append(Leaf(known, min(1, known.shape.rank - 1), tf.zeros([], known.dtype), None, where))
    return leaves, argument_error


def _tensor(function: str, where: str, given: Any) -> tf.Tensor:
    """A leaf of ``tensors`` as a tensor of known rank."""
    if isinstance(given, (int, float, str)):  # lists are nests here, as everywhere in TensorFlow
        remedy = "Nested lists of numbers are padded by distpad.pad."
        raise TypeError(errors.sentence(function, f"tensors{where}", repr(given), "a tensor or an array", remedy))
    if isinstance(given, (tf.RaggedTensor, tf.SparseTensor)):
        kind, remedy = type(given).__name__, "Use distpad.pad first."
        raise TypeError(errors.sentence(function, f"tensors{where}", kind, "a padded tensor", remedy))
    try:
        tensor = tf.convert_to_tensor(given)
    except (ValueError, TypeError) as error:
        kind, remedy = type(given).__name__, "Ragged arrays are padded by distpad.pad."
        raise TypeError(errors.sentence(function, f"tensors{where}", kind, "a tensor or an array", remedy)) from error
    if tensor.shape.rank is None:
        raise ValueError(errors.sentence(function, f"the rank of tensors{where}", "unknown", "a known one (set_shape)"))
    if tensor.shape.rank > MOST_AXES:
        found, remedy = f"of rank {tensor.shape.rank}", "Merge axes with tf.reshape."
        raise ValueError(errors.sentence(function, f"tensors{where}", found, f"at most {MOST_AXES} axes", remedy))
    return tensor


def check_numbers(function: str, where: str, dtype: tf.DType) -> None:
    """Refuse what no engine gathers."""
    if not (dtype.is_integer or dtype.is_floating or dtype.is_complex or dtype.is_bool):
        remedy = "Gather numbers, such as ids, and make text of them afterwards."
        raise TypeError(errors.sentence(function, f"the dtype of tensors{where}", dtype.name, "numbers", remedy))


def _leaf(function: str, where: str, tensor: tf.Tensor, axis: Any, value: Any, lengths: Any) -> Leaf:
    """A tensor with the arguments that belong to it, checked as far as one replica can."""
    try:
        axis = operator.index(axis)
    except TypeError as error:
        raise TypeError(errors.sentence(function, "axis", repr(axis), "an integer")) from error
    rank = tensor.shape.rank
    axis = axis % rank if -rank <= axis < rank else axis  # out of range it stays: the exchange says so
    try:
        filling = tf.constant(bool(value) if tensor.dtype == tf.bool else value, tensor.dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(errors.sentence(function, "value", repr(value), f"a {tensor.dtype.name}")) from error
    if filling.shape.rank:
        raise ValueError(errors.sentence(function, "value", repr(value), "one number for each tensor"))
    if lengths is not None and axis == 0:
        raise ValueError(errors.sentence(function, f"lengths of tensors{where}", "given", "none where axis is 0"))
    if lengths is not None:
        try:
            lengths = shapes.check_lengths(lengths)
            if rank:
                shapes.broadcast(shapes.Source("lengths", lengths), shapes.sizes_of(tensor, 1))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{function}: {error} (tensors{where}).") from error
    return Leaf(tensor, axis, filling, lengths, where)


def _lists_as_arrays(lengths: Any) -> Any:
    """Lists of numbers are somebody's lengths; TensorFlow would take them for more of the nest."""
    if isinstance(lengths, dict):
        return {key: _lists_as_arrays(item) for key, item in lengths.items()}
    if isinstance(lengths, (list, tuple)):
        if all(isinstance(item, (int, np.integer)) for item in lengths):
            return np.array(lengths, np.int64)
        items = [_lists_as_arrays(item) for item in lengths]
        return type(lengths)(*items) if hasattr(lengths, "_fields") else type(lengths)(items)
    return lengths


def _paths(nest: Any, prefix: str = "") -> list[str]:
    """Where each leaf is, as one would write it: ``['label']``, in the order of ``tf.nest.flatten``."""
    if isinstance(nest, dict):
        return [path for key in sorted(nest) for path in _paths(nest[key], f"{prefix}[{key!r}]")]
    if isinstance(nest, (list, tuple)):
        return [path for i, item in enumerate(nest) for path in _paths(item, f"{prefix}[{i}]")]
    return [prefix]
