"""Buckets: the boundaries to which lengths are padded, so that a step has few shapes."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Any

import numpy as np

from distpad import errors

_LONGEST = 2**63  # no length is larger
_MOST = 2**16  # boundaries


class Buckets:
    """Round a length up to the next boundary.

    Args:
      boundaries: positive integers in increasing order.
      beyond: the rule for a length above the last boundary: ``"raise"`` an error; round up to ``"multiples"`` of the
        last boundary; or ``"quarters"``: further boundaries, each a quarter above the previous one, rounded up to even
        numbers from 32 on.

    Raises:
      ValueError: no boundaries, boundaries that do not increase or are below 1, or an unknown ``beyond``.
      TypeError: boundaries that are not integers.

    >>> buckets = Buckets([8, 16, 32])
    >>> buckets(9), buckets(16), buckets.boundaries
    (16, 16, (8, 16, 32))
    """

    def __init__(self, boundaries: Iterable[int], *, beyond: str = "raise") -> None:
        is_listed = isinstance(boundaries, Iterable)
        errors.require("Buckets", is_listed, "boundaries", errors.shown(boundaries), "a list", error=TypeError)
        self.boundaries = tuple(errors.integer("Buckets", "boundaries", each, -(2**62)) for each in boundaries)
        increasing = all(a < b for a, b in zip(self.boundaries, self.boundaries[1:]))
        is_valid = increasing and self.boundaries and self.boundaries[0] >= 1
        errors.require("Buckets", is_valid, "boundaries", list(self.boundaries), "increasing integers from 1 on")
        errors.choice("Buckets", "beyond", beyond, ("raise", "multiples", "quarters"))
        self.beyond = beyond
        self._all = [*self.boundaries]
        while beyond == "quarters" and self._all[-1] < _LONGEST:
            more = -(-5 * self._all[-1] // 4)
            self._all.append(more + more % 2 if more >= 32 else more)

    @classmethod
    def multiples(cls, m: int) -> Buckets:
        """Round up to the next multiple of ``m``, without a last boundary.

        >>> Buckets.multiples(8)(17)
        24
        """
        return cls([m], beyond="multiples")

    @classmethod
    def auto(cls) -> Buckets:
        """The boundaries 16, 20, 25, 32, 40, 50, 64, ..., each about a quarter above the previous one, without a last.

        >>> buckets = Buckets.auto()
        >>> buckets(3), buckets(21), buckets(126), buckets(127)
        (16, 25, 126, 158)
        """
        return cls([16], beyond="quarters")

    @classmethod
    def geometric(cls, low: int, high: int, factor: float) -> Buckets:
        """Boundaries from ``low`` to ``high``, each ``factor`` times the previous one.

        >>> Buckets.geometric(4, 64, 2.0).boundaries
        (4, 8, 16, 32, 64)
        """
        name = "Buckets.geometric"
        high = errors.integer(name, "high", high, least=1)
        low, ratio = errors.integer(name, "low", low, -(2**62)), errors.number(name, "factor", factor)
        errors.require(name, 1 <= low <= high, "low", low, f"between 1 and high ({high})")
        errors.require(name, ratio > 1, "factor", factor, "above 1")
        boundaries, exact = [low], float(low)
        while boundaries[-1] < high:
            remedy = "Give a larger factor."
            errors.require(
                name, len(boundaries) < _MOST, "factor", factor, f"one for at most {_MOST} boundaries", remedy
            )
            exact = min(exact * ratio, high)
            boundaries.append(min(high, max(boundaries[-1] + 1, round(exact))))
        return cls(boundaries)

    @classmethod
    def from_lengths(cls, lengths: Any, count: int, *, beyond: str = "raise") -> Buckets:
        """The boundaries that minimise the padding of ``lengths``.

        Among all sets of at most ``count`` boundaries, they have the least sum of ``buckets(n) - n`` over all lengths.
        The last boundary is the longest length.

        Args:
          lengths: at least one non-negative integer: the lengths of the data set, or a sample of them.
          count: the largest number of boundaries; there are fewer if there are fewer different lengths.
          beyond: the rule for lengths above the last boundary, as in ``Buckets``.

        Raises:
          ValueError: no lengths, a negative length, or a ``count`` below 1.
          TypeError: not integers.

        Source: the cost of one boundary for a range of lengths is Monge, so that best cuts do not cross: F. F. Yao,
        Efficient dynamic programming using quadrangle inequalities, STOC 1980.

        >>> Buckets.from_lengths([2, 2, 2, 3, 9, 10], count=2).boundaries
        (3, 10)
        """
        name = "Buckets.from_lengths"
        given = read_lengths(name, lengths)
        errors.require(name, given.size, "lengths", "empty", "at least one")
        is_small = int(given.max()) * given.size < _LONGEST
        errors.require(name, is_small, "lengths", int(given.max()), f"below 2**63 / {given.size}, their number")
        count = errors.integer(name, "count", count, least=1)
        # a boundary is at least 1, so that lengths 0 and 1 need the same boundary
        sizes, counts = np.unique(np.maximum(given.ravel(), 1), return_counts=True)
        return cls((int(size) for size in _least_padding(sizes, counts, count)), beyond=beyond)

    def __call__(self, n: int) -> int:
        """Return the smallest boundary that is at least ``n``. ValueError above the last, with ``beyond="raise"``."""
        return self.boundary(self.index(n))

    def index(self, n: int) -> int:
        """Return the index of the smallest boundary that is at least ``n``; the rule ``beyond`` continues the indices.

        >>> Buckets([8, 16], beyond="multiples").index(40)
        3
        """
        n = errors.integer("Buckets", "length", n, least=0)
        last = self.boundaries[-1]
        if n > last and self.beyond == "multiples":
            return len(self.boundaries) - 2 - (-n // last)
        most, remedy = self._all[-1], "Add a boundary, or beyond='multiples'."
        errors.require("Buckets", n <= most, "length", n, f"at most {most}, the last boundary", remedy)
        return bisect.bisect_left(self._all, n)

    def boundary(self, index: int) -> int:
        """Return the boundary of an index that ``index`` returned."""
        if index < len(self._all):
            return self._all[index]
        return (index - len(self.boundaries) + 2) * self.boundaries[-1]

    def __repr__(self) -> str:
        return f"Buckets({list(self.boundaries)}, beyond={self.beyond!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Buckets) and (self.boundaries, self.beyond) == (other.boundaries, other.beyond)

    def __hash__(self) -> int:
        return hash((self.boundaries, self.beyond))


def read_lengths(function: str, lengths: Any) -> np.ndarray:
    """A copy of the ``lengths`` argument as int64. Raises: TypeError, ValueError."""
    if isinstance(lengths, np.ndarray):
        errors.check_memory(f"{function}: lengths", lengths.shape, lengths.dtype)
    try:
        given = np.asarray(lengths)
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise TypeError(errors.sentence(function, "lengths", errors.shown(lengths), "integers")) from error
    errors.require(function, not np.ma.is_masked(lengths), "lengths", "a masked array", "one without masked elements")
    is_integer = given.dtype.kind in "iu" or (not given.size and given.dtype == np.float64)  # as of an empty list
    errors.require(function, is_integer, "lengths", f"of {given.dtype}", "integers", error=TypeError)
    for length in [given.min(), given.max()] if given.size else []:
        errors.require(function, 0 <= int(length) < 2**62, "lengths", int(length), "at least 0, and below 2**62")
    return given.astype(np.int64)


def _least_padding(sizes: np.ndarray, counts: np.ndarray, count: int) -> list[int]:
    """Select boundaries from the increasing ``sizes``.

    Let C and S be the running sums of counts and of counts times sizes. ``cost[j]``, the least padding of the first j
    sizes, is the minimum over i < j of cost[i] with one boundary less, plus sizes[j-1] (C[j] - C[i]) - (S[j] - S[i]).
    """
    number = np.concatenate([[0], np.cumsum(counts)])
    total = np.concatenate([[0], np.cumsum(counts * sizes)])
    size = np.concatenate([[0], sizes])
    cost = size * number - total  # with one boundary for the first j sizes
    cuts = []
    for _ in range(min(count, len(sizes)) - 1):
        cut = _best_cuts(cost + total, number, size)
        cost = cost[cut] + size * (number - number[cut]) - (total - total[cut])
        cuts.append(cut)
    ends = [len(sizes)]
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1]]))
    return sorted({int(size[end]) for end in ends if end > 0})


def _best_cuts(start: np.ndarray, number: np.ndarray, size: np.ndarray) -> np.ndarray:
    """For each j the first i <= j with the least ``start[i] - size[j] * number[i]``.

    These i do not decrease as j grows. So the search begins with the j at multiples of a step; then the results of two
    neighbours bound the search for the j between them. One step takes n + n / step comparisons, all at once.
    """
    last = len(start) - 1
    best = np.zeros(last + 1, np.int64)
    step = 1 << max(last, 1).bit_length()
    while step > 1:
        step //= 2
        at = np.arange(step, last + 1, 2 * step)
        low, after = best[at - step], at + step
        high = np.where(after <= last, np.minimum(best[np.minimum(after, last)], at), at)
        begins = np.concatenate([[0], np.cumsum(high - low + 1)])
        where = np.repeat(np.arange(len(at)), high - low + 1)
        candidates = np.arange(begins[-1]) - begins[where] + low[where]
        values = start[candidates] - size[at][where] * number[candidates]
        least = np.minimum.reduceat(values, begins[:-1])
        hits = np.flatnonzero(values == least[where])
        best[at] = candidates[hits[np.searchsorted(hits, begins[:-1])]]
    return best
