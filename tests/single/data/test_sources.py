"""Sources of PaddedBatches, and the structure of their examples."""

from __future__ import annotations

import sys
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf

import distpad
from distpad.data.schema import Features

PADDING = {"y": distpad.Pad()}
BOTH = {"x": distpad.Pad(), "y": distpad.Pad()}


def made(source, size=2, **options):
    return distpad.PaddedBatches(source, size, **{"padding": PADDING, "tokens": "y", "buckets": None, **options})


# -- kinds of sources -------------------------------------------------------------------------------------------------


class MapStyle:
    """A data set without ``__iter__``, as in many libraries: an index after the end raises KeyError."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise KeyError(index)
        return {"y": np.arange(index + 1)}


def test_a_map_style_object_is_read_in_order():
    batches = made(MapStyle(5))
    for _ in range(2):
        epoch = list(batches)
        assert [batch.lengths["y"].numpy().tolist() for batch in epoch] == [[1, 2], [3, 4], [5, 0]]
    assert len(batches) == 3


class DataFrame:
    """The part of pandas.DataFrame that the pipeline uses. Iterating it yields the names of its columns."""

    def __init__(self, columns):
        self.of = columns
        self.columns = list(columns)

    def __iter__(self):
        return iter(self.columns)

    def __len__(self):
        return len(self.of[self.columns[0]])

    def __getitem__(self, name):
        return types.SimpleNamespace(to_numpy=lambda: self.of[name])


@pytest.mark.parametrize("sampled", [False, True])
def test_a_data_frame_yields_its_rows(monkeypatch, sampled):
    texts = np.array([[1, 2, 3], [4], [5, 6]], object)
    columns = {"y": texts, "w": np.array([0.5, 2.0, 1.0], np.float32), "name": np.array(["a", "b", "c"], object)}
    try:
        from pandas import DataFrame as Frame
    except ImportError:
        Frame = DataFrame
        monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=DataFrame))
    source: Any = Frame(columns)
    if sampled:
        source = source, distpad.LengthSampler([3, 1, 2], global_batch_size=2, shuffle=False)
    first, second = made(source, None if sampled else 2, weights="w")
    assert first.data["y"].numpy().tolist() == [[1, 2, 3], [4, 0, 0]]
    assert first.data["name"].numpy().tolist() == [b"a", b"b"] and first.data["w"].dtype == tf.float32
    assert float(first.counts.tokens) == 0.5 * 3 + 2.0 and float(second.counts.tokens) == 2.0


class Pair(NamedTuple):
    y: Any
    extra: Any


class Outer(NamedTuple):
    z_first: Any
    a_second: Any


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_named_tuples_keep_their_class(kind):
    examples = [Pair(np.arange(n), (np.float32(n), {"k": np.int32(n)})) for n in (3, 1)]
    source: Any = examples
    if kind == "dataset":
        spec = Pair(
            tf.TensorSpec([None], tf.int64), (tf.TensorSpec([], tf.float32), {"k": tf.TensorSpec([], tf.int32)})
        )
        source = tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=spec)
    (batch,) = made(source)
    assert type(batch.data) is Pair and batch.data.y.numpy().tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.data.extra[0].numpy().tolist() == [3.0, 1.0] and batch.data.extra[1]["k"].numpy().tolist() == [3, 1]
    assert batch.lengths["y"].numpy().tolist() == [3, 1]


def test_fields_keep_their_order_and_a_worker_without_examples_makes_a_similar_class():
    features = Features.learn([Outer([1, 2], Pair([3], 4))], {"z_first": distpad.Pad()}, guess=True)
    assert features.names == ["z_first", "a_second/y", "a_second/extra"]
    text = features.to_text().replace("test_sources:", "a_module_of_the_other_worker:")
    packed = Features.from_text(text, {"z_first": distpad.Pad()}).pack(["a", "b", "c"])
    assert (packed.z_first, packed.a_second.y, packed.a_second.extra) == ("a", "b", "c")
    assert type(packed).__name__ == "Outer" and type(packed) is not Outer
    assert type(features.pack(["a", "b", "c"])) is Outer


# -- Python's numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [([1.5], [1]), ([1], [1.5]), ([], [2], [0.5], [3])])
def test_integers_among_floats_in_lists_become_floats(values):
    (batch,) = made([{"y": value} for value in values], len(values))
    assert batch.data["y"].dtype == tf.float64
    assert [row[:n].tolist() for row, n in zip(batch.data["y"].numpy(), batch.lengths["y"])] == [[*v] for v in values]


def test_scalars_become_floats_also_in_a_later_epoch():
    batches = made([{"y": [1], "s": 2}, {"y": [2], "s": 0.5}])
    assert [[batch.data["s"].numpy().tolist() for batch in batches] for _ in range(2)] == [[[2.0, 0.5]]] * 2


def test_a_later_batch_that_would_change_the_dtype_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"'y' of example 1 is of dtype float64, expected int64.* Write 1\.0 for 1"):
        list(made([{"y": [1]}, {"y": [1.5]}], 1))
    with pytest.raises(ValueError, match=r"'y' of example 1 is of dtype int64, expected float64.* Cast one of them"):
        list(made([{"y": np.array([1.5])}, {"y": np.array([1])}], 1))


# -- batches instead of examples --------------------------------------------------------------------------------------


def singles(count=23, fixed=None):
    random = np.random.default_rng(0)
    for i in range(count):
        n = fixed or int(random.integers(1, 6))
        yield {"x": np.ones([n, 2], np.float32), "y": np.arange(n), "id": np.int64(i)}


SPEC = {"x": tf.TensorSpec([None, 2]), "y": tf.TensorSpec([None], tf.int64), "id": tf.TensorSpec([], tf.int64)}


def dataset(**options):
    return tf.data.Dataset.from_generator(lambda: singles(**options), output_signature=SPEC)


@pytest.mark.parametrize(
    "batched",
    [
        lambda d: d.padded_batch(4),
        lambda d: d.padded_batch(4).prefetch(2),
        lambda d: d.padded_batch(4, drop_remainder=True).map(lambda e: e),
        lambda d: d.padded_batch(12),
        lambda d: d.take(5).padded_batch(4),
    ],
)
def test_batches_are_refused(batched):
    with pytest.raises(ValueError, match=r"whose elements hold \d+ rows of every feature.*dataset\.unbatch\(\)"):
        list(made(batched(dataset()), padding=BOTH))
    unbatched = made(dataset().padded_batch(4).unbatch(), padding=BOTH)
    assert sum(int(batch.rows) for batch in unbatched) == 23


def test_examples_of_equal_length_are_accepted():
    assert len(list(made(dataset(fixed=4), padding=BOTH))) == 12
    pairs = tf.data.Dataset.from_tensor_slices((np.ones([6, 5, 3]), np.ones([6, 5], np.int64)))
    assert len(list(made(pairs, padding={0: distpad.Pad(), 1: distpad.Pad()}, tokens=1))) == 3
    series = tf.data.Dataset.from_tensor_slices({"x": np.ones([6, 5, 3]), "y": np.ones([6, 5, 1])})
    assert len(list(made(series, padding=BOTH))) == 3
    one = tf.data.Dataset.from_tensors({"x": np.ones([3, 4]), "y": np.ones([3, 4])})
    assert len(list(made(one))) == 1


# -- names of nested features -----------------------------------------------------------------------------------------


def test_keys_of_lengths_keep_their_type():
    nested = [(([1, 2], [3.0]), [4, 5, 6]), (([1], [2.0, 3.0]), [7])]
    padding = dict.fromkeys(["0/0", "0/1", 1], distpad.Pad())
    (batch,) = made(nested, padding=padding, tokens=1)
    assert set(batch.lengths) == {"0/0", "0/1", 1} and batch.lengths[1].numpy().tolist() == [3, 1]
    assert {type(key) is str or isinstance(key, int) for key in batch.lengths} == {True}
    tf.nest.map_structure(lambda leaf: leaf.shape, batch)  # sorts the keys
    (batch,) = made([[1, 2], [3]], padding={0: distpad.Pad()}, tokens=0)
    assert [*batch.lengths] == [0] and isinstance(next(iter(batch.lengths)), int)


@pytest.mark.parametrize(
    ("x", "y"), [(("0/0", "0/1"), 1), (["0/0", "0/1"], "1"), (0, 1), ({"source": "0/0", "shifted": "0/1"}, 1)]
)
def test_for_keras_takes_nested_tuples(x, y):
    nested = [(([1, 2], [3.0]), [4, 5, 6]), (([1], [2.0, 3.0]), [7])]
    padding = dict.fromkeys(["0/0", "0/1", 1], distpad.Pad())
    ((inputs, labels, weights),) = made(nested, padding=padding, tokens=1).for_keras(x=x, y=y)
    source, shifted = inputs.values() if isinstance(inputs, dict) else inputs
    if isinstance(inputs, dict):  # its values are in the order of the names
        source, shifted = inputs["source"], inputs["shifted"]
    assert source.numpy().tolist() == [[1, 2], [1, 0]] and shifted.numpy().tolist() == [[3.0, 0.0], [2.0, 3.0]]
    assert labels.numpy().tolist() == [[4, 5, 6], [7, 0, 0]]
    assert weights.numpy().tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_name_of_a_part_selects_all_its_features():
    source = [{"in": {"a": [1.0], "b": 2}, "y": [3]}]
    padding = {"in/a": distpad.Pad(), "y": distpad.Pad()}
    ((x, y, _),) = made(source, 1, padding=padding).for_keras(x="in", y="y")
    assert {name: value.numpy().tolist() for name, value in x.items()} == {"a": [[1.0]], "b": [2]}
    assert y.numpy().tolist() == [[3]]
    for name in ("in/c", "in/a/0", "z", 0):
        with pytest.raises(ValueError, match=f"for_keras: x is {name!r}, expected a feature of an example"):
            made(source, 1, padding=padding).for_keras(x=name, y="y")
