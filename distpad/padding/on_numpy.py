"""Padding in NumPy: read the batch, compute the padded shape, and copy each sequence; and the inverse."""

from __future__ import annotations

import functools
from typing import Any, Optional

import numpy as np

from distpad import errors
from distpad.padding import arguments, columns, reading

_require = functools.partial(errors.require, "unpad")
_Arrays = tuple[np.ndarray, np.ndarray, Optional[np.ndarray]]


def pad(sequences: Any, options: arguments.Options) -> _Arrays:
    """Pad arrays and nested lists to ``(values, lengths, mask)``, as ``distpad.pad`` describes it."""
    sequences = sequences if isinstance(sequences, np.ndarray) else [*iter(sequences)]  # lengths may be wrong
    if not len(sequences):  # an array without rows has a known shape
        known = isinstance(sequences, np.ndarray) and sequences.dtype != object and sequences.ndim > 1
        one: Any = np.zeros((1, *sequences.shape[1:]), sequences.dtype) if known else [[]]
        values, lengths, mask = pad(one, options._replace(truncating="post"))
        return values[:0], lengths[:0], None if mask is None else mask[:0]
    options = options._replace(value=arguments.as_value(options.value))
    rows, dtype = reading.read([*sequences], options)
    sizes = _sizes(rows)
    wanted = None if options.ragged_axes is None else arguments.resolve_axes(options.ragged_axes, len(sizes))
    first = wanted[0] if wanted else 0
    lengths = _lengths(rows, sizes, first)
    if options.truncating == "error":
        arguments.check_lengths(lengths, options.length)
    elif options.length is not None and (lengths > options.length).any():
        rows = _cut(rows, first, np.maximum(lengths - options.length, 0), options)
        sizes = _sizes(rows, sizes)
        lengths = np.minimum(lengths, options.length)
    axes = _ragged_axes(rows, sizes, wanted)
    shape = [int(each.max(initial=0)) for each in sizes]
    shape[first] = int(lengths.max()) if options.length is None else options.length
    value = arguments.padding_value(options.value, dtype, tuple(shape[axes[-1] + 1 :]))
    values = columns.blank(len(sequences), shape, value, dtype)
    mask = _fill(values, rows, sizes, axes, options)
    return values, lengths.astype(np.int32), mask


def _sizes(rows: reading.Rows, before: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """The sizes of all rows of each axis; where cutting left no row, that of before if it was one."""
    if isinstance(rows, list):
        if rows[0].ndim == 1:
            return [np.array([*map(len, rows)])]
        return [*np.array([array.shape for array in rows]).T]
    found = [*map(np.diff, rows.splits)]
    for axis, sizes in enumerate(before or ()):
        if not len(found[axis]) and len(sizes) and (sizes == sizes[0]).all():
            found[axis] = sizes[:1]
    return found


def _lengths(rows: reading.Rows, sizes: list[np.ndarray], axis: int) -> np.ndarray:
    """The length of each sequence along ``axis``, 0 if it has no such axis: ``[batch]``."""
    if axis == 0 or isinstance(rows, list):
        return sizes[axis]
    least, most = rows.sizes(np.minimum)[:, axis], rows.sizes()[:, axis]
    uneven = np.flatnonzero(least < most)
    if len(uneven):
        index = uneven[0]
        raise arguments.uneven_lengths(axis, f"In sequences[{index}] it is {least[index]} and {most[index]}.")
    return most


def _cut(rows: reading.Rows, axis: int, longer: np.ndarray, options: arguments.Options) -> reading.Rows:
    """Cut the sequences to ``options.length`` along ``axis``; they are ``longer`` by so much."""
    limit = int(options.length or 0)
    begins = longer if options.truncating == "pre" else np.zeros_like(longer)
    if not isinstance(rows, list):
        return rows.cut(axis, begins, limit)
    kept = ((*[slice(None)] * axis, slice(begin, begin + limit)) for begin in begins.tolist())
    return [array[each] for array, each in zip(rows, kept)]


def _ragged_axes(rows: reading.Rows, sizes: list[np.ndarray], wanted: list[int] | None) -> list[int]:
    """The ragged axes of a sequence: found in the data, or ``wanted``. ValueError if another axis is uneven."""
    uneven = [axis for axis, each in enumerate(sizes) if len(each) and each.min() < each.max()]
    if wanted is None:
        return sorted({0, *uneven})
    for axis in uneven:
        if axis not in wanted:
            begins = np.arange(len(rows) + 1) if isinstance(rows, list) else rows.bounds()[axis]
            found = [
                (at, np.searchsorted(begins, at, "right") - 1) for at in (sizes[axis].argmin(), sizes[axis].argmax())
            ]
            evidence = " and ".join(f"{sizes[axis][at]} in sequences[{owner}]" for at, owner in found)
            raise arguments.uneven_axis(axis, f"Its size is {evidence}.", wanted)
    return wanted


def _fill(
    values: np.ndarray, rows: reading.Rows, sizes: list[np.ndarray], axes: list[int], options: arguments.Options
) -> np.ndarray | None:
    """Copy the rows into ``values``; return the mask, or None without ``options.mask``."""
    first, last, at_end = axes[0], axes[-1], options.padding == "pre"
    shape = values.shape[: last + 2]
    if isinstance(rows, list) and last == 0:
        columns.place(values, rows, sizes[0], at_end=at_end)
        return columns.real(sizes[0], shape[1], at_end=at_end) if options.mask else None
    if isinstance(rows, list):
        columns.place_arrays(values, rows, first if at_end else None)
        return _box_mask(sizes, shape, first if at_end else None) if options.mask else None
    splits = rows.splits[: last + 1]
    column = columns.Column(rows.values.reshape((int(splits[last][-1]), *values.shape[last + 2 :])), splits)
    if at_end and first < last:
        column, at_end = column.moved_to_end(first, shape[first + 1]), False
    columns.fill(values, column, at_end=at_end)
    return columns.mask(column, shape, at_end=at_end) if options.mask else None


def _box_mask(sizes: list[np.ndarray], shape: tuple[int, ...], axis_at_end: int | None) -> np.ndarray:
    """The mask of rectangular sequences, such as images: along most axes it is broadcast."""
    mask, axes = np.ones([1] * len(shape), bool), range(len(shape) - 1)
    for axis in axes:
        if (sizes[axis] < shape[1 + axis]).any():
            real = columns.real(sizes[axis], shape[1 + axis], at_end=axis == axis_at_end)
            mask = mask & np.expand_dims(real, [1 + other for other in axes if other != axis])
    return np.broadcast_to(mask, shape).copy()


def check_padded(shape: tuple[int, ...], lengths: Any, mask: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return lengths and mask as arrays. Raises if they do not match values of ``shape`` or contradict each other."""
    _require(len(shape) >= 2, "values", f"of shape {shape}", "[batch, length, ...]")
    if lengths is not None:
        lengths = np.asarray(lengths)
        is_integer = lengths.dtype.kind in "iu" or not lengths.size
        _require(is_integer, "lengths", f"of dtype {lengths.dtype}", "integers", error=TypeError)
        _require(lengths.shape == shape[:1], "lengths", f"of shape {lengths.shape}", f"of shape {shape[:1]}")
    if mask is not None:
        mask = np.asarray(mask)
        remedy = "Write mask.astype(bool)."
        _require(mask.dtype == bool, "mask", f"of dtype {mask.dtype}", "bool", remedy, error=TypeError)
        rule = f"of the first two or more axes of values, {shape}"
        _require(mask.ndim > 1 and mask.shape == shape[: mask.ndim], "mask", f"of shape {mask.shape}", rule)
    if lengths is not None:
        _check_lengths(shape, lengths, mask)
    return lengths, mask


def _check_lengths(shape: tuple[int, ...], lengths: np.ndarray, mask: np.ndarray | None) -> None:
    """Check that, along at least one axis, lengths lie between the length in the mask and the padded size."""
    least = [np.zeros(1, np.int64)]
    if mask is not None:
        others = [tuple(other for other in range(1, mask.ndim) if other != axis) for axis in range(1, mask.ndim)]
        least = [mask.any(axis=axes).sum(axis=1) for axes in others]
    valid = [(low <= lengths) & (lengths <= most) for low, most in zip(least, shape[1:])]
    if mask is not None and mask.ndim == 2:
        valid = [least[0] == lengths]
    if not any(each.all() for each in valid):
        index = int(np.flatnonzero(~valid[0])[0])
        rule = f"from 0 to {shape[1]}" if mask is None else f"{least[0][index]}, as in the mask"
        _require(False, f"lengths[{index}]", lengths[index], rule)


def unpad(values: np.ndarray, lengths: np.ndarray | None, mask: np.ndarray | None) -> list[Any]:
    """Return the sequences of a padded batch, with lengths and mask from ``check_padded``."""
    if mask is None:
        assert lengths is not None
        return [row[:length].copy() for row, length in zip(values, lengths)]
    parts = windows(np, mask, lengths)
    sizes = [window.sum(axis=-1) for window in parts]
    splits = [sizes[0], *(size[window] for size, window in zip(sizes[1:], parts))]
    column = columns.Column(values[mask], tuple(map(columns.offsets, splits)))
    return [column.example(index) for index in range(len(values))]


def windows(xp: Any, mask: Any, lengths: Any) -> list[Any]:
    """For each axis of a sequence, which indices along it belong to the sequence: ``[batch, ..., size]`` each.

    Args:
      xp: NumPy, or TensorFlow's functions of the same names.
    """
    axes = len(mask.shape)
    shown = [xp.any(mask, axis=tuple(range(axis + 1, axes))) for axis in range(1, axes - 1)]
    found = [*(_span(xp, each) for each in shown), mask]
    if lengths is not None and shown:
        # the first or the last ``lengths`` indices of axis 1; if neither matches the mask, its span
        before = xp.cumsum(xp.where(shown[0], 1, 1), axis=1)
        padded, rows = before[:, -1:], lengths[:, np.newaxis]
        for candidate in (padded - before < rows, before <= rows):  # the last match wins: post-padded
            matches = xp.all(candidate | ~shown[0]) & xp.all(rows <= padded)
            found[0] = xp.where(matches, candidate, found[0])
    return found


def _span(xp: Any, shown: Any) -> Any:
    """True from the first to the last true of the last axis."""
    numbers = xp.where(shown, 1, 0)
    before = xp.cumsum(numbers, axis=-1)
    return (before > 0) & (before - numbers < before[..., -1:])
