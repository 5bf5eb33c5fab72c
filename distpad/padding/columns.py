"""Columns: the arrays of many examples in one array, as in a ``tf.RaggedTensor``; and the copies that pad them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from distpad import errors
from distpad.padding import memory

_SHORT = 192  # rows of at most this padded length are placed by their mask, longer rows one by one


class Column(NamedTuple):
    """One feature of several examples.

    Attributes:
      values: ``[elements, *inner]``, the elements of all examples, one example after the other.
      splits: int64, one array for each partitioned axis of an example: row i of an axis holds the rows from
        ``splits[i]`` to ``splits[i + 1]`` of the next axis, or of ``values``, counted from ``splits[0]``. Empty: an
        example is one element.
    """

    values: np.ndarray
    splits: tuple[np.ndarray, ...] = ()

    @property
    def num_examples(self) -> int:
        """The number of examples."""
        return len(self.splits[0]) - 1 if self.splits else len(self.values)

    def bounds(self) -> list[np.ndarray]:
        """Where the rows of each example begin, on each partitioned axis and in the values: ``[examples + 1]`` each."""
        found = [np.arange(self.num_examples + 1)]
        for splits in self.splits:
            found.append(splits[found[-1]] - splits[0])
        return found

    def between(self, begin: int, end: int) -> Column:
        """Examples ``begin`` to ``end``, without a copy."""
        splits = []
        for each in self.splits:
            splits.append(each[begin : end + 1])
            begin, end = int(each[begin] - each[0]), int(each[end] - each[0])
        return Column(self.values[begin:end], tuple(splits))

    def take(self, indices: np.ndarray) -> Column:
        """The examples of these indices, copied."""
        at, splits = np.asarray(indices), []
        for each in self.splits:
            lengths = each[at + 1] - each[at]
            splits.append(offsets(lengths))
            at = _ranges(each[at] - each[0], lengths)
        return Column(self.values[at], tuple(splits))

    def cut(self, axis: int, begins: np.ndarray, limit: int) -> Column:
        """Copy at most ``limit`` rows along ``axis``, from row ``begins[i]`` in example i on."""
        each = self.splits[axis]
        skipped = np.minimum(np.repeat(begins, lengths_of(self.bounds()[axis])), lengths_of(each))
        lengths = np.minimum(lengths_of(each) - skipped, limit)
        inner = Column(self.values, self.splits[axis + 1 :]).take(_ranges(each[:-1] - each[0] + skipped, lengths))
        return Column(inner.values, (*self.splits[:axis], offsets(lengths), *inner.splits))

    def moved_to_end(self, axis: int, size: int) -> Column:
        """Put empty rows before those along ``axis``, up to ``size`` rows. Not for the last partitioned axis."""
        lengths = lengths_of(self.splits[axis])
        inner = np.zeros([len(lengths), size], np.int64)
        inner[real(lengths, size, at_end=True)] = lengths_of(self.splits[axis + 1])
        moved = np.arange(len(lengths) + 1) * size, offsets(inner.reshape(-1))
        return Column(self.values, (*self.splits[:axis], *moved, *self.splits[axis + 2 :]))

    def partitioned(self, axes: int) -> Column:
        """The column with at least so many partitioned axes."""
        values, splits = self
        while len(splits) < axes:
            rows, size, *inner = values.shape
            values, splits = values.reshape(rows * size, *inner), (*splits, np.arange(rows + 1) * size)
        return Column(values, splits)

    def stacked(self, size: int) -> Column | None:
        """The column whose last partitioned axis is dense, of this size; None if a row has another size."""
        if (lengths_of(self.splits[-1]) != size).any():
            return None
        shape = len(self.splits[-1]) - 1, size, *self.values.shape[1:]
        return Column(self.values.reshape(shape), self.splits[:-1])

    def sizes(self, function: np.ufunc = np.maximum) -> np.ndarray:
        """The largest size, or another ``function``, of each axis in each example, 0 without: ``[examples, axes]``."""
        if len(self.splits) == 1:
            return lengths_of(self.splits[0])[:, np.newaxis]
        found = np.zeros([self.num_examples, len(self.splits)], np.int64)
        for axis, (splits, bounds) in enumerate(zip(self.splits, self.bounds())):
            filled = np.flatnonzero(lengths_of(bounds))  # reduceat has no empty segments
            if len(filled):
                found[filled, axis] = function.reduceat(lengths_of(splits), bounds[filled])
        return found

    def is_rectangular(self) -> bool:
        """Whether each example is an array: its axes have one size within the example."""
        return len(self.splits) < 2 or bool((self.sizes(np.minimum) == self.sizes()).all())

    def example(self, index: int) -> Any:
        """One example: an array, or lists of arrays if the example is not rectangular."""
        one = self.between(index, index + 1)
        if not one.splits:
            return one.values[0]
        if one.is_rectangular():
            return one.values.reshape((*one.sizes()[0].tolist(), *one.values.shape[1:]))
        inner = Column(one.values, one.splits[1:])
        return [inner.example(i) for i in range(inner.num_examples)]


def lengths_of(splits: np.ndarray) -> np.ndarray:
    """The lengths of the rows of these splits; ``np.diff`` takes five times as long."""
    found: np.ndarray = splits[1:] - splits[:-1]
    return found


def offsets(lengths: Any) -> np.ndarray:
    """The splits of rows of these lengths, int64."""
    found = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=found[1:])
    return found


def split(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Views of rows of these lengths."""
    bounds = offsets(lengths).tolist()
    return [*map(values.__getitem__, map(slice, bounds, bounds[1:]))]


def of_arrays(arrays: Sequence[np.ndarray], axes: int) -> Column:
    """Concatenate arrays whose first ``axes`` axes are ragged. ValueError for other axes that differ."""
    errors.check_memory("the examples", [sum(each.size for each in arrays)], arrays[0].dtype)  # broadcast arrays
    if not axes:
        return Column(np.stack(arrays))
    flat = arrays
    if axes > 1:
        flat = [each.reshape((-1, *each.shape[axes:]) if each.size else (0, *each.shape[axes:])) for each in arrays]
    return Column(np.concatenate(flat), splits_of(arrays, axes))


def splits_of(arrays: Sequence[np.ndarray], axes: int) -> tuple[np.ndarray, ...]:
    """The splits of a column of arrays whose first ``axes`` axes are ragged."""
    if axes == 1:
        return (offsets([*map(len, arrays)]),)
    shapes = np.array([array.shape[:axes] for array in arrays], np.int64)
    rows = np.cumprod([np.ones(len(arrays), np.int64), *shapes.T[:-1]], axis=0)
    return tuple(offsets(np.repeat(sizes, each)) for sizes, each in zip(shapes.T, rows))


def concatenate(columns: Sequence[Column]) -> Column:
    """The examples of several columns."""
    if len(columns) == 1:
        return columns[0]
    lengths = zip(*(map(lengths_of, column.splits) for column in columns))
    return Column(
        np.concatenate([column.values for column in columns]),
        tuple(offsets(np.concatenate(each)) for each in lengths),
    )


def blank(rows: int, shape: Iterable[int], value: Any, dtype: np.dtype) -> np.ndarray:
    """A batch of padding."""
    shape = (rows, *shape)
    is_zero = not np.ndim(value) and dtype.kind in "biuf" and value == 0 and not np.signbit(value)
    batch = memory.empty(shape, dtype, zeros=is_zero)
    if not is_zero:
        np.copyto(batch, value, casting="unsafe")  # as np.full, which Keras uses
    return batch


def real(lengths: np.ndarray, size: int, *, at_end: bool = False) -> np.ndarray:
    """The mask ``[rows, size]`` of rows whose real elements stand at the beginning, or at the end."""
    kind = np.int16 if size < 2**15 else np.int64  # comparisons of narrow integers are several times as fast
    lengths = lengths.astype(kind)[:, np.newaxis]
    positions = np.arange(size, dtype=kind)
    return positions >= size - lengths if at_end else positions < lengths


def place(batch: np.ndarray, rows: Sequence[Any], lengths: np.ndarray, *, at_end: bool = False) -> None:
    """Copy each row to the beginning, or to the end, of its row in ``batch``, ``[rows, size, *inner]``."""
    if batch.ndim == 2 and batch.shape[1] <= _SHORT and len(rows):
        flat = np.concatenate(rows, dtype=batch.dtype, casting="unsafe")
        batch[real(lengths, batch.shape[1], at_end=at_end)] = flat
        return
    flat = batch.reshape((len(batch) * batch.shape[1], *batch.shape[2:]))
    begins = np.arange(len(batch)) * batch.shape[1]
    if at_end:
        begins += batch.shape[1] - lengths
    for at, row in zip(map(slice, begins.tolist(), (begins + lengths).tolist()), rows):
        flat[at] = row


def place_arrays(batch: np.ndarray, arrays: Iterable[np.ndarray], end_axis: int | None = None) -> None:
    """Copy each array to the beginning of its row in ``batch``, but to the end of the row's ``end_axis``."""
    for row, array in zip(batch, arrays):
        box = [*map(slice, array.shape)]
        if end_axis is not None:
            box[end_axis] = slice(row.shape[end_axis] - array.shape[end_axis], None)
        row[tuple(box)] = array


def fill(batch: np.ndarray, column: Column, *, at_end: bool = False) -> None:
    """Copy the examples of a column to the first rows of ``batch``, ``[rows, *sizes, *inner]``.

    Args:
      at_end: whether elements stand at the end of the last partitioned axis, instead of at its beginning.
    """
    batch, axes = batch[: column.num_examples], len(column.splits)
    if not axes:
        batch[...] = column.values
    elif axes > 1 and column.is_rectangular():
        flat, shapes = split(column.values, lengths_of(column.bounds()[-1])), column.sizes().tolist()
        inner = column.values.shape[1:]
        arrays = (row.reshape((*shape, *inner)) for row, shape in zip(flat, shapes))
        place_arrays(batch, arrays, axes - 1 if at_end else None)
    else:
        lengths = _lengths_of_rows(column, batch.shape[: axes + 1])
        rows = batch.reshape((len(lengths), *batch.shape[axes:]))
        if batch.ndim == axes + 1 and batch.shape[axes] <= _SHORT:  # as in place
            rows[real(lengths, batch.shape[axes], at_end=at_end)] = column.values
        else:
            place(rows, split(column.values, lengths), lengths, at_end=at_end)


def mask(column: Column, shape: Sequence[int], *, at_end: bool = False) -> np.ndarray:
    """The mask ``[examples, *sizes]`` of the real elements in a batch of this shape, as ``fill`` places them."""
    return real(_lengths_of_rows(column, shape), shape[-1], at_end=at_end).reshape(shape)


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The integers from ``begins[i]`` to ``begins[i] + lengths[i]``, for all i one after the other."""
    splits = offsets(lengths)
    return np.repeat(begins - splits[:-1], lengths) + np.arange(splits[-1])


def _lengths_of_rows(column: Column, shape: Sequence[int]) -> np.ndarray:
    """The lengths along the last partitioned axis of all rows of a batch ``[examples, *sizes]``, 0 for padded rows."""
    if len(column.splits) == 1:
        return lengths_of(column.splits[0])
    rows = np.arange(column.num_examples)
    for splits, size in itertools.islice(zip(column.splits, shape[1:]), len(column.splits) - 1):
        lengths = lengths_of(splits)
        positions = np.arange(lengths.sum()) - np.repeat(splits[:-1] - splits[0], lengths)
        rows = np.repeat(rows * size, lengths) + positions
    found = np.zeros(int(np.prod(shape[:-1])), np.int64)
    found[rows] = lengths_of(column.splits[-1])
    return found
