"""Columns against tf.RaggedTensor, and the fast paths of pad against the path that looks at each sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import drawn
from distpad.padding import columns, pad, reading
from padding_oracle import as_lists

tf = pytest.importorskip("tensorflow")


def column_of(examples: list, axes: int, inner: tuple[int, ...] = ()) -> columns.Column:
    """Nested lists of integers, element by element; each element stands for a tensor of shape ``inner``."""
    splits = []
    for _ in range(axes):
        splits.append(np.cumsum([0, *map(len, examples)]))
        examples = [child for each in examples for child in each]
    flat = np.array(examples, np.int64).reshape([-1, *[1] * len(inner)])
    return columns.Column(np.broadcast_to(flat, [len(examples), *inner]).copy(), tuple(splits))


def as_ragged(column: columns.Column) -> Any:
    return tf.RaggedTensor.from_nested_row_splits(column.values, column.splits)


def nests(axes: int) -> st.SearchStrategy:
    element: st.SearchStrategy = st.integers(1, 9)
    for _ in range(axes):
        element = st.lists(element, max_size=4)
    return st.lists(element, min_size=1, max_size=5)


drawn_columns = st.integers(1, 3).flatmap(
    lambda axes: st.tuples(nests(axes), st.just(axes), st.sampled_from([(), (2,), (2, 3)]))
)


@drawn.examples(200)
@given(drawn_columns, st.integers(-9, 9), st.data())
def test_columns_equal_ragged_tensors(given_column: tuple, value: int, data: Any) -> None:
    column = column_of(*given_column)
    ragged, count = as_ragged(column), column.num_examples
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    indices = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=6)), np.int64)
    joined = columns.concatenate([column.between(begin, end), column.take(indices)])
    for found, expected in (
        (column, ragged),
        (column.between(begin, end), ragged[begin:end]),
        (column.take(indices), tf.gather(ragged, indices)),
        (joined, tf.concat([ragged[begin:end], tf.gather(ragged, indices)], axis=0)),
    ):
        assert found.num_examples == expected.shape[0]
        longest = expected.bounding_shape().numpy()
        sizes = [int(size) for size in longest[1 : len(column.splits) + 1]]
        if found.num_examples:
            np.testing.assert_array_equal(found.sizes().max(axis=0), sizes)
        shape = [found.num_examples, *(size + 1 for size in sizes)]  # wider than the longest
        batch = columns.blank(shape[0], [*shape[1:], *column.values.shape[1:]], value, np.dtype(np.int64))
        columns.fill(batch, found)
        np.testing.assert_array_equal(batch, expected.to_tensor(value, shape=[*shape, *column.values.shape[1:]]))
        ones = expected.with_flat_values(tf.ones([len(expected.flat_values)], tf.bool))
        np.testing.assert_array_equal(columns.mask(found, shape), ones.to_tensor(False, shape=shape))


@drawn.examples(200)
@given(drawn_columns, st.integers(0, 3))
def test_cutting_moving_and_examples(given_column: tuple, limit: int) -> None:
    examples, axes, inner = given_column
    column = column_of(*given_column)
    begins = np.array([max(len(each) - limit, 0) for each in examples])
    cut = [each[begin:] for each, begin in zip(examples, begins)]
    assert as_ragged(column.cut(0, begins, limit)).to_list() == as_ragged(column_of(cut, axes, inner)).to_list()
    if axes > 1:
        moved = [[[]] * (5 - len(each)) + each for each in examples]
        assert as_ragged(column.moved_to_end(0, 5)).to_list() == as_ragged(column_of(moved, axes, inner)).to_list()
    for index, each in enumerate(as_ragged(column).to_list()):
        found = column.example(index)
        assert (found.tolist() if isinstance(found, np.ndarray) else _plain(found)) == each or not np.size(each)


def _plain(item: Any) -> Any:
    return [_plain(each) for each in item] if isinstance(item, list) else item.tolist()


@drawn.examples(100)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=1, max_size=4), st.integers(0, 2), st.booleans())
def test_arrays_and_their_end(sizes: list, axes: int, at_end: bool) -> None:
    kept = [(size[0], 2)[:2] if axes == 1 else size if axes == 2 else (2, 3) for size in sizes]
    arrays = [np.arange(1, 1 + np.prod(size) * 2).reshape(*size, 2) for size in kept]
    column = columns.of_arrays(arrays, axes)
    shape = [len(arrays), *(max(size[axis] for size in kept) + 1 if axis < axes else kept[0][axis] for axis in (0, 1))]
    batch = columns.blank(shape[0], [*shape[1:], 2], 0, np.dtype(np.int64))
    columns.fill(batch, column, at_end=at_end)
    for row, array in zip(batch, arrays):
        expected = np.zeros(row.shape, np.int64)
        box = [slice(size) for size in array.shape]
        if at_end and axes:
            box[axes - 1] = slice(shape[axes] - array.shape[axes - 1], shape[axes])
        expected[tuple(box)] = array
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("length", [3, 500])  # placed by their mask, and one by one
@pytest.mark.parametrize("at_end", [False, True])
def test_rows_are_placed(length: int, at_end: bool) -> None:
    rows = [np.arange(1, 1 + size) for size in (0, length, 1)]
    batch, lengths = np.zeros([3, length], np.int64), np.array([0, length, 1])
    columns.place(batch, rows, lengths, at_end=at_end)
    assert batch.sum(axis=1).tolist() == [0, rows[1].sum(), 1]
    assert [np.trim_zeros(row).tolist() for row in batch] == [row.tolist() for row in rows]
    assert batch[2, -1 if at_end else 0] == 1


def test_rows_of_several_dtypes_keep_their_elements() -> None:
    large = 2**62 + 1  # which float64, the common dtype of both rows, does not hold
    padded = pad([np.array([large]), np.array([1, 2], np.uint64)], dtype=np.int64)
    assert padded.values.tolist() == [[large, 0], [1, 2]]


def images(inner: tuple[int, ...]) -> list:
    random = np.random.default_rng(0)
    return [random.integers(1, 9, [*random.integers(1, 5, 2), *inner]) for _ in range(6)]


FAST: dict[str, Any] = {
    "arrays": [np.arange(1, 1 + size) for size in (3, 0, 5)],
    "arrays of vectors": [np.ones([size, 2], np.float32) for size in (3, 0, 5)],
    "images": images((3,)),
    "an array": np.arange(24).reshape(2, 3, 4),
    "lists of images": [images(()), images(())[:2], []],
    "integers": [[1, 2, 3], [], (4, -5)],
    "large integers": [[1, 2**31, -(2**63)], [5]],
    "floats": [[1.0, float("nan")], [], [0.5]],
    "bools": [[True], [False, True]],
    "numbers": [[1, 2.5], [True]],
    "bools and integers": [[1, True], [False]],
    "lists of vectors": [[[1, 0], [0, 1]], [[1, 0]]],
    "ragged lists": [[[1, 2], []], [[3]], []],
    "ragged lists of vectors": [[[[1, 0]], [[0, 1], [1, 1]]], [[[1, 0]]]],
}
OPTIONS: list[dict] = [
    {},
    {"padding": "pre", "value": 7},
    {"length": 2, "truncating": "pre"},
    {"length": 2, "truncating": "post", "padding": "pre", "dtype": "float32"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FAST)
def test_the_fast_path_equals_the_slow_one(monkeypatch: pytest.MonkeyPatch, name: str, options: dict) -> None:
    assert reading.read_regular([*FAST[name]]) is not None
    options = {**options, "value": True} if name == "bools" and "value" in options else options
    fast = pad(FAST[name], **options)
    monkeypatch.setattr(reading, "read_regular", lambda sequences: None)
    slow = pad(FAST[name], **options)
    assert fast.values.dtype == slow.values.dtype and fast.values.shape == slow.values.shape
    assert repr(as_lists(fast)) == repr(as_lists(slow))  # NaN equals NaN


@pytest.mark.parametrize(
    "batch",
    [
        [[1, "a"]],
        [[1, None]],
        [[1, np.int32(2)]],
        [[1.0, np.int32(2)]],  # marshal writes both in as many bytes
        [[1, True, True, True, True, True, np.bool_(True)]],
        [[np.float64(1)]],
        [[2**53 + 1, 0.5]],
        [[2**64]],
        [["a"]],
        [[1], [[1]]],
        [[1], np.ones(2)],
        [np.ones(2), np.ones(2, np.int8)],
        [np.ones(2), np.ones([2, 2])],
        [np.ones(2), None],
        [1, 2],
        [[], []],
        [np.array(["a"])],
        [np.array([None])],
    ],
)
def test_other_batches_take_the_slow_path(batch: list) -> None:
    assert reading.read_regular(batch) is None
