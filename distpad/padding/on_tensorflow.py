"""Padding in TensorFlow operations: every input becomes a RaggedTensor, so that graphs and gradients work.

The caller passes ``tf``: this module never imports TensorFlow.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distpad import errors
from distpad.padding import arguments, on_numpy, unpadding


def pad(tf: Any, sequences: Any, options: arguments.Options) -> tuple[Any, Any, Any]:
    """Pad tensors to ``(values, lengths, mask)``, as ``distpad.pad`` describes it."""
    if isinstance(sequences, (list, tuple)) and not any(tf.is_tensor(item) for item in sequences):
        return _pad_nested(tf, sequences, options)
    ragged, axes = _as_ragged(tf, sequences, options.ragged_axes)
    first, last = axes[0] + 1, axes[-1] + 1  # among the axes of the batch
    lengths = _lengths(tf, ragged, first)
    if options.length is not None:
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
    if not tf.executing_eagerly():
        remedy = "Pad them outside of the graph, or make a tf.RaggedTensor with tf.ragged.stack first."
        raise ValueError(errors.sentence("pad", "sequences", "nested lists of symbolic tensors", "one list", remedy))
    texts: list[bool] = []

    def arrays(item: Any) -> Any:
        if isinstance(item, (list, tuple)):
            return [arrays(child) for child in item]
        if tf.is_tensor(item):
            texts.append(item.dtype == tf.string)
        return item.numpy() if tf.is_tensor(item) else item

    batch = arrays(sequences)
    if any(texts):
        _padding_value(tf, options.value, tf.string, None)
    values, lengths, mask = on_numpy.pad(batch, options)
    return tf.constant(values), tf.constant(lengths), None if mask is None else tf.constant(mask)


def _as_ragged(tf: Any, sequences: Any, wanted: list[int] | None) -> tuple[Any, list[int]]:
    """A RaggedTensor whose partitions reach to the last ragged axis, and the ragged axes of one sequence."""
    if isinstance(sequences, (list, tuple)):
        tensors = _as_tensors(tf, sequences)
        if not any(isinstance(tensor, tf.RaggedTensor) for tensor in tensors):
            return _join(tf, tensors, wanted)
        sequences = tf.ragged.stack(tensors)
    if isinstance(sequences, tf.SparseTensor):
        remedy = "Write tf.RaggedTensor.from_sparse(...)."
        raise TypeError(errors.sentence("pad", "sequences", "a SparseTensor", "a ragged or dense tensor", remedy))
    rank = _rank(sequences) - 1
    if rank < 1:
        rule = "a tensor [batch, length, ...]"
        raise ValueError(errors.sentence("pad", "sequences", f"of shape {sequences.shape}", rule, _WRITE))
    if not isinstance(sequences, tf.RaggedTensor):
        axes = [0] if wanted is None else arguments.resolve_axes(wanted, rank)
        return _split(tf, tf.convert_to_tensor(sequences), axes[-1] + 1), axes
    unknown = [axis for axis in range(1, sequences.ragged_rank) if sequences.shape[axis + 1] is None]
    axes = [0, *unknown] if wanted is None else arguments.resolve_axes(wanted, rank)
    flat, missing = sequences.flat_values, axes[-1] + 1 - sequences.ragged_rank
    flat = _split(tf, flat, missing) if missing > 0 else flat
    # rebuilt, since to_tensor fails on uniform partitions in a batch without rows
    return tf.RaggedTensor.from_nested_row_splits(flat, sequences.nested_row_splits, validate=False), axes


_WRITE = "Write tf.constant([[1, 2, 3]]) for one sequence."


def _rank(tensor: Any) -> int:
    if tensor.shape.rank is None:
        raise ValueError(errors.sentence("pad", "sequences", "of unknown rank", "a known one", "Use tf.ensure_shape."))
    return int(tensor.shape.rank)


def _as_tensors(tf: Any, sequences: Any) -> list[Any]:
    dtype = next(item.dtype for item in sequences if tf.is_tensor(item))
    try:
        tensors = [
            item if isinstance(item, tf.RaggedTensor) else tf.convert_to_tensor(item, dtype) for item in sequences
        ]
    except (TypeError, ValueError) as error:
        rule = f"tensors of one dtype, here {dtype.name}"
        raise ValueError(
            errors.sentence("pad", "sequences", "a list", rule, str(error), "Convert them first.")
        ) from None
    ranks = [_rank(tensor) for tensor in tensors]
    index = next((index for index, rank in enumerate(ranks) if rank != ranks[0]), None)
    if index is not None:
        found = f"sequences[0] has rank {ranks[0]}, sequences[{index}] has rank {ranks[index]}."
        raise ValueError(errors.sentence("pad", "sequences", "of several ranks", "one rank", found))
    if not ranks[0]:
        rule = "a list of tensors [length, ...]"
        raise ValueError(errors.sentence("pad", "sequences", "a list of scalar tensors", rule, _WRITE))
    return tensors


def _join(tf: Any, tensors: list[Any], wanted: list[int] | None) -> tuple[Any, list[int]]:
    """Dense tensors ``[n_i, ...]`` as one RaggedTensor."""
    known = list(zip(*(tensor.shape.as_list() for tensor in tensors)))  # for each axis, all static sizes
    uneven = [axis for axis, sizes in enumerate(known) if axis and (None in sizes or len(set(sizes)) > 1)]
    axes = [0, *uneven] if wanted is None else arguments.resolve_axes(wanted, len(known))
    for axis in uneven:
        if axis not in axes and len(set(known[axis]) - {None}) > 1:
            raise arguments.uneven_axis(axis, f"Its sizes are {list(known[axis])}.", axes)
    depth = axes[-1] + 1
    shapes = tf.stack([tf.shape(tensor, tf.int64)[:depth] for tensor in tensors])
    rows = [tf.reduce_prod(shapes[:, :axis], axis=1) for axis in range(depth)]
    lengths = [tf.repeat(shapes[:, axis], rows[axis]) for axis in range(depth)]
    flat = tf.concat([_merge(tf, tensor, depth) for tensor in tensors], axis=0)
    return tf.RaggedTensor.from_nested_row_lengths(flat, lengths, validate=False), axes


def _split(tf: Any, tensor: Any, depth: int) -> Any:
    """A dense tensor as a RaggedTensor of ``depth`` partitions."""
    shape = tf.shape(tensor, tf.int64)
    lengths = [tf.fill([tf.reduce_prod(shape[: axis + 1])], shape[axis + 1]) for axis in range(depth)]
    return tf.RaggedTensor.from_nested_row_lengths(_merge(tf, tensor, depth + 1), lengths, validate=False)


def _merge(tf: Any, tensor: Any, axes: int) -> Any:
    """Merge the first ``axes`` axes. A reshape to -1 would fail if an axis has size zero."""
    shape = tf.shape(tensor, tf.int64)
    merged = tf.reshape(tensor, tf.concat([tf.reduce_prod(shape[:axes], keepdims=True), shape[axes:]], axis=0))
    merged.set_shape([None, *tensor.shape[axes:]])
    return merged


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
    if wanted is None or tf.as_dtype(wanted) == ragged.dtype:
        return ragged
    dtype, flat = tf.as_dtype(wanted), ragged.flat_values
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
        if value.dtype != dtype:
            raise ValueError(errors.sentence("pad", "value", f"of dtype {value.dtype.name}", f"of dtype {dtype.name}"))
        return value
    array = arguments.as_value(value)
    if dtype != tf.string:
        return tf.constant(arguments.padding_value(array, np.dtype(dtype.as_numpy_dtype), inner))
    if not all(isinstance(leaf, (str, bytes)) for leaf in array.astype(object).flat):
        raise ValueError(
            errors.sentence("pad", "value", repr(value), "a string, as the elements are", "Write value=''.")
        )
    return tf.constant(arguments.padding_value(array.astype(object), np.dtype(object), inner), tf.string)


def _move_back(tf: Any, padded: Any, lengths: Any, axis: int) -> Any:
    """Pre-pad a post-padded tensor along ``axis``."""
    longest = tf.shape(padded)[axis]
    indices = (tf.range(longest) - (longest - lengths)[:, tf.newaxis]) % longest
    return tf.gather(padded, indices, axis=axis, batch_dims=1)


def unpad(tf: Any, values: Any, lengths: Any, mask: Any) -> Any:
    """The sequences of a padded batch as a RaggedTensor."""
    if isinstance(values, (tf.RaggedTensor, tf.SparseTensor)):
        kind = type(values).__name__
        raise TypeError(errors.sentence("unpad", "values", f"a {kind}", "a dense tensor", f"A {kind} has no padding."))
    values = tf.convert_to_tensor(values)
    if tf.executing_eagerly():
        unpadding.check_padded(tuple(values.shape), lengths, mask)
    lengths = None if lengths is None else tf.cast(lengths, tf.int64)
    if mask is None:
        return tf.RaggedTensor.from_tensor(values, lengths=lengths)
    mask = tf.convert_to_tensor(mask, tf.bool)
    depth = _rank(mask) - 1
    shown = [tf.reduce_any(mask, axis=list(range(axis + 1, depth + 1))) for axis in range(1, depth)]
    windows = [*(_spans(tf, real) for real in shown), mask]
    if lengths is not None and depth > 1:
        windows[0] = _windows(tf, shown[0], lengths)
    sizes = [tf.reduce_sum(tf.cast(window, tf.int64), axis=-1) for window in windows]
    partitions = [sizes[0], *(tf.boolean_mask(size, window) for size, window in zip(sizes[1:], windows))]
    return tf.RaggedTensor.from_nested_row_lengths(tf.boolean_mask(values, mask), partitions, validate=False)


def _spans(tf: Any, shown: Any) -> Any:
    """True from the first to the last true of the last axis."""
    counts = tf.cast(shown, tf.int32)
    return (tf.cumsum(counts, axis=-1) > 0) & (tf.cumsum(counts, axis=-1, reverse=True) > 0)


def _windows(tf: Any, shown: Any, lengths: Any) -> Any:
    """True on the first or on the last ``lengths`` indices of axis 1; if neither matches the mask, its spans."""
    padded = tf.shape(shown, tf.int64)[1]
    indices, row = tf.range(padded), lengths[:, tf.newaxis]
    window = _spans(tf, shown)
    for candidate in (indices >= padded - row, indices < row):  # the last match wins: post-padded
        matches = tf.reduce_all(candidate | ~shown) & tf.reduce_all(lengths <= padded)
        window = tf.where(matches, candidate, window)
    return window
