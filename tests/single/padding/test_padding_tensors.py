"""pad and unpad of ragged and dense tensors, eagerly and in graphs, compared with an oracle of plain Python loops."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distpad.padding import Padded, pad, unpad
from padding_oracle import as_lists, batches, cutting, depth, oracle, plain, shapes, sides

tf = pytest.importorskip("tensorflow")


def as_ragged(batch: list, rank: int) -> Any:
    """A batch ``[batch, n_i, ...]``, ragged on all axes of a sequence."""
    return tf.ragged.constant(batch, dtype=tf.int64, ragged_rank=rank)


@functools.cache
def in_graph(rank: int, options: tuple) -> Any:
    """``pad`` and ``unpad`` in graphs that are traced once for all sizes."""
    ragged = tf.RaggedTensorSpec([None] * (rank + 1), tf.int64)
    dense = tf.TensorSpec([None] * (rank + 1), tf.int64)
    padder = tf.function(lambda rows: pad(rows, **dict(options)), input_signature=[ragged])
    mask = tf.TensorSpec(dense.shape, tf.bool)
    return padder, tf.function(unpad, input_signature=[dense, tf.TensorSpec([None], tf.int32), mask])


def assert_oracle(padded: Padded, batch: list, rank: int, options: dict) -> None:
    assert all(tf.is_tensor(part) for part in padded)
    assert padded.values.shape.rank == padded.mask.shape.rank == rank + 1
    if depth(batch) - 1 < rank:  # if all lists are empty, the oracle sees fewer axes
        assert not np.any(padded.mask)
    else:
        assert as_lists(padded) == oracle(batch, list(range(rank)), **options)


@given(batches(), cutting)
def test_ragged_tensors_equal_the_oracle(batch_and_rank: tuple, options: dict) -> None:
    batch, rank = batch_and_rank
    assert_oracle(pad(as_ragged(batch, rank), **options), batch, rank, options)


graph_options: list[dict] = [
    {},
    {"padding": "pre", "value": -3},
    {"length": 2, "truncating": "pre"},
    {"length": 2, "truncating": "post", "padding": "pre"},
]


@pytest.mark.parametrize("options", graph_options)
@settings(max_examples=10)
@given(batch_and_rank=batches())
def test_ragged_tensors_equal_the_oracle_in_graphs(options: dict, batch_and_rank: tuple) -> None:
    batch, rank = batch_and_rank
    padder, _ = in_graph(rank, tuple(options.items()))
    assert_oracle(padder(as_ragged(batch, rank)), batch, rank, options)


@given(batches(least=1), sides, st.integers(4, 6))
def test_unpad_inverts_pad_on_ragged_tensors(batch_and_rank: tuple, padding: str, length: int) -> None:
    batch, rank = batch_and_rank
    padded = pad(as_ragged(batch, rank), padding=padding, length=length)
    for again in (unpad(*padded), in_graph(rank, ())[1](*padded), unpad(padded.values, None, padded.mask)):
        assert isinstance(again, tf.RaggedTensor)
        assert again.dtype == tf.int64
        assert again.ragged_rank == rank
        assert again.to_list() == batch
    if rank == 1 and padding == "post":
        assert unpad(padded.values, padded.lengths).to_list() == batch


def assert_same_batch(padded: Padded, expected: Padded, frames: list) -> None:
    assert padded.lengths.numpy().tolist() == expected.lengths.tolist()
    assert padded.mask.numpy().sum() == expected.mask.sum()
    if all(frames):  # a RaggedTensor without frames does not hold their height
        assert as_lists(padded) == as_lists(expected)


@given(shapes, cutting)
def test_lists_of_tensors_equal_lists_of_arrays(sizes: list, options: dict) -> None:
    images = [np.arange(np.prod(size) * 2).reshape(*size, 2) for size in sizes]
    tensors = list(map(tf.constant, images))
    expected = pad(images, ragged_axes=(0, 1, 2), **options)
    assert_same_batch(pad(tensors, ragged_axes=(0, 1, 2), **options), expected, [size[0] for size in sizes])
    assert pad(tensors, **options).mask.shape.rank == pad(images, **options).mask.ndim


@pytest.mark.parametrize("options", graph_options)
def test_lists_of_tensors_equal_lists_of_arrays_in_graphs(options: dict) -> None:
    spec = tf.TensorSpec([None, None, None, 2], tf.int64)
    padder = tf.function(lambda *rows: pad(list(rows), **options), input_signature=[spec] * 3)
    options = {"truncating": "post", **options}
    random = np.random.default_rng(0)
    for frames in ([1, 3, 2], [4, 1, 1], [0, 2, 5], [0, 0, 0]):
        images = [random.integers(0, 9, [size, *random.integers(1, 5, 2), 2]) for size in frames]
        assert_same_batch(padder(*images), pad(images, ragged_axes=(0, 1, 2), **options), frames)


def test_dense_and_other_tensors() -> None:
    dense = np.arange(24).reshape(2, 3, 4)
    cases: list[dict] = [{}, {"length": 5, "padding": "pre", "value": [1, 2, 3, 4]}, {"length": 2, "truncating": "pre"}]
    for options in cases:
        for axes in (None, (0, 1)):
            if axes is None or "value" not in options:
                expected = as_lists(pad(dense, ragged_axes=axes, **options))
                assert as_lists(pad(tf.constant(dense), ragged_axes=axes, **options)) == expected
                assert as_lists(pad(tf.Variable(dense), ragged_axes=axes, **options)) == expected
    partly = tf.RaggedTensor.from_row_lengths(tf.constant(dense[0]), [2, 1])
    assert pad(partly).mask.shape == (2, 2)
    assert pad(partly, ragged_axes=(0, 1)).mask.shape == (2, 2, 4)
    assert pad(partly, value=[1, 2, 3, 4]).values[1, 1].numpy().tolist() == [1, 2, 3, 4]
    assert pad([partly[0], partly[1]]).lengths.numpy().tolist() == [2, 1]
    assert pad([partly, partly[:1]]).mask.shape == (2, 2, 2)
    nested_images = [[tf.ones([2, 3]), tf.ones([3, 1])], [tf.ones([1, 1])]]
    assert pad(nested_images).mask.shape == (2, 2, 3, 3)
    assert tf.is_tensor(pad(nested_images).lengths)
    text = pad(tf.ragged.constant([["a", "b"], []]), value="-", padding="pre", length=3)
    assert text.values.numpy().tolist() == [[b"-", b"a", b"b"], [b"-"] * 3]
    assert unpad(*text).to_list() == [[b"a", b"b"], []]


def test_the_first_ragged_axis_of_tensors_need_not_be_the_first() -> None:
    frames = [np.arange(1, 2 * h * w + 1).reshape(2, h, w) for h, w in [(3, 2), (1, 3)]]
    for padding in ("pre", "post"):
        for truncating in ("pre", "post"):
            options: dict = {"ragged_axes": (1, 2), "length": 2, "padding": padding, "truncating": truncating}
            expected, padded = pad(frames, **options), pad(list(map(tf.constant, frames)), **options)
            assert as_lists(padded) == as_lists(expected)
            assert unpad(*padded).to_list() == plain(unpad(*expected))


def test_empty_tensors() -> None:
    none = tf.RaggedTensor.from_row_lengths(tf.zeros([0, 5]), tf.zeros([0], tf.int64))
    assert pad(none, length=2).values.shape == (0, 2, 5)
    assert pad(none, length=2).mask.shape == (0, 2)
    assert pad(tf.ragged.constant([[], []], dtype=tf.int32), padding="pre").values.shape == (2, 0)
    assert pad([tf.zeros([0, 5]), tf.zeros([0, 5])]).values.shape == (2, 0, 5)
    assert pad([tf.zeros([0, 0, 3]), tf.zeros([2, 4, 3])]).mask.shape == (2, 2, 4)
    assert pad(tf.zeros([0, 3, 2]), length=3).values.shape == (0, 3, 2)


def test_gradients_pass_to_real_elements_alone() -> None:
    flat = tf.Variable([1.0, 2.0, 3.0])
    with tf.GradientTape() as tape:
        rows = tf.RaggedTensor.from_row_lengths(tf.square(flat), [2, 1])
        total = tf.reduce_sum(pad(rows, value=7, padding="pre").values)
    assert float(total) == 1 + 4 + 9 + 7
    assert tape.gradient(total, flat).numpy().tolist() == [2, 4, 6]


def test_it_runs_in_an_input_pipeline_with_a_static_length() -> None:
    data = tf.data.Dataset.from_tensor_slices(tf.ragged.constant([[1], [2, 3], [4, 5, 6], []])).ragged_batch(2)
    data = data.map(lambda rows: pad(rows, length=3, value=-1))
    assert data.element_spec.values.shape.as_list() == [None, 3]
    assert data.element_spec.mask.shape.as_list() == [None, 3]
    assert [batch.values.numpy().tolist() for batch in data][1] == [[4, 5, 6], [-1, -1, -1]]


def rows() -> Any:  # a function, since other tests of this process may configure devices before a tensor exists
    return tf.ragged.constant([[1, 2, 3], [4]])


def even_rows() -> Any:
    return tf.ragged.constant([[[1, 2], [3, 4]], [[5]]])


def planes() -> Any:
    return tf.ragged.constant([[[1, 2, 3], [4]], [[5]]])


@pytest.mark.parametrize(
    ("batch", "options", "error", "words"),
    [
        (rows, {"length": 2}, ValueError, "sequences[0] has length 3 (of 2, 1 are longer)."),
        (rows, {"value": 0.5}, ValueError, "value is 0.5, expected a value that int32 can hold."),
        (rows, {"value": [1, 2]}, ValueError, "value is of shape (2,)"),
        (rows, {"dtype": "bool"}, ValueError, "pad: dtype is bool, expected one for all int32 elements."),
        (rows, {"dtype": tf.string}, ValueError, "pad: dtype is string, expected one for all int32 elements."),
        (rows, {"ragged_axes": 1}, ValueError, "from 0 to 0. The sequences have 1 axis each"),
        (planes, {"ragged_axes": 0}, ValueError, "Its sizes go from 1 to 3. Write ragged_axes=(0, 1)."),
        (even_rows, {"ragged_axes": 1}, ValueError, "Its sizes go from 1 to 2. Write ragged_axes=(0, 1)."),
        (
            lambda: planes()[:1],
            {"ragged_axes": 1},
            ValueError,
            "It differs within a sequence. Let ragged_axes begin earlier.",
        ),
        (lambda: tf.ragged.constant([["a"]]), {}, ValueError, "pad: value is 0, expected a string"),
        (lambda: [[tf.constant(["a"])]], {}, ValueError, "pad: value is 0, expected a string"),
        (
            lambda: tf.constant([1, 2]),
            {},
            ValueError,
            "sequences is of shape (2,), expected a tensor [batch, length, ...].",
        ),
        (lambda: [tf.constant(1)], {}, ValueError, "sequences is a list of scalar tensors"),
        (
            lambda: [tf.zeros([1]), tf.zeros([1, 1])],
            {},
            ValueError,
            "sequences[0] has rank 1, sequences[1] has rank 2.",
        ),
        (lambda: [tf.zeros([1]), tf.constant([1])], {}, ValueError, "expected tensors of one dtype, here float32."),
        (lambda: [tf.zeros([1, 2]), tf.zeros([1, 3])], {"ragged_axes": 0}, ValueError, "Its sizes are [2, 3]."),
        (lambda: tf.sparse.from_dense([[1]]), {}, TypeError, "Write tf.RaggedTensor.from_sparse"),
    ],
)
def test_errors_of_pad_on_tensors(batch: Any, options: dict, error: type, words: str) -> None:
    with pytest.raises(error) as raised:
        pad(batch(), **options)
    assert str(raised.value).startswith("pad: ")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("batch", "options", "words"),
    [
        (rows, {"length": 2}, "pad: length is 2, expected at least the longest sequence's."),
        (planes, {"ragged_axes": 0}, "Its sizes differ. Write ragged_axes=(0, 1)."),
        (lambda: planes()[:1], {"ragged_axes": 1}, "It differs within a sequence."),
        (lambda: rows() + 200, {"dtype": "int8"}, "pad: dtype is int8, expected one for all int32 elements."),
        (lambda: tf.cast(rows() + 200, tf.uint8), {"dtype": "int8"}, "one for all uint8 elements."),
        (lambda: rows() + 254, {"dtype": "uint8"}, "pad: dtype is uint8"),
        (lambda: tf.cast(rows(), tf.float64) * 1e300, {"dtype": "float32"}, "pad: dtype is float32"),
        (lambda: tf.cast(rows(), tf.float32) + 0.5, {"dtype": "int32"}, "pad: dtype is int32"),
    ],
)
def test_graphs_assert_what_they_can_only_see_running(batch: Any, options: dict, words: str) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        tf.function(lambda rows: pad(rows, **options))(batch())
    assert words in str(raised.value).replace("\\'", "'")


def test_graphs_cast_and_refuse_what_is_not_static() -> None:
    cast = tf.function(lambda batch: pad(batch, dtype="float32", value=0.5))(rows())
    assert cast.values.numpy().tolist() == [[1, 2, 3], [4, 0.5, 0.5]]
    with pytest.raises(TypeError, match="an integer known before the graph runs"):
        tf.function(lambda batch, length: pad(batch, length=length))(rows(), tf.constant(3))
    with pytest.raises(ValueError, match="nested lists of symbolic tensors"):
        tf.function(lambda batch: pad([[batch]]))(tf.constant([1]))
    with pytest.raises(ValueError, match="of unknown rank"):
        tf.function(lambda batch: pad(batch), input_signature=[tf.TensorSpec(None)])(tf.zeros([1, 1]))
    with pytest.raises(ValueError, match="value is of dtype float32, expected of dtype int32"):
        tf.function(lambda batch, value: pad(batch, value=value))(rows(), tf.constant(0.0))
    filled = tf.function(lambda batch, value: pad(batch, value=value))(rows(), tf.constant(9))
    assert filled.values.numpy().tolist() == [[1, 2, 3], [4, 9, 9]]


def test_a_graph_names_the_sequence_that_is_too_long() -> None:
    ragged = tf.ragged.constant([[1]] * 7 + [[1, 2, 3]] + [[2]])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"sequence.*\[7\].*has length.*\[3\]"):
        tf.function(lambda batch: pad(batch, length=2).values)(ragged)
