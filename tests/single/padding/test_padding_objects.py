"""pad of lists whose elements NumPy would silently round, or convert to Python objects."""

from __future__ import annotations

import decimal

import numpy as np
import pytest

import distpad

OBJECTS = {
    "None": [[1, None], [2]],
    "None among text": [["a", None], ["b"]],
    "None in a ragged list": [[[1, None], [2]], [[2]]],
    "dictionaries": [[{"a": 1}], [{}]],
    "sets": [[{1}], [{2}]],
    "decimals": [[decimal.Decimal("1.5")], [decimal.Decimal(2)]],
    "more than 64 bits": [[2**64], [1]],
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_refused_unless_asked_for(name):
    with pytest.raises(ValueError, match=r"pad: sequences is with .* in sequences\[0\], expected numbers or text"):
        distpad.pad(OBJECTS[name])
    asked = distpad.pad(OBJECTS[name], dtype=object)
    assert asked.values.dtype == object
    first = OBJECTS[name][0][0]
    np.testing.assert_array_equal(asked.values[0, 0], np.asarray(first, object))


def test_arrays_of_objects_stay_what_they_are():
    given = [np.array([1, None], object), np.array([2], object)]
    assert distpad.pad(given).values.tolist() == [[1, None], [2, 0]]
    assert distpad.pad([given, given[:1]]).values[0, 0].tolist() == [1, None]


@pytest.mark.parametrize(
    "sequences", [[[2**53 + 1, 0.5], [1]], [[0.5], [2**53 + 1]], [[2**63, -1], [1]], [[0.5], [-(2**53) - 1]]]
)
def test_integers_are_not_rounded(sequences):
    with pytest.raises(ValueError, match=r"integers above 2\*\*53 beside other dtypes in sequences\[\d\]"):
        distpad.pad(sequences)


def test_numbers_that_go_together():
    assert distpad.pad([[1.5], [1]]).values.tolist() == [[1.5], [1.0]]
    assert distpad.pad([[2**53, 0.5], [1]]).values[0, 0] == 2**53
    assert distpad.pad([[1e300], [2]]).values[0, 0] == 1e300
    assert distpad.pad([[2**63], [2**64 - 1]]).values.dtype == np.uint64
    assert distpad.pad([[True, 2], [3]]).values.tolist() == [[1, 2], [3, 0]]
