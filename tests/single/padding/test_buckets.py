"""Buckets: rounding up to a boundary, on one replica and in pad_to_global_max; and argument errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import distpad

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # for a shared machine
BOUNDARIES = st.sets(st.integers(1, 500), min_size=1, max_size=12).map(sorted)


@relaxed
@given(BOUNDARIES, st.integers(0, 500))
def test_the_smallest_boundary_that_is_long_enough(boundaries, n):
    buckets = distpad.Buckets(boundaries)
    at_or_above = [boundary for boundary in boundaries if boundary >= n]
    if at_or_above:
        assert buckets(n) == min(at_or_above)
    else:
        with pytest.raises(ValueError, match=f"length is {n}, expected at most {boundaries[-1]}, the last boundary"):
            buckets(n)


@relaxed
@given(BOUNDARIES, st.integers(0, 2000))
def test_beyond_the_last_boundary_in_multiples(boundaries, n):
    found = distpad.Buckets(boundaries, beyond="multiples")(n)
    last = boundaries[-1]
    expected = min((boundary for boundary in boundaries if boundary >= n), default=math.ceil(n / last) * last)
    assert found == expected and isinstance(found, int)


@relaxed
@given(st.integers(1, 64), st.integers(0, 1000))
def test_multiples(m, n):
    found = distpad.Buckets.multiples(m)(n)
    assert found % m == 0 and found >= n and found > 0
    assert found - n < m or found == m


@relaxed
@given(st.integers(1, 50), st.integers(0, 500), st.floats(1.01, 4.0))
def test_geometric(low, more, factor):
    high = low + more
    boundaries = distpad.Buckets.geometric(low, high, factor).boundaries
    assert boundaries[0] == low and boundaries[-1] == high
    assert all(a < b for a, b in zip(boundaries, boundaries[1:]))
    # the factor bounds the number of boundaries, whatever the rounding
    assert len(boundaries) <= math.ceil(math.log(high / low) / math.log(factor)) + 2
    # no step is wider than the factor, up to the rounding of the two boundaries
    assert all(b <= a + 1 or b <= (a + 0.5) * factor + 0.5 for a, b in zip(boundaries, boundaries[1:]))


@settings(relaxed, max_examples=20)
@given(BOUNDARIES, st.integers(0, 500), st.sampled_from(["raise", "multiples", "quarters"]))
def test_pad_to_global_max_rounds_alike(boundaries, n, beyond):
    """pad_to_global_max rounds in TensorFlow what Buckets rounds in Python."""
    buckets = distpad.Buckets(boundaries, beyond=beyond)
    if beyond == "raise" and n > boundaries[-1]:
        with pytest.raises(ValueError, match="length is above the last boundary of the buckets"):
            distpad.pad_to_global_max(tf.zeros([1, n]), buckets=buckets, backend="local")
    else:
        padded = distpad.pad_to_global_max(tf.zeros([1, n]), buckets=buckets, backend="local")
        assert padded.values.shape == (1, buckets(n))
        assert padded.lengths.numpy().tolist() == [n]


def test_boundaries_of_any_integer_type():
    assert distpad.Buckets(np.array([4, 8])).boundaries == distpad.Buckets(iter([4, 8])).boundaries == (4, 8)
    assert distpad.Buckets([4, 8])(np.int64(5)) == 8


@pytest.mark.parametrize("boundaries", [[], [0, 4], [-1], [4, 4], [8, 4]])
def test_boundaries_must_increase_from_1_on(boundaries):
    with pytest.raises(ValueError, match=r"Buckets: boundaries is \[.*\], expected increasing integers from 1 on"):
        distpad.Buckets(boundaries)


@pytest.mark.parametrize("boundaries", [[1.5, 2.5], [4, 8.5], ["4", "8"], [True, 2]])
def test_boundaries_are_integers(boundaries):
    """1.5 is not rounded to 1."""
    with pytest.raises((ValueError, TypeError), match="Buckets: boundaries"):
        distpad.Buckets(boundaries)


def test_other_errors():
    with pytest.raises(ValueError, match="beyond is 'cut', expected one of 'raise', 'multiples'"):
        distpad.Buckets([4], beyond="cut")
    with pytest.raises(ValueError, match=r"Buckets.geometric: factor is 1, expected above 1"):
        distpad.Buckets.geometric(4, 8, 1)
    with pytest.raises(ValueError, match=r"Buckets.geometric: low is 0, expected between 1 and high \(8\)"):
        distpad.Buckets.geometric(0, 8, 2)
    with pytest.raises(ValueError, match=r"Buckets.geometric: low is 9, expected between 1 and high"):
        distpad.Buckets.geometric(9, 8, 2)
    with pytest.raises(ValueError, match="expected"):
        distpad.Buckets.multiples(0)


@pytest.mark.parametrize("n", [-1, 2.5])
def test_a_length_is_a_non_negative_integer(n):
    with pytest.raises((ValueError, TypeError), match="length"):
        distpad.Buckets([4, 8])(n)


def test_buckets_compare_by_value():
    assert distpad.Buckets([4, 8]) == distpad.Buckets((4, 8)) != distpad.Buckets([4, 8], beyond="multiples")
    assert len({distpad.Buckets([4]), distpad.Buckets([4]), distpad.Buckets([5])}) == 2
    assert distpad.Buckets([4]) != [4]
    buckets = distpad.Buckets([4, 8], beyond="multiples")
    assert eval(repr(buckets), {"Buckets": distpad.Buckets}) == buckets


# -- the optimum ------------------------------------------------------------------------------------------------------


def padding_of(lengths, boundaries):
    return sum(min(boundary for boundary in boundaries if boundary >= n) - n for n in lengths)


@relaxed
@given(st.lists(st.integers(0, 30), min_size=1, max_size=25), st.integers(1, 5))
def test_no_buckets_with_as_many_boundaries_pads_less(lengths, boundaries):
    found = distpad.Buckets.from_lengths(lengths, boundaries).boundaries
    sizes = sorted({max(n, 1) for n in lengths})
    others = itertools.combinations(
        sizes[:-1], min(boundaries, len(sizes)) - 1
    )  # a boundary between two lengths is no better
    assert padding_of(lengths, found) == min(padding_of(lengths, [*other, sizes[-1]]) for other in others)
    assert len(found) <= boundaries and found[-1] == max(*lengths, 1)


@pytest.mark.one_stack
@pytest.mark.parametrize("seed", [0, *[pytest.param(seed, marks=pytest.mark.wide) for seed in range(1, 5)]])
def test_the_optimum_of_many_lengths(seed):
    """Compares with the plain recurrence, which tries every cut."""
    lengths = np.random.default_rng(seed).lognormal(4, 1, size=2000).astype(int)
    sizes, counts = np.unique(np.maximum(lengths, 1), return_counts=True)
    cost = [[sum(counts[i:j] * (sizes[j - 1] - sizes[i:j])) for j in range(len(sizes) + 1)] for i in range(len(sizes))]
    cost = np.array(cost, float)
    least = cost[0].copy()
    for _ in range(5):
        least = np.array([0.0, *(min(least[i] + cost[i][j] for i in range(j)) for j in range(1, len(sizes) + 1))])
    buckets = distpad.Buckets.from_lengths(lengths, 6)
    assert sum(buckets(int(n)) - max(int(n), 1) for n in lengths) == least[-1]


@pytest.mark.parametrize(
    ("lengths", "boundaries", "error", "words"),
    [
        ([], 2, ValueError, "lengths is empty, expected at least one"),
        ([1.5], 2, TypeError, "lengths is of float64, expected integers"),
        ([3, -1], 2, ValueError, "lengths is -1, expected at least 0"),
        ([3], 0, ValueError, "count is 0, expected at least 1"),
        ([3], 2.0, TypeError, r"count is 2\.0, expected an integer"),
    ],
)
def test_wrong_arguments_of_from_lengths(lengths, boundaries, error, words):
    with pytest.raises(error, match=words):
        distpad.Buckets.from_lengths(lengths, boundaries)


def test_lengths_above_the_longest_of_the_sample():
    assert distpad.Buckets.from_lengths([1, 4], 2, beyond="multiples")(9) == 12
    with pytest.raises(ValueError, match="the last boundary"):
        distpad.Buckets.from_lengths([1, 4], 2)(9)


def test_auto_boundaries_are_a_quarter_apart_and_go_on_forever():
    buckets = distpad.Buckets.auto()
    expected = [16, 20, 25, 32, 40, 50, 64, 80, 100, 126, 158]
    assert sorted({buckets(n) for n in range(159)}) == expected
    for n in [*range(3000), 10**6, 10**9 + 1]:
        index, boundary = buckets.index(n), buckets(n)
        assert boundary == buckets.boundary(index) >= n and (index == 0 or buckets.boundary(index - 1) < n)
        assert boundary < 32 or (boundary % 2 == 0 and boundary <= 1.25 * n + 2)
    assert distpad.Buckets([4, 10], beyond="quarters")(11) == 13 and repr(buckets) == "Buckets([16], beyond='quarters')"
    assert buckets == distpad.Buckets.auto() != distpad.Buckets([16])
