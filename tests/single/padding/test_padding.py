"""pad and unpad of arrays and nested lists, compared with an oracle of plain Python loops."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distpad.padding import Padded, pad, unpad
from padding_oracle import as_lists, batches, cut, cutting, depth, many, oracle, plain, ragged_axes, shapes, sides

tf = pytest.importorskip("tensorflow")


@many
@given(batches(), cutting)
def test_nested_lists_equal_the_oracle(batch_and_rank: tuple, options: dict) -> None:
    batch, _ = batch_and_rank
    padded = pad(batch, **options)
    assert as_lists(padded) == oracle(batch, ragged_axes(cut(batch, **options)), **options)
    assert padded.values.dtype == np.int64


@many
@given(batches(), cutting, st.booleans())
def test_ragged_axes_fix_the_rank_of_the_mask(batch_and_rank: tuple, options: dict, counted_back: bool) -> None:
    batch, rank = batch_and_rank
    axes = list(range(rank))
    known = depth(batch) - 1 == rank or not counted_back  # empty lists do not show their number of axes
    given_axes = [axis - rank for axis in axes] if counted_back and known else axes
    padded = pad(batch, ragged_axes=reversed(given_axes), **options)
    if known:
        assert padded.mask.ndim == rank + 1
        assert as_lists(padded) == oracle(batch, axes, **options)


@many
@given(batches(least=1), cutting)
def test_unpad_inverts_pad_on_nested_lists(batch_and_rank: tuple, options: dict) -> None:
    batch, rank = batch_and_rank
    options = {**options, "length": options.get("length", 0) + 4}  # long enough that no sequence is cut
    padded = pad(batch, **options)
    assert plain(unpad(*padded)) == batch
    assert plain(unpad(padded.values, None, padded.mask)) == batch
    if rank == 1 and options["padding"] == "post":
        assert plain(unpad(padded.values, padded.lengths)) == batch


@many
@given(shapes, sides, st.sampled_from(["float32", "int16", "bool", "complex64"]), st.integers(0, 2**32 - 1))
def test_images_of_different_sizes(sizes: list, padding: str, dtype: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    images = [random.integers(0, 2, [*size, 2]).astype(dtype) for size in sizes]
    padded = pad(images, padding=padding, ragged_axes=(0, 1, 2))
    height, width = (max(size[axis] for size in sizes) for axis in (1, 2))
    longest = max(size[0] for size in sizes)
    assert padded.values.shape == (len(images), longest, height, width, 2)
    assert padded.values.dtype == dtype
    assert padded.mask.shape == padded.values.shape[:-1]
    assert padded.lengths.tolist() == [size[0] for size in sizes]
    for image, row, real in zip(images, padded.values, padded.mask):
        begin = longest - len(image) if padding == "pre" else 0
        box = (slice(begin, begin + len(image)), slice(image.shape[1]), slice(image.shape[2]))
        np.testing.assert_array_equal(row[box], image)
        assert real[box].all()
        assert real.sum() == image[..., 0].size
        assert not row[~real].any()
    for image, again in zip(images, unpad(*padded)):
        assert again.dtype == dtype
        assert len(again) == len(image)
        assert image.size == 0 or np.array_equal(again, image)


def test_only_the_axes_that_differ_are_ragged() -> None:
    assert pad([np.ones([2, 5, 4, 3]), np.ones([1, 5, 4, 3])]).mask.shape == (2, 2)
    assert pad([np.ones([2, 5, 4, 3]), np.ones([1, 6, 4, 3])]).mask.shape == (2, 2, 6)
    assert pad([np.ones([2, 5, 4, 3]), np.ones([2, 5, 2, 3])]).mask.shape == (2, 2, 5, 4)
    assert pad(np.ones([2, 5, 4])).mask.shape == (2, 5)


@pytest.mark.parametrize("padding", ["pre", "post"])
@pytest.mark.parametrize("truncating", ["pre", "post"])
def test_the_first_ragged_axis_need_not_be_the_first(padding: str, truncating: str) -> None:
    frames = [np.arange(1, 2 * h * w + 1).reshape(2, h, w) for h, w in [(3, 2), (1, 3)]]
    values, lengths, mask = pad(frames, ragged_axes=(1, 2), length=2, padding=padding, truncating=truncating)
    assert values.shape == mask.shape == (2, 2, 2, 3)
    assert lengths.tolist() == [2, 1]
    kept = frames[0][:, -2:] if truncating == "pre" else frames[0][:, :2]
    np.testing.assert_array_equal(values[0, :, :, :2], kept)
    np.testing.assert_array_equal(values[1, :, 1 if padding == "pre" else 0], frames[1][:, 0])
    assert [row.tolist() for row in unpad(values, lengths, mask)] == [kept.tolist(), frames[1].tolist()]
    with pytest.raises(ValueError, match=r"sequences\[0\] it is 1 and 2. Let ragged_axes begin earlier."):
        pad([[[1], [2, 3]], [[4], [5]]], ragged_axes=1)


def test_a_list_of_lists_of_images() -> None:
    images = [[np.ones([2, 3]), np.full([3, 1], 2.0)], [np.full([1, 1], 3.0)]]
    padded = pad(images, value=-1)
    assert padded.mask.shape == padded.values.shape == (2, 2, 3, 3)
    assert padded.values[0, 1].tolist() == [[2, -1, -1]] * 3
    assert [[image.shape for image in row] for row in unpad(*padded)] == [[(2, 3), (3, 1)], [(1, 1)]]


def test_a_value_among_the_labels_and_no_mask() -> None:
    padded = pad([[0, 1, 0], [0]], mask=False)
    assert padded.mask is None
    assert plain(unpad(*padded)) == [[0, 1, 0], [0]]


@many
@given(batches(), cutting)
def test_truncating_is_cutting_and_then_padding(batch_and_rank: tuple, options: dict) -> None:
    batch, rank = batch_and_rank
    if depth(batch) - 1 == rank:
        options = {"length": 2, "ragged_axes": range(rank), **options}
        assert as_lists(pad(batch, **options)) == as_lists(pad(cut(batch, **options), **options))


def test_cutting_to_nothing_keeps_the_dtype() -> None:
    for batch in ([[1, 2]], [[[1], [2, 3]]]):
        padded = pad(batch, length=0, truncating="post", value=7.0)
        assert padded.values.shape[:2] == (1, 0)
        assert padded.values.dtype == np.int64
        assert plain(unpad(*padded)) == [[]]


def test_vectors_as_value() -> None:
    one_hot = [np.eye(3, dtype=np.float32)[[0, 1]], np.eye(3, dtype=np.float32)[[2]], np.zeros([0, 3], np.float32)]
    padded = pad(one_hot, value=[0, 0, 1])
    assert padded.values.dtype == np.float32
    assert padded.values[1:].tolist() == [[[0, 0, 1]] * 2] * 2
    assert padded.mask.shape == (3, 2)
    assert (
        pad([[], []], value=[0, 0, 1], length=1).values.tolist() == [[[0, 0, 1]]] * 2
    )  # the shape of value, since all are empty


# Empty batches and sequences


def test_empty_batches_and_sequences_keep_shape_and_dtype() -> None:
    assert pad([]).values.shape == (0, 0)
    assert pad([]).mask.shape == (0, 0)
    assert pad([], length=3, ragged_axes=(0, 1)).mask.shape == (0, 3, 0)
    assert pad([[], []], length=2).values.tolist() == [[0, 0], [0, 0]]
    assert pad([[], []]).values.dtype == np.int64
    assert pad([[], [1]]).values.dtype == np.int64
    assert pad([np.array([]), np.array([1])]).values.dtype == np.int64
    assert pad([np.zeros([0, 5], np.int8)] * 2).values.dtype == np.int8
    assert pad([np.zeros([0, 5], np.int8)] * 2).values.shape == (2, 0, 5)
    assert pad([np.zeros([0, 5]), [], np.ones([2, 5])]).values.shape == (3, 2, 5)
    zero_rows = pad(np.zeros([0, 7, 5], np.float32))
    assert (zero_rows.values.shape, zero_rows.values.dtype) == ((0, 7, 5), np.float32)
    assert (zero_rows.mask.shape, zero_rows.lengths.shape) == ((0, 7), (0,))
    assert unpad(*pad([])) == []
    assert plain(unpad(*pad([[], []]))) == [[], []]
    assert pad([np.ones([3, 0])]).mask.tolist() == [[True] * 3]


@pytest.mark.parametrize("padding", ["pre", "post"])
def test_lengths_restore_empty_rows_at_the_end(padding: str) -> None:
    batch = [[[1, 2], []], [[3], [4], [5], [6]], [[], []]]
    padded = pad(batch, padding=padding)
    assert plain(unpad(*padded)) == batch
    assert unpad(*map(tf.constant, padded)).to_list() == batch
    assert plain(unpad(padded.values, None, padded.mask)) == [[[1, 2]], *batch[1:2], []]


# Dtypes


@pytest.mark.parametrize(
    ("batch", "options", "dtype"),
    [
        ([[1], [2.5, 3]], {}, "float64"),
        ([[True], [False]], {}, "bool"),
        ([[True], [2, 3]], {}, "int64"),
        ([np.ones(2, np.uint8), np.ones(3, np.int16)], {}, "int16"),
        ([[1], [2, 300]], {"dtype": "int16"}, "int16"),
        ([[1.0], [2, 3]], {"dtype": "int32"}, "int32"),
        ([[0.1], [2, 3]], {"dtype": "float16"}, "float16"),
        ([[1], [2, 3]], {"dtype": tf.float32}, "float32"),
        ([["a"], ["bcd", ""]], {"value": ""}, "<U3"),
        ([["a"], ["b", ""]], {"value": "<pad>"}, "<U5"),
        ([["a"], ["b", "cd"]], {"value": "", "dtype": str}, "<U2"),
        ([[b"a"], [b"bcd", b""]], {"value": b""}, "S3"),
        ([["a", None], [1]], {"dtype": object, "value": None}, "object"),
        ([[1], [2, 3]], {"dtype": object}, "object"),
        ([[1 + 2j], [3]], {}, "complex128"),
        ([np.array(["2024-01-01"], "M8[D]"), np.array([], "M8[D]")], {"value": np.datetime64("2000-01-01")}, "M8[D]"),
    ],
)
def test_dtypes(batch: list, options: dict, dtype: Any) -> None:
    padded = pad(batch, **options)
    assert padded.values.dtype == np.dtype(dtype)
    tolerance = 1e-3 if dtype == "float16" else 0
    for before, after in zip(batch, unpad(*padded)):
        assert after.dtype == np.dtype(dtype)
        assert len(before) == len(after)
        assert all(x == y or abs(x - y) <= tolerance for x, y in zip(before, after.tolist()))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_floats_take_any_finite_value_and_not_a_number(dtype: str) -> None:
    labels = [np.ones(2, tf.as_dtype(dtype).as_numpy_dtype), np.ones(1, tf.as_dtype(dtype).as_numpy_dtype)]
    assert np.isnan(pad(labels, value=np.nan).values[1, 1])
    assert abs(float(pad(labels, value=0.1).values[1, 1]) - 0.1) < 1e-3
    assert pad(labels, value=-np.inf).values[1, 1] == -np.inf


def test_nothing_is_shared_with_the_input() -> None:
    labels = [np.array([1, 2]), np.array([3, 4])]
    padded = pad(labels)
    padded.values[:] = 0
    assert labels[0].tolist() == [1, 2]
    again = unpad(*padded)
    again[0][:] = 9
    assert not padded.values.any()


# Errors


def objects(*items: Any) -> np.ndarray:
    array = np.empty(len(items), object)
    array[:] = items
    return array


@pytest.mark.parametrize(
    ("batch", "options", "error", "words"),
    [
        ([[1]], {"padding": "left"}, ValueError, "pad: padding is 'left', expected one of 'pre', 'post'."),
        ([[1]], {"truncating": None}, ValueError, "pad: truncating is None, expected one of 'error', 'pre', 'post'."),
        ([[1]], {"length": -1}, ValueError, "pad: length is -1, expected at least 0."),
        ([[1]], {"length": 1.5}, TypeError, "pad: length is 1.5, expected an integer"),
        ([[1]], {"length": True}, TypeError, "pad: length is True"),
        ([[1]], {"mask": [True]}, TypeError, "pad: mask is a list, expected True or False."),
        ([[1]], {"dtype": "nonsense"}, TypeError, "pad: dtype is 'nonsense', expected a dtype."),
        ([[1]], {"ragged_axes": 1}, ValueError, "ragged_axes is [1], expected one or several axes"),
        ([[1]], {"ragged_axes": -2}, ValueError, "from 0 to 0. The sequences have 1 axis each"),
        ([[1]], {"ragged_axes": ()}, ValueError, "ragged_axes is [], expected one or several axes"),
        ([[[1]]], {"ragged_axes": (1, -1)}, ValueError, "expected different axes"),
        ([[1]], {"ragged_axes": "0"}, TypeError, "pad: ragged_axes is '0', expected an integer or several."),
        ([[1]], {"ragged_axes": 0.5}, TypeError, "pad: ragged_axes is 0.5"),
        ([[1], [1, 2, 3], [1, 2]], {"length": 1}, ValueError, "sequences[1] has length 3 (of 3, 2 are longer)."),
        ([[1, 2], [[1], [2]]], {}, ValueError, "sequences is of ranks 1 at sequences[0], 2 at sequences[1]"),
        ([[[1, 2], 3]], {}, ValueError, "of ranks 2 at sequences[0][0], 1 at sequences[0][1]"),
        ([objects(np.ones(2), np.ones([2, 2]))], {}, ValueError, "of ranks 2 at sequences[0][0], 3 at"),
        ([[1], [[], []]], {}, ValueError, "of ranks 1 at sequences[0], 2 at sequences[1]"),
        ([np.ones([2, 3]), np.ones([2, 4])], {"ragged_axes": 0}, ValueError, "Its size is 3 in sequences[0] and 4 in"),
        ([[[1], [2, 3]]], {"ragged_axes": 0}, ValueError, "Write ragged_axes=(0, 1)."),
        ([[1]], {"value": [1, 2]}, ValueError, "pad: value is of shape (2,), expected a scalar, or an array"),
        ([np.ones([2, 3])], {"value": [1, 2]}, ValueError, "broadcasts to the shape of one position, (3,)."),
        ([np.ones([2, 1])], {"value": [1, 2]}, ValueError, "broadcasts to the shape of one position, (1,)."),
        ([[1]], {"value": [[1], [1, 2]]}, ValueError, "pad: value is [[1], [1, 2]], expected a scalar or an array."),
        ([np.ones(1, np.uint8)], {"value": -1}, ValueError, "value is -1, expected a value that uint8 can hold."),
        ([[1]], {"value": 0.5}, ValueError, "value is 0.5, expected a value that int64 can hold."),
        ([[1]], {"value": float("nan")}, ValueError, "value is nan, expected a value that int64 can hold."),
        ([[1]], {"value": "a"}, ValueError, "value is 'a', expected a value that int64 can hold."),
        ([[1]], {"value": None}, ValueError, "value is None, expected a value that int64 can hold."),
        ([[1.0]], {"value": None}, ValueError, "value is None, expected a value that float64 can hold."),
        ([[1.0]], {"value": 1e39, "dtype": "float32"}, ValueError, "expected a value that float32 can hold."),
        ([[1.0]], {"value": 1j}, ValueError, "value is 1j, expected a value that float64 can hold."),
        ([[True]], {"value": 2}, ValueError, "value is 2, expected a value that bool can hold."),
        ([["a"]], {}, ValueError, "value is 0, expected a value that <U1 can hold. Write value=''."),
        ([["a"]], {"value": "ab", "dtype": "<U1"}, ValueError, "value is 'ab', expected a value that <U1 can hold."),
        ([[1], [2.5]], {"dtype": int}, ValueError, "sequences[1] (float64) holds elements that would change."),
        ([[1], [300]], {"dtype": "uint8"}, ValueError, "sequences[1] (int64) holds elements that would change."),
        ([["a"], ["bc"]], {"dtype": "<U1", "value": ""}, ValueError, "sequences[1] (<U2) holds elements that would"),
        ([["1"]], {"dtype": int}, ValueError, "sequences[0] (<U1) holds elements that would change."),
        ([[1], ["a"]], {}, ValueError, "of dtypes <U1, int64, expected one common dtype."),
        ([[1, "a"]], {}, ValueError, "of strings and other elements in sequences[0], expected one kind of element."),
        ([["a", b"a"]], {}, ValueError, "of strings and other elements in sequences[0]"),
        ([[2**63], [-1]], {}, ValueError, "of dtypes int64, uint64, expected one common dtype."),
        (
            [1, 2, 3],
            {},
            ValueError,
            "Write pad([[1, 2, 3]]) for one sequence, pad([[1], [2], [3]]) for three of length 1.",
        ),
        (np.ones(3), {}, ValueError, "pad: sequences[0] is"),
        (["ab", "c"], {}, ValueError, "pad: sequences[0] is 'ab', expected a sequence, with at least one axis."),
        ([[1], None], {}, ValueError, "pad: sequences[1] is None, expected a sequence"),
        ("abc", {}, TypeError, "pad: sequences is a str, expected a list of sequences."),
        (3, {}, TypeError, "pad: sequences is a int, expected a list of sequences."),
        (None, {}, TypeError, "pad: sequences is a NoneType"),
        (np.array(3), {}, TypeError, "pad: sequences is a ndarray"),
        ({"a": [1]}, {}, TypeError, "pad: sequences is a dict, expected a list of sequences."),
        ({1, 2}, {}, TypeError, "pad: sequences is a set"),
        (iter([[1]]), {}, TypeError, "pad: sequences is a list_iterator, expected a list of sequences."),
    ],
)
def test_errors_of_pad(batch: Any, options: dict, error: type, words: str) -> None:
    with pytest.raises(error) as raised:
        pad(batch, **options)
    assert raised.type is error
    assert str(raised.value).startswith("pad: ")
    assert words in str(raised.value)


values = np.arange(6).reshape(2, 3)
real = np.array([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((values,), ValueError, "unpad: mask is None, expected lengths or a mask. Write unpad(*padded)"),
        ((Padded(values, [2, 1]), [2, 1]), TypeError, "values is a Padded, expected an array or a tensor."),
        (([[1, 2]], [2]), TypeError, "unpad: values is a list"),
        ((values[0], [2, 1, 1]), ValueError, "values is of shape (3,), expected [batch, length, ...]."),
        ((values, [2, 1, 1]), ValueError, "lengths is of shape (3,), expected of shape (2,)."),
        ((values, [2.0, 1.0]), TypeError, "lengths is of dtype float64, expected integers."),
        ((values, [2, 4]), ValueError, "lengths[1] is 4, expected from 0 to 3."),
        ((values, [-1, 2]), ValueError, "lengths[0] is -1, expected from 0 to 3."),
        ((values, [2, 2], real), ValueError, "lengths[1] is 2, expected 1, as in the mask."),
        ((values, None, real.astype(int)), TypeError, "Write mask.astype(bool)."),
        ((values, None, real[:, :2]), ValueError, "mask is of shape (2, 2), expected of the first two or more axes"),
        ((values, None, real[0]), ValueError, "mask is of shape (3,)"),
        (
            (np.ones([1, 2, 2]), [3], np.ones([1, 2, 2], bool)),
            ValueError,
            "lengths[0] is 3, expected 2, as in the mask",
        ),
    ],
)
def test_errors_of_unpad(args: tuple, error: type, words: str) -> None:
    with pytest.raises(error) as raised:
        unpad(*args)
    assert str(raised.value).startswith("unpad: ")
    assert words in str(raised.value)
    if isinstance(args[0], np.ndarray):
        with pytest.raises(error):
            unpad(tf.constant(args[0]), *args[1:])


def test_importing_and_padding_arrays_does_not_import_tensorflow() -> None:
    code = "import sys; from distpad.padding import pad, unpad; unpad(*pad([[1], []])); "
    code += "sys.exit(any(name in sys.modules for name in ('tensorflow', 'keras')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_value_may_be_written_for_all_axes_of_a_sequence() -> None:
    images = [np.ones([1, 1, 1, 3]), np.ones([1, 2, 1, 3])]
    for value in ([7, 8, 9], [[7, 8, 9]], [[[7, 8, 9]]]):
        assert pad(images, value=value).values[0, 0, 1].tolist() == [[7, 8, 9]]
    with pytest.raises(ValueError, match="broadcasts to the shape of one position"):
        pad(images, value=np.ones([2, 1, 3]))


def test_masked_elements_are_refused():
    row = np.ma.masked_array([1, 2], [0, 1])
    with pytest.raises(ValueError, match=r"sequences is with masked elements in sequences\[1\], expected no masked"):
        pad([[1], row])
    assert pad([[1], np.ma.masked_array([1, 2])]).values.tolist() == [[1, 0], [1, 2]]
