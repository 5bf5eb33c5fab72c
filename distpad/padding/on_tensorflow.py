"""Padding in TensorFlow operations: every input becomes a RaggedTensor, so that graphs and gradients work.

The caller passes ``tf``: this module never imports TensorFlow.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from distpad import errors
from distpad.padding import arguments, on_numpy

_check = functools.partial(errors.require, "pad")


def pad(tf: Any, sequences: Any, options: arguments.Options) -> tuple[Any, Any, Any]:
    """Pad tensors to ``(values, lengths, mask)``, as ``distpad.pad`` describes it."""
    if isinstance(sequences, (list, tuple)) and not any(tf.is_tensor(item) for item in sequences):
        return _pad_nested(tf, sequences, options)
    ragged, axes = _as_ragged(tf, sequences, options.ragged_axes)
    first, last = axes[0] + 1, axes[-1] + 1  # among the axes of the batch
    lengths = _lengths(tf, ragged, first)
    if options.length is not None:
        errors.check_memory("pad: length", [lengths.shape[0] or 1, options.length], ragged.dtype.as_numpy_dtype())
        if options.truncating == "error":
            _check_lengths(tf, lengths, options.length)
        begin = -options.length if options.truncating == "pre" and options.length else 0
        ragged = ragged[(slice(None),) * first + (slice(begin, None if begin else options.length),)]
        lengths = tf.minimum(lengths, options.length)
    _check_even(tf, ragged, axes)
    ragged = _cast(tf, ragged, options.dtype)
    splits = ragged.nested_row_splits[:last]
    for _ in splits:
        ragged = ragged.values
    flat = ragged.to_tensor() if isinstance(ragged, tf.RaggedTensor) else ragged  # even partitions, of one position
    inner = flat.shape[1:]
    value = _padding_value(tf, options.value, flat.dtype, tuple(inner) if inner.is_fully_defined() else None)
    shape = [options.length if axis == first else None for axis in range(last + 1)]
    values = _to_tensor(tf, flat, splits, [*shape, *[None] * inner.rank], value)
    if options.padding == "pre":
        values = _move_back(tf, values, lengths, first)
    if not options.mask:
        return values, lengths, None
    if last == 1:
        mask = mask_of(tf, values, 1, lengths)
        return values, lengths, tf.reverse(mask, [1]) if options.padding == "pre" else mask
    mask = _to_tensor(tf, tf.ones([splits[-1][-1]], tf.bool), splits, shape, False)
    return values, lengths, _move_back(tf, mask, lengths, first) if options.padding == "pre" else mask


def pad_axis(tf: Any, tensor: Any, axis: int, size: Any, value: Any, lengths: Any = None) -> tuple[Any, Any, Any]:
    """Pad a tensor at the end of one axis, to ``size``; ``lengths`` are int32, None: all rows are real as a whole."""
    shape = tf.shape(tensor)
    after = tf.one_hot(axis, tensor.shape.rank, on_value=size - shape[axis], off_value=0, dtype=tf.int32)
    values = tf.pad(tensor, tf.stack([tf.zeros_like(after), after], axis=1), constant_values=value)
    values.set_shape([None if i == axis else size for i, size in enumerate(tensor.shape)])
    lengths = tf.fill(shape[: min(axis, 1)], shape[axis]) if lengths is None else tf.cast(lengths, tf.int32)
    return values, lengths, mask_of(tf, values, axis, lengths)


def mask_of(tf: Any, values: Any, axis: int, lengths: Any) -> Any:
    """The mask of real elements, of the shape of ``values`` up to and including ``axis``, by the lengths along it."""
    shape = tf.shape(values)[: axis + 1]
    mask = tf.sequence_mask(lengths, shape[axis])
    if axis > 1:
        mask = tf.reshape(mask, tf.concat([shape[:1], [1] * (axis - 1), shape[axis:]], 0))
        mask = tf.broadcast_to(mask, shape)
    mask.set_shape(values.shape[: axis + 1])
    return mask


def _to_tensor(tf: Any, flat: Any, splits: Any, shape: list[int | None], value: Any) -> Any:
    return tf.RaggedTensor.from_nested_row_splits(flat, splits, validate=False).to_tensor(value, shape=shape)


def _pad_nested(tf: Any, sequences: Any, options: arguments.Options) -> tuple[Any, Any, Any]:
    """Pad lists of lists of tensors in NumPy, which needs eager tensors."""
    remedy = "Pad them outside of the graph, or make a tf.RaggedTensor with tf.ragged.stack first."
    _check(tf.executing_eagerly(), "sequences", "nested lists of symbolic tensors", "one list", remedy)
    if any(tf.is_tensor(leaf) and leaf.dtype == tf.string for leaf in tf.nest.flatten(sequences)):
        _padding_value(tf, options.value, tf.string, None)
    batch = tf.nest.map_structure(lambda leaf: leaf.numpy() if tf.is_tensor(leaf) else leaf, sequences)
    values, lengths, mask = on_numpy.pad(batch, options)
    return tf.constant(values), tf.constant(lengths), None if mask is None else tf.constant(mask)


def _as_ragged(tf: Any, sequences: Any, wanted: list[int] | None) -> tuple[Any, list[int]]:
    """A RaggedTensor whose partitions reach to the last ragged axis, and the ragged axes of one sequence."""
    if isinstance(sequences, (list, tuple)):
        tensors = _as_tensors(tf, sequences)
        if not any(isinstance(tensor, tf.RaggedTensor) for tensor in tensors):
            return _join(tf, tensors, wanted)
        sequences = tf.ragged.stack(tensors)
    is_sparse, remedy = isinstance(sequences, tf.SparseTensor), "Write tf.RaggedTensor.from_sparse(...)."
    _check(not is_sparse, "sequences", "a SparseTensor", "a ragged or dense tensor", remedy, error=TypeError)
    rank = _rank(sequences) - 1
    _check(rank >= 1, "sequences", f"of shape {sequences.shape}", "a tensor [batch, length, ...]", _WRITE)
    if isinstance(sequences, tf.RaggedTensor):
        unknown = [axis for axis in range(1, sequences.ragged_rank) if sequences.shape[axis + 1] is None]
        axes = [0, *unknown] if wanted is None else arguments.resolve_axes(wanted, rank)
        missing = axes[-1] + 1 - sequences.ragged_rank
        flat = sequences.flat_values
        flat = tf.RaggedTensor.from_tensor(flat, ragged_rank=missing) if missing > 0 else flat
        ragged = sequences.with_flat_values(flat)
    else:
        axes = [0] if wanted is None else arguments.resolve_axes(wanted, rank)
        ragged = tf.RaggedTensor.from_tensor(sequences, ragged_rank=axes[-1] + 1)
    # rebuilt, since to_tensor fails on uniform partitions in a batch without rows
    return tf.RaggedTensor.from_nested_row_splits(ragged.flat_values, ragged.nested_row_splits, validate=False), axes


_WRITE = "Write tf.constant([[1, 2, 3]]) for one sequence."


def _rank(tensor: Any) -> int:
    _check(tensor.shape.rank is not None, "sequences", "of unknown rank", "a known one", "Use tf.ensure_shape.")
    return int(tensor.shape.rank)


def _as_tensors(tf: Any, given: Any) -> list[Any]:
    from distpad import precision  # imports TensorFlow

    dtype = next(item.dtype for item in given if tf.is_tensor(item))
    try:
        convert = functools.partial(precision.to_tensor, name="an item", dtype=dtype)
        tensors = [item if isinstance(item, tf.RaggedTensor) else convert(item) for item in given]
    except (TypeError, ValueError) as error:
        rule, remedy = f"tensors of one dtype, here {dtype.name}", "Convert them first."
        raise ValueError(errors.sentence("pad", "sequences", "a list", rule, str(error), remedy)) from None
    ranks = [_rank(tensor) for tensor in tensors]
    index = next((index for index, rank in enumerate(ranks) if rank != ranks[0]), 0)
    found = f"sequences[0] has rank {ranks[0]}, sequences[{index}] has rank {ranks[index]}."
    _check(not index, "sequences", "of several ranks", "one rank", found)
    _check(ranks[0], "sequences", "a list of scalar tensors", "a list of tensors [length, ...]", _WRITE)
    return tensors


def _join(tf: Any, tensors: list[Any], wanted: list[int] | None) -> tuple[Any, list[int]]:
    """Dense tensors ``[n_i, ...]`` as one RaggedTensor."""
    known = list(zip(*(tensor.shape.as_list() for tensor in tensors)))  # for each axis, all static sizes
    uneven = [axis for axis, sizes in enumerate(known) if axis and (None in sizes or len(set(sizes)) > 1)]
    axes = [0, *uneven] if wanted is None else arguments.resolve_axes(wanted, len(known))
    for axis in uneven:
        if axis not in axes and len(set(known[axis]) - {None}) > 1:
            raise arguments.uneven_axis(axis, f"Its sizes are {list(known[axis])}.", axes)
    # each of one sequence more, since tf.ragged.stack takes no other ragged tensors
    ragged = [tf.RaggedTensor.from_tensor(tensor[tf.newaxis], ragged_rank=axes[-1] + 1) for tensor in tensors]
    joined = tf.concat(ragged, axis=0)
    return tf.RaggedTensor.from_nested_row_splits(joined.flat_values, joined.nested_row_splits, validate=False), axes


def _check_even(tf: Any, ragged: Any, axes: list[int]) -> None:
    for axis in range(ragged.ragged_rank):
        if axis not in axes:
            sizes = ragged.row_lengths(axis + 1)
            sizes = sizes.flat_values if isinstance(sizes, tf.RaggedTensor) else sizes
            least, most = tf.reduce_min(sizes), tf.reduce_max(sizes)
            error = arguments.uneven_axis(axis, _between(tf, least, most), axes)
            _require(tf, least >= most, error, least, most)


def _lengths(tf: Any, ragged: Any, axis: int) -> Any:
    """The length of each sequence along ``axis`` of the batch: ``[batch]`` int32."""
    sizes = ragged.row_lengths(axis)
    if axis > 1:
        sizes = sizes.merge_dims(1, axis - 1) if axis > 2 else sizes
        least, most = tf.reduce_min(sizes, axis=1), tf.reduce_max(sizes, axis=1)  # extreme values for an empty sequence
        error = arguments.uneven_lengths(axis - 1, "It differs within a sequence.")
        _require(tf, tf.reduce_all(least >= most), error, least, most)
        sizes = tf.maximum(most, 0)
    return tf.cast(sizes, tf.int32)


def _check_lengths(tf: Any, lengths: Any, limit: int) -> None:
    if tf.executing_eagerly():
        arguments.check_lengths(lengths.numpy(), limit)
    else:
        remedy = "Give a larger length, or truncating='pre' or 'post' to cut sequences."
        error = ValueError(errors.sentence("pad", "length", limit, "at least the longest sequence's", remedy))
        first = tf.where(lengths > limit)[:1, 0]
        _require(tf, tf.reduce_all(lengths <= limit), error, "sequence", first, "has length", tf.gather(lengths, first))


def _between(tf: Any, least: Any, most: Any) -> str:
    return f"Its sizes go from {int(least)} to {int(most)}." if tf.executing_eagerly() else "Its sizes differ."


def _require(tf: Any, condition: Any, error: ValueError, *evidence: Any) -> None:
    """Raise ``error`` unless ``condition`` holds; a graph raises InvalidArgumentError when it runs."""
    if not tf.executing_eagerly():
        tf.debugging.Assert(condition, [str(error), *evidence])
    elif not bool(condition):
        raise error


def _cast(tf: Any, ragged: Any, wanted: Any) -> Any:
    try:
        dtype, flat = ragged.dtype if wanted is None else tf.as_dtype(wanted), ragged.flat_values
    except (TypeError, ValueError, RecursionError) as wrong:
        raise TypeError(errors.sentence("pad", "dtype", errors.shown(wanted), "a dtype of TensorFlow")) from wrong
    if dtype == ragged.dtype:
        return ragged
    remedy = "Give a dtype that can hold them, or convert them first."
    error = ValueError(errors.sentence("pad", "dtype", dtype.name, f"one for all {ragged.dtype.name} elements", remedy))
    if tf.string in (dtype, ragged.dtype):
        raise error
    if tf.executing_eagerly():
        if arguments.exact_cast(flat.numpy(), np.dtype(dtype.as_numpy_dtype)) is None:
            raise error
        return tf.cast(ragged, dtype)
    cast = tf.cast(flat, dtype)
    _require(tf, _survives(tf, flat, cast), error)
    return ragged.with_flat_values(cast)


def _survives(tf: Any, flat: Any, cast: Any) -> Any:
    """Whether a cast inside a graph changes no element; floats may be rounded but stay finite."""
    if cast.dtype.is_floating:
        finite = tf.math.is_finite(flat) if flat.dtype.is_floating else True
        return tf.reduce_all(tf.math.is_finite(cast) == finite)
    same = tf.reduce_all(tf.cast(cast, flat.dtype) == flat)
    if cast.dtype.is_integer and not (flat.dtype.is_complex or flat.dtype.is_bool):
        same &= tf.reduce_all((cast < 0) == (flat < 0))  # uint8 200 becomes int8 -56, and 200 again when cast back
    return same


def _padding_value(tf: Any, value: Any, dtype: Any, inner: tuple[int, ...] | None) -> Any:
    if tf.is_tensor(value) and not tf.executing_eagerly():
        _check(value.dtype == dtype, "value", f"of dtype {value.dtype.name}", f"of dtype {dtype.name}")
        return value
    array = arguments.as_value(value)
    if dtype != tf.string:
        return tf.constant(arguments.padding_value(array, np.dtype(dtype.as_numpy_dtype), inner))
    is_text = all(isinstance(leaf, (str, bytes)) for leaf in array.astype(object).flat)
    _check(is_text, "value", errors.shown(value), "a string, as the elements are", "Write value=''.")
    return tf.constant(arguments.padding_value(array.astype(object), np.dtype(object), inner), tf.string)


def _move_back(tf: Any, padded: Any, lengths: Any, axis: int) -> Any:
    """Pre-pad a post-padded tensor along ``axis``."""
    longest = tf.shape(padded)[axis]
    indices = (tf.range(longest) - (longest - lengths)[:, tf.newaxis]) % longest
    return tf.gather(padded, indices, axis=axis, batch_dims=1)


def unpad(tf: Any, values: Any, lengths: Any, mask: Any) -> Any:
    """The sequences of a padded batch as a RaggedTensor."""
    from distpad import precision  # imports TensorFlow

    is_dense, kind = not isinstance(values, (tf.RaggedTensor, tf.SparseTensor)), type(values).__name__
    evidence = f"A {kind} has no padding."
    errors.require("unpad", is_dense, "values", f"a {kind}", "a dense tensor", evidence, error=TypeError)
    values = precision.to_tensor(values, "unpad: values")
    if tf.executing_eagerly():
        on_numpy.check_padded(tuple(values.shape), lengths, mask)
    lengths = None if lengths is None else tf.cast(lengths, tf.int64)
    if mask is None:
        return tf.RaggedTensor.from_tensor(values, lengths=lengths)
    mask = precision.to_tensor(mask, "unpad: mask", tf.bool)
    _rank(mask)
    parts = on_numpy.windows(tf.experimental.numpy, mask, lengths)
    sizes = [tf.reduce_sum(tf.cast(window, tf.int64), axis=-1) for window in parts]
    splits = [sizes[0], *(tf.boolean_mask(size, window) for size, window in zip(sizes[1:], parts))]
    return tf.RaggedTensor.from_nested_row_lengths(tf.boolean_mask(values, mask), splits, validate=False)
