"""Columns: the arrays of many examples in one array, as in a ``tf.RaggedTensor``; and the copies that pad them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

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
            begins, lengths = each[at] - each[0], each[at + 1] - each[at]
            splits.append(offsets(lengths))
            at = np.repeat(begins - splits[-1][:-1], lengths) + np.arange(splits[-1][-1])
        return Column(self.values[at], tuple(splits))

    def sizes(self) -> np.ndarray:
        """The largest size of each partitioned axis in each example, ``[examples, axes]`` int64."""
        if len(self.splits) == 1:
            return np.diff(self.splits[0])[:, np.newaxis]
        return self._reduced(np.maximum)

    def is_rectangular(self) -> bool:
        """Whether each example is an array: its axes have one size within the example."""
        return len(self.splits) < 2 or bool((self._reduced(np.minimum) == self._reduced(np.maximum)).all())

    def _reduced(self, function: Any) -> np.ndarray:
        found = np.zeros([self.num_examples, len(self.splits)], np.int64)
        for axis, (splits, bounds) in enumerate(zip(self.splits, self.bounds())):
            filled = np.flatnonzero(np.diff(bounds))  # reduceat has no empty segments
            if len(filled):
                found[filled, axis] = function.reduceat(np.diff(splits), bounds[filled])
        return found

    def example(self, index: int) -> Any:
        """One example: an array, or lists of arrays if the example is not rectangular."""
        one = self.between(index, index + 1)
        if not one.splits:
            return one.values[0]
        if one.is_rectangular():
            return one.values.reshape((*one.sizes()[0].tolist(), *one.values.shape[1:]))
        inner = Column(one.values, one.splits[1:])
        return [inner.example(i) for i in range(inner.num_examples)]


def offsets(lengths: Any) -> np.ndarray:
    """The splits of rows of these lengths, int64."""
    found = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=found[1:])
    return found


def of_arrays(arrays: Sequence[np.ndarray], axes: int) -> Column:
    """Concatenate arrays whose first ``axes`` axes are ragged. ValueError for other axes that differ."""
    if not axes:
        return Column(np.stack(arrays))
    if axes == 1:
        return Column(np.concatenate(arrays), (offsets([*map(len, arrays)]),))
    shapes = np.array([array.shape[:axes] for array in arrays], np.int64)
    rows = np.ones(len(arrays), np.int64)
    splits = []
    for sizes in shapes.T:
        splits.append(offsets(np.repeat(sizes, rows)))
        rows = rows * sizes
    flat = [array.reshape((-1, *array.shape[axes:]) if array.size else (0, *array.shape[axes:])) for array in arrays]
    return Column(np.concatenate(flat), tuple(splits))


def concatenate(columns: Sequence[Column]) -> Column:
    """The examples of several columns."""
    if len(columns) == 1:
        return columns[0]
    lengths = zip(*(map(np.diff, column.splits) for column in columns))
    return Column(
        np.concatenate([column.values for column in columns]),
        tuple(offsets(np.concatenate(each)) for each in lengths),
    )


def blank(rows: int, shape: Iterable[int], value: Any, dtype: np.dtype) -> np.ndarray:
    """A batch of padding."""
    shape = (rows, *shape)
    if np.ndim(value) == 0 and dtype.kind in "biuf" and value == 0 and not np.signbit(value):
        return memory.zeros(shape, dtype)
    batch = memory.zeros(shape, dtype)
    batch[...] = value
    return batch


def real(lengths: np.ndarray, size: int, *, at_end: bool = False) -> np.ndarray:
    """The mask ``[rows, size]`` of rows whose real elements stand at the beginning, or at the end."""
    kind = np.int16 if size < 2**15 else np.int64  # comparisons of narrow integers are several times as fast
    lengths = lengths.astype(kind)[:, np.newaxis]
    positions = np.arange(size, dtype=kind)
    return positions >= size - lengths if at_end else positions < lengths


def place(batch: np.ndarray, rows: Sequence[Any], lengths: np.ndarray, *, at_end: bool = False) -> None:
    """Copy each row to the beginning, or to the end, of its row in ``batch``, ``[rows, size, *inner]``."""
    flat = batch.reshape((-1, *batch.shape[2:]))
    begins = np.arange(len(batch)) * batch.shape[1]
    if at_end:
        begins += batch.shape[1] - lengths
    for begin, end, row in zip(begins.tolist(), (begins + lengths).tolist(), rows):
        flat[begin:end] = row


def fill(batch: np.ndarray, column: Column, *, at_end: bool = False) -> None:
    """Copy the examples of a column to the first rows of ``batch``, ``[rows, *sizes, *inner]``.

    Args:
      at_end: whether elements stand at the end of the last partitioned axis, instead of at its beginning.
    """
    batch, axes = batch[: column.num_examples], len(column.splits)
    if not axes:
        batch[...] = column.values
    elif axes > 1 and column.is_rectangular():
        bounds, sizes = column.bounds()[-1].tolist(), column.sizes().tolist()
        for row, begin, end, size in zip(batch, bounds, bounds[1:], sizes):
            row[tuple(map(slice, size))] = column.values[begin:end].reshape((*size, *column.values.shape[1:]))
    else:
        lengths = _lengths_of_rows(column, batch.shape[: axes + 1])
        rows = batch.reshape((len(lengths), *batch.shape[axes:]))
        if batch.shape[axes] <= _SHORT and batch.ndim == axes + 1:
            rows[real(lengths, batch.shape[axes], at_end=at_end)] = column.values
            return
        bounds = offsets(lengths).tolist()
        place(rows, [*map(column.values.__getitem__, map(slice, bounds, bounds[1:]))], lengths, at_end=at_end)


def mask(column: Column, shape: Sequence[int]) -> np.ndarray:
    """The mask ``[examples, *sizes]`` of the real elements in a batch of this shape."""
    return real(_lengths_of_rows(column, shape), shape[-1]).reshape(shape)


def _lengths_of_rows(column: Column, shape: Sequence[int]) -> np.ndarray:
    """The lengths along the last partitioned axis of all rows of a batch ``[examples, *sizes]``, 0 for padded rows."""
    if len(column.splits) == 1:
        return np.diff(column.splits[0])
    rows = np.arange(column.num_examples)
    for splits, size in itertools.islice(zip(column.splits, shape[1:]), len(column.splits) - 1):
        lengths = np.diff(splits)
        positions = np.arange(lengths.sum()) - np.repeat(splits[:-1] - splits[0], lengths)
        rows = np.repeat(rows * size, lengths) + positions
    found = np.zeros(int(np.prod(shape[:-1])), np.int64)
    found[rows] = np.diff(column.splits[-1])
    return found
