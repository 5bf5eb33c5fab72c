"""Columns: a data set in memory that is read by columns."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.data import chunks, structure
from distpad.data.schema import Features, Pad
from distpad.padding import columns
from distpad.padding.columns import Column

_NAME = "Columns"


class Columns:
    """A data set in memory, a source of ``PaddedBatches`` that is read without Python's work for each example.

    It is an indexable of examples too: ``len(data)``, ``data[i]`` and iteration.

    Args:
      data: a mapping from features to their values in all examples (or a tuple, a nest or a single feature; a pyarrow
        ``Table``). Values are an array or tensor ``[examples, ...]``, a ``tf.RaggedTensor``, a list of arrays, of
        (nested) lists, of numbers or of strings, or a pyarrow ``Array`` or ``ChunkedArray``. Arrays, ragged tensors and
        pyarrow's arrays of one chunk are not copied: do not change them while they are read.

    Raises:
      ValueError: features with different numbers of examples; none; rows of a list that differ in rank or dtype;
        missing values of pyarrow.
      TypeError: neither an array nor a list.

    >>> data = Columns({"x": np.array([[1.0, 2.0], [3.0, 4.0]]), "y": tf.ragged.constant([[1, 2, 3], [4]])})
    >>> len(data), data[1]["y"].tolist()
    (2, [4])
    >>> import distpad
    >>> batches = distpad.PaddedBatches(data, 2, padding={"y": Pad()}, tokens="y", buckets=None)
    >>> [batch.data["y"].numpy().tolist() for batch in batches]
    [[[1, 2, 3], [4, 0, 0]]]
    """

    def __init__(self, data: Any) -> None:
        if hasattr(data, "column_names") and not isinstance(data, Mapping):
            data = {name: data[name] for name in data.column_names}
        self._skeleton = structure.skeleton_of(data)
        names = structure.names_of(self._skeleton)
        if not names:  # the text of all data takes long
            raise ValueError(errors.sentence(_NAME, "data", errors.shown(data), "at least one feature"))
        self._columns = [_column(name, each) for name, each in zip(names, structure.leaves_of(data, self._skeleton))]
        counts = {name: column.num_examples for name, column in zip(names, self._columns)}
        are_equal = len({*counts.values()}) == 1
        errors.require(_NAME, are_equal, "the number of examples", counts, "the same for all features")
        self._length = counts[names[0]]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(errors.sentence(_NAME, "index", index, f"from 0 to {len(self) - 1}"))
        leaves = [column.example(index % len(self)) for column in self._columns]
        return structure.packed(self._skeleton, dict(zip(structure.names_of(self._skeleton), leaves)))

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))

    def take(self, indices: np.ndarray) -> chunks.Chunk:
        """The examples of these indices by columns."""
        begin, count = int(indices[0]) if len(indices) else 0, len(indices)
        for column in self._columns:
            if not column.splits:  # a broadcast array may be larger than the memory
                errors.check_memory("a batch of a feature", [count, *column.values.shape[1:]], column.values.dtype)
        if (indices == np.arange(begin, begin + count)).all():
            found = [column.between(begin, begin + count) for column in self._columns]
            # a batch may hold the values of dense features themselves
            found = [column if column.splits else Column(column.values.copy()) for column in found]
        else:
            found = [column.take(indices) for column in self._columns]
        return chunks.Chunk(self._skeleton, found)


def _column(name: Any, given: Any) -> Column:
    """The values of one feature as a column. Raises: ValueError, TypeError."""
    if type(given).__module__.split(".")[0] == "pyarrow":
        return _of_arrow(name, given)
    if isinstance(given, (tf.RaggedTensor, tf.compat.v1.ragged.RaggedTensorValue)):
        splits = tuple(np.asarray(each, np.int64) for each in given.nested_row_splits)
        return Column(np.asarray(given.flat_values), splits)
    if isinstance(given, tf.SparseTensor):
        given = tf.sparse.to_dense(given)
    rule = "one without masked elements"
    errors.require(_NAME, not np.ma.is_masked(given), errors.shown(name), "a masked array", rule)
    if tf.is_tensor(given) or (isinstance(given, np.ndarray) and given.dtype != object):
        array = np.asarray(given)
        rule = "an array with an axis of examples"
        errors.require(_NAME, array.ndim, errors.shown(name), "a scalar", rule, error=TypeError)
        return Column(array.astype(object) if array.dtype.kind in "US" else array)
    if hasattr(given, "to_numpy"):  # of pandas
        given = given.to_numpy()
    found, kinds = f"a {type(given).__name__}", "an array, a tensor, a RaggedTensor or a list"
    errors.require(_NAME, isinstance(given, (list, np.ndarray)), errors.shown(name), found, kinds, error=TypeError)
    return _of_list(name, [*given])


def _of_list(name: Any, items: list[Any]) -> Column:
    """The column of a list of examples. Raises: ValueError, TypeError."""
    if not items:
        return Column(np.zeros([0, 0]))
    wrong = next((item for item in items if isinstance(item, (tuple, Mapping))), None)
    if wrong is not None:
        found, rule = f"a list with a {type(wrong).__name__}", "a list of arrays, lists, numbers or strings"
        remedy = "Columns takes a mapping from features to the values of all examples; PaddedBatches takes examples."
        raise TypeError(errors.sentence(_NAME, errors.shown(name), found, rule, remedy))
    try:
        return _of_rows(name, items)
    except (ValueError, TypeError) as error:  # of an example of one feature, which has the name 0
        message = str(error).replace("PaddedBatches: 0 ", f"{_NAME}: {name!r} ", 1)
        raise type(error)(message) from error


def _of_rows(name: Any, items: list[Any]) -> Column:
    try:
        features = Features.learn(items, {}, guess=True)
    except ValueError:
        if not all(isinstance(item, list) for item in items):
            raise
        inner = _of_list(name, [*itertools.chain.from_iterable(items)])  # rows of different sizes within an example
        return Column(inner.values, (columns.offsets([*map(len, items)]), *inner.splits))
    assert features is not None, "it was guessed"
    shape = features.features[0].shape  # of the first example
    if shape:
        features = Features.learn(items, {0: Pad(tuple(range(len(shape))))}, guess=True)
        assert features is not None, "it was learned before"
    (column,) = chunks.columns_of(features, items, np.arange(len(items)))
    while column.splits and (stacked := column.stacked(shape[len(column.splits) - 1] or 0)):  # the same in all examples
        column = stacked
    return column


def _of_arrow(name: Any, given: Any) -> Column:
    """The column of a pyarrow array, without a copy of numbers in one chunk. Raises: ValueError."""
    import pyarrow as pa

    if given.null_count:
        at = given.is_null().to_pylist().index(True)
        raise ValueError(
            errors.sentence(_NAME, errors.shown(name), f"missing in example {at}", "a value in each example")
        )
    if isinstance(given, pa.ChunkedArray):
        if given.num_chunks > 1:
            return columns.concatenate([_of_arrow(name, chunk) for chunk in given.chunks])
        given = given.chunk(0) if given.num_chunks else pa.array([], given.type)
    kind = given.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        splits = given.offsets.to_numpy().astype(np.int64)
        inner = _of_arrow(name, given.values.slice(splits[0], splits[-1] - splits[0]))
        return Column(inner.values, (splits, *inner.splits))
    if pa.types.is_fixed_size_list(kind):
        inner = _of_arrow(name, given.flatten())
        return Column(inner.values, (np.arange(len(given) + 1) * kind.list_size, *inner.splits))
    if pa.types.is_primitive(kind) and not pa.types.is_temporal(kind):
        return Column(given.to_numpy(zero_copy_only=False))
    return _of_list(name, given.to_pylist())
