"""pad_sequences against the installed Keras's own: results and errors, on thousands of inputs."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import drawn
from distpad.padding import pad_sequences

tf = pytest.importorskip("tensorflow")

numbers = st.integers(-300, 300) | st.floats(allow_nan=True, width=32) | st.booleans()
texts = st.text("abc", max_size=4)
vectors = st.lists(st.integers(-9, 9), min_size=2, max_size=2)


def lists_of(element: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.lists(element, max_size=5), max_size=4)


sequences = st.one_of(
    lists_of(st.integers(-9, 9)),
    lists_of(numbers),
    lists_of(texts),
    lists_of(vectors),
    lists_of(vectors | st.integers(0, 9)),  # of no one shape
    lists_of(st.none() | st.integers(0, 9)),
    lists_of(st.integers(0, 9)).map(lambda rows: [np.array(row, np.int16) for row in rows]),
    lists_of(vectors).map(lambda rows: [np.array(row, np.float32).reshape(-1, 2) for row in rows]),
    lists_of(st.integers(0, 9)).map(lambda rows: tuple(tuple(row) for row in rows)),
    st.lists(st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=3), max_size=4),
    st.lists(texts, max_size=4),
    st.dictionaries(texts, st.integers(0, 9), max_size=3),
    st.sampled_from([None, 3, "abc", np.zeros([2, 3]), np.zeros([0, 3]), np.zeros([])]),
    st.builds(iter, lists_of(st.integers(0, 9))),
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "maxlen": st.none() | st.integers(-1, 7) | st.sampled_from([np.int64(2), 2.5, "3"]),
        "dtype": st.sampled_from(
            ["int32", "float32", "int8", "uint8", "bool", "object", "str", "<U2", "S3", "complex64", "nonsense", None]
        )
        | st.sampled_from([object, str, bytes, int, float, np.float16, np.int64, np.dtype("int16"), np.dtype(object)]),
        "padding": st.sampled_from(["pre", "post", "pre", "post", "left", None]),
        "truncating": st.sampled_from(["pre", "post", "pre", "post", "error", 1]),
        "value": numbers | texts | st.sampled_from([None, b"x", [1, 2], np.array([1.5, 2.5]), np.zeros([3])]),
    },
)


def outcome(function: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*args, **kwargs)
        except Exception as error:
            return error


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs), (ours, theirs)
    if isinstance(theirs, Exception):
        assert str(ours) == str(theirs)
        return
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert repr(ours.tolist()) == repr(theirs.tolist())  # to the bit, NaN and the types of objects included


def keras_2_differs(kwargs: dict) -> bool:
    dtype, text = kwargs.get("dtype"), isinstance(kwargs.get("value"), str)
    is_bytes = dtype is bytes or (isinstance(dtype, str) and dtype.startswith("S"))
    is_object = isinstance(dtype, np.dtype) and dtype.kind == "O"
    return text and (is_bytes or is_object) and getattr(tf.keras, "__version__", "2").startswith("2")


@drawn.examples(3000)
@given(sequences, arguments)
def test_it_equals_keras_in_results_and_errors(batch: Any, kwargs: dict) -> None:
    if keras_2_differs(kwargs):
        return
    assert_same(outcome(pad_sequences, batch, **kwargs), outcome(tf.keras.utils.pad_sequences, batch, **kwargs))


@drawn.examples(1000)
@given(
    st.one_of(lists_of(st.integers(-9, 9)), lists_of(vectors)),
    st.none() | st.integers(1, 6),
    st.sampled_from(["pre", "post"]),
    st.sampled_from(["pre", "post"]),
    st.integers(-9, 9),
)
def test_it_equals_keras_where_all_is_well(batch: Any, maxlen: Any, padding: str, truncating: str, value: int) -> None:
    kwargs = {"maxlen": maxlen, "padding": padding, "truncating": truncating, "value": value}
    theirs = outcome(tf.keras.utils.pad_sequences, batch, **kwargs)
    assert_same(outcome(pad_sequences, batch, **kwargs), theirs)
    assert isinstance(theirs, np.ndarray) or (not batch and maxlen is None)


def test_the_defaults_pad_and_cut_at_the_front() -> None:
    assert pad_sequences([[1, 2, 3], [4]], 2).tolist() == [[2, 3], [0, 4]]
    assert pad_sequences([[1, 2, 3], [4]]).dtype == np.int32


def test_arguments_may_be_given_by_position() -> None:
    batch = [[1, 2, 3], [4]]
    args = (2, "float32", "post", "post", -1.0)
    assert_same(pad_sequences(batch, *args), tf.keras.utils.pad_sequences(batch, *args))


@pytest.mark.parametrize("dtype", ["object", np.dtype(object), np.object_, "int32"])
def test_a_string_as_value_takes_a_dtype_of_strings_or_object_itself(dtype: Any) -> None:  # as Keras 3
    with pytest.raises(ValueError, match="You should set `dtype=object` for variable length strings"):
        pad_sequences([["a"], []], dtype=dtype, value="x")
    assert pad_sequences([["a"], []], dtype=object, value="x").tolist() == [["a"], ["x"]]
    assert pad_sequences([["a"], []], dtype="S1", value="x").tolist() == [[b"a"], [b"x"]]


def test_errors_of_each_kind_occur_in_keras_too() -> None:
    """The comparison above is worth something only if it has met them: one of each, by name."""
    cases: list[tuple[Any, dict, str]] = [
        (3, {}, "must be iterable"),
        ([1], {}, "Found non-iterable: 1"),
        ([], {}, "zero-size array"),
        ([[1]], {"padding": "x"}, 'Padding type "x" not understood'),
        ([[1]], {"truncating": "x"}, 'Truncating type "x" not understood'),
        ([[[1, 2]], [[1]]], {}, "Shape of sample (1,) of sequence at position 1"),
        ([[1]], {"value": "x"}, "is not compatible with `value`'s type"),
        ([[1, 2]], {"maxlen": 0}, "could not broadcast"),
        ([[1]], {"maxlen": -1}, "negative dimensions"),
    ]
    for batch, kwargs, words in cases:
        ours, theirs = outcome(pad_sequences, batch, **kwargs), outcome(tf.keras.utils.pad_sequences, batch, **kwargs)
        assert isinstance(theirs, ValueError)
        assert words in str(theirs)
        assert_same(ours, theirs)
    assert pad_sequences([[]], padding="x", truncating="x").shape == (1, 0)  # options are not looked at here


@pytest.mark.parametrize("maxlen", [2.5, "3", np.int64(2), np.float32(1), True, -1])
def test_odd_lengths_give_the_errors_of_keras(maxlen: Any) -> None:
    for batch in ([[1, 2, 3], [4]], [np.arange(3), np.arange(1)]):
        ours = outcome(pad_sequences, batch, maxlen, padding="post")
        assert_same(ours, outcome(tf.keras.utils.pad_sequences, batch, maxlen, padding="post"))
