"""Columns: a data set in memory gives the same batches as a list of its examples, whatever its values are kept in."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from test_readers import EXAMPLES, assert_same, leaves

import distpad

ROWS = [[1, 2, 3], [], [4], [5, 6]]
RAGGED = tf.ragged.constant(ROWS, dtype=tf.int64)
NESTED = [[[1, 2], [3]], [[4]], [], [[5], [], [6, 7]]]


def made(source, size=2, padding=None, **options):
    options = {
        "padding": padding or {"y": distpad.Pad()},
        "tokens": "y",
        "buckets": None,
        "backend": "local",
        **options,
    }
    return distpad.PaddedBatches(source, size, **options)


KINDS = {
    "a RaggedTensor": RAGGED,
    "lists": ROWS,
    "arrays": [np.array(row, np.int64) for row in ROWS],
    "an array of arrays": np.array([np.array(row, np.int64) for row in ROWS], object),
    "pyarrow, int64": pa.array(ROWS),
    "pyarrow, large lists": pa.array(ROWS, pa.large_list(pa.int64())),
    "pyarrow, a slice": pa.array([[9], *ROWS, [9]]).slice(1, 4),
    "pyarrow, chunks": pa.chunked_array([pa.array(ROWS[:1]), pa.array(ROWS[1:])]),
    "pyarrow, chunks of slices": pa.chunked_array([pa.array([[9], *ROWS]).slice(1, 2), pa.array(ROWS[2:])]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sequences(kind):
    columns = distpad.Columns({"y": KINDS[kind]})
    assert len(columns) == 4
    assert [example["y"].tolist() for example in columns] == ROWS and columns[-1]["y"].tolist() == ROWS[-1]
    wanted = leaves(made([{"y": np.array(row, np.int64)} for row in ROWS]))
    assert_same(leaves(made(columns)), wanted)
    sampler = distpad.LengthSampler([len(row) for row in ROWS], global_batch_size=2, shuffle=False)
    assert_same(leaves(made((columns, sampler), None)), leaves(made(([{"y": row} for row in ROWS], sampler), None)))


@pytest.mark.parametrize("values", [NESTED, tf.ragged.constant(NESTED, dtype=tf.int64), pa.array(NESTED)])
def test_rows_of_different_sizes_within_an_example(values):
    (batch,) = made(distpad.Columns({"y": values}), 4, {"y": distpad.Pad((0, 1))})
    assert (batch.data["y"].numpy() == tf.ragged.constant(NESTED).to_tensor().numpy()).all()
    assert float(batch.counts.tokens) == 7


@pytest.mark.parametrize(
    ("values", "dtype", "shape"),
    [
        (np.arange(8, dtype=np.float32).reshape(4, 2), tf.float32, [2]),
        (tf.zeros([4, 3], tf.bfloat16), tf.bfloat16, [3]),
        ([1, 2, 3, 4], tf.int64, []),
        ([1, 2.5, 3, 4], tf.float64, []),
        (["a", b"b\0", "", "d"], tf.string, []),
        (np.array(["a", "bc", "", "d"]), tf.string, []),
        (pa.array(["a", "bc", "", "d"]), tf.string, []),
        (pa.array([True, False, True, True]), tf.bool, []),
        (pa.array([[1, 2]] * 4, pa.list_(pa.int8(), 2)), tf.int8, [2]),
        ([np.ones([2, 3], np.uint8)] * 4, tf.uint8, [2, 3]),
    ],
)
def test_dense_features(values, dtype, shape):
    batches = list(made(distpad.Columns({"y": RAGGED, "x": values})))
    assert {batch.data["x"].dtype for batch in batches} == {dtype}
    assert [batch.data["x"].shape[1:].as_list() for batch in batches] == [shape] * 2


def test_a_batch_does_not_change_with_the_data():
    values = np.arange(4.0)
    batches = iter(made(distpad.Columns({"y": RAGGED, "x": values})))
    first = next(batches)
    values[:] = 9
    assert first.data["x"].numpy().tolist() == [0.0, 1.0]


def test_memory_mapped_rows_are_not_read_at_once(tmp_path):
    np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(4, 5))[:] = np.arange(5)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    columns = distpad.Columns({"y": RAGGED, "x": mapped})
    assert np.shares_memory(columns.take(np.arange(4)).columns[1].values, mapped) is False  # its rows are copied
    (batch,) = made(columns, 4)
    assert (batch.data["x"].numpy() == mapped).all()
    (batch,) = made(mapped, 4, {0: distpad.Pad()}, tokens=0)  # an array is a source too
    assert batch.data.shape == (4, 5) and batch.lengths[0].numpy().tolist() == [5] * 4


def test_a_pyarrow_table_and_no_copy_of_it():
    table = pa.table({"y": ROWS, "id": [1, 2, 3, 4]})
    columns = distpad.Columns(table)
    (batch,) = made(columns, 4)
    assert batch.data["id"].numpy().tolist() == [1, 2, 3, 4]
    taken = columns.take(np.arange(4)).columns[1].values
    assert np.shares_memory(taken, table["y"].chunk(0).values.to_numpy())


@pytest.mark.parametrize(
    ("data", "kind", "match"),
    [
        ({"y": ROWS, "x": [1]}, ValueError, r"number of examples is \{'x': 1, 'y': 4\}, expected the same"),
        ({}, ValueError, "data is {}, expected at least one feature"),
        ({"y": 3}, TypeError, "'y' is a int, expected an array"),
        ({"y": np.array(3)}, TypeError, "'y' is a scalar, expected an array with an axis of examples"),
        ({"y": pa.array([[1], None])}, ValueError, "'y' is missing in example 1"),
        ({"y": pa.array([[1], [2, None]])}, ValueError, "'y' is missing in example"),
        ({"y": [[1], ["a"]]}, ValueError, "example 1 is of dtype object, expected int64"),
        ({"y": [[1], None]}, TypeError, "Columns: 'y' of example 1 is of NoneType"),
        ({"y": [(1, 2), (3,)]}, TypeError, "'y' is a list with a tuple, expected a list of arrays"),
        ([{"y": [1, 2]}, {"y": [1]}], TypeError, "a list with a dict, .* PaddedBatches takes examples"),
        ({"y": ROWS, "a": [[1], [True]]}, ValueError, "Columns: 'a' of example 1 is of dtype bool"),
    ],
)
def test_wrong_data_is_named(data, kind, match):
    with pytest.raises(kind, match=match):
        distpad.Columns(data)
    with pytest.raises(IndexError, match="index is 4, expected from 0 to 3"):
        distpad.Columns({"y": ROWS})[4]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), max_size=9), st.integers(1, 4), st.integers(1, 3),
    st.sampled_from(["uint8", "float32", "int64"]),
)  # fmt: skip
def test_random_images(sizes, size, window, dtype):
    images = [np.ones([h, w, 2], dtype) * (i + 1) for i, (h, w) in enumerate(sizes)]
    padding = {"y": distpad.Pad((0, 1), value=7)}
    wanted = list(made([{"y": image} for image in images], size, padding, lookahead=window))
    found = list(made(distpad.Columns({"y": images}), size, padding, lookahead=window)) if images else []
    assert len(found) == len(wanted)
    for one, other in zip(leaves(found), leaves(wanted)):
        assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(one, other))


@pytest.mark.one_stack
def test_grains_data_sets_are_read_as_they_are():
    grain = pytest.importorskip("grain", reason="grain needs a newer protobuf than TensorFlow 2.15")
    padding = {"y": distpad.Pad(value=-1), "image": distpad.Pad((0, 1))}
    wanted = leaves(made(EXAMPLES, 4, padding))
    data = grain.MapDataset.source(EXAMPLES)
    for source in (data, data.map(lambda example: example), data.to_iter_dataset()):
        assert_same(leaves(made(source, 4, padding)), wanted)
    assert_same(leaves(made(data, 4, padding, num_parallel_reads=4)), wanted)
    sampler = distpad.LengthSampler([len(example["y"]) for example in EXAMPLES], global_batch_size=4)
    assert_same(leaves(made((data, sampler), None, padding)), leaves(made((EXAMPLES, sampler), None, padding)))
    (shuffled,) = made(data.shuffle(seed=1), len(EXAMPLES), padding)  # a lazy permutation
    assert sorted(shuffled.lengths["y"].numpy()) == sorted(len(example["y"]) for example in EXAMPLES)
