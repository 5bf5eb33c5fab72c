"""Padding in NumPy: read the batch, compute the padded shape, and copy each sequence."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np

from distpad.padding import arguments, columns, reading

_Arrays = tuple[np.ndarray, np.ndarray, Optional[np.ndarray]]


def pad(sequences: Any, options: arguments.Options) -> _Arrays:
    """Pad arrays and nested lists to ``(values, lengths, mask)``, as ``distpad.pad`` describes it."""
    if not len(sequences):  # an array without rows has a known shape
        known = isinstance(sequences, np.ndarray) and sequences.dtype != object and sequences.ndim > 1
        one: Any = np.zeros((1, *sequences.shape[1:]), sequences.dtype) if known else [[]]
        values, lengths, mask = pad(one, options._replace(truncating="post"))
        return values[:0], lengths[:0], None if mask is None else mask[:0]
    options = options._replace(value=arguments.as_value(options.value))
    rows, dtype = reading.read(sequences, options)
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
        column = columns.Column(values[:0], columns.splits_of(rows, last + 1) if options.mask else ())
    else:
        splits = rows.splits[: last + 1]
        column = columns.Column(rows.values.reshape((int(splits[last][-1]), *values.shape[last + 2 :])), splits)
    if at_end and first < last and column.splits:
        column, at_end = column.moved_to_end(first, shape[first + 1]), False
    if not isinstance(rows, list):
        columns.fill(values, column, at_end=at_end)
    return columns.mask(column, shape, at_end=at_end) if options.mask else None
