"""Ladder: the few lengths that batches are padded to, so that a step has few shapes."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterable

from distpad import errors


class Ladder:
    """Rounds a length up to the next of a few rungs.

    Args:
      boundaries: the rungs, positive whole numbers, rising.
      beyond: what a length above the last rung does: ``"raise"``, or ``"multiples"`` of the last rung.

    Raises:
      ValueError: no rungs, rungs that do not rise or are below 1, an unknown ``beyond``.
      TypeError: rungs that are no whole numbers.

    >>> ladder = Ladder([8, 16, 32])
    >>> ladder(9), ladder(16), ladder.boundaries
    (16, 16, (8, 16, 32))
    """

    def __init__(self, boundaries: Iterable[int], *, beyond: str = "raise") -> None:
        given = list(boundaries)
        if any(isinstance(rung, bool) or not hasattr(rung, "__index__") for rung in given):
            raise TypeError(errors.sentence("Ladder", "boundaries", given, "whole numbers"))
        self.boundaries = tuple(operator.index(rung) for rung in given)
        rising = all(a < b for a, b in zip(self.boundaries, self.boundaries[1:]))
        if not self.boundaries or self.boundaries[0] < 1 or not rising:
            raise ValueError(
                errors.sentence("Ladder", "boundaries", list(self.boundaries), "rising whole numbers from 1 on")
            )
        errors.choice("Ladder", "beyond", beyond, ("raise", "multiples"))
        self.beyond = beyond

    @classmethod
    def multiples(cls, m: int) -> Ladder:
        """Round up to the next multiple of ``m``, without an end.

        >>> Ladder.multiples(8)(17)
        24
        """
        return cls([m], beyond="multiples")

    @classmethod
    def geometric(cls, low: int, high: int, factor: float) -> Ladder:
        """Rungs from ``low`` to ``high``, each ``factor`` times the one before: padding stays in proportion to length.

        >>> Ladder.geometric(4, 64, 2.0).boundaries
        (4, 8, 16, 32, 64)
        """
        if not 1 <= low <= high:
            raise ValueError(errors.sentence("Ladder.geometric", "low", low, f"between 1 and high ({high})"))
        if not factor > 1:
            raise ValueError(errors.sentence("Ladder.geometric", "factor", factor, "above 1"))
        rungs, exact = [low], float(low)
        while rungs[-1] < high:
            exact *= factor
            rungs.append(min(high, max(rungs[-1] + 1, round(exact))))
        return cls(rungs)

    def __call__(self, n: int) -> int:
        """The smallest rung that is at least ``n``. Raises ValueError above the last, unless ``beyond="multiples"``."""
        if not hasattr(n, "__index__"):
            raise TypeError(errors.sentence("Ladder", "length", repr(n), "a whole number"))
        n = operator.index(n)
        if n < 0:
            raise ValueError(errors.sentence("Ladder", "length", n, "at least 0"))
        last = self.boundaries[-1]
        if n <= last:
            return self.boundaries[bisect.bisect_left(self.boundaries, n)]
        if self.beyond == "multiples":
            return -(-n // last) * last
        raise ValueError(
            errors.sentence(
                "Ladder", "length", n, f"at most {last}, the last rung", "Add a rung, or beyond='multiples'."
            )
        )

    def __repr__(self) -> str:
        return f"Ladder({list(self.boundaries)}, beyond={self.beyond!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ladder) and (self.boundaries, self.beyond) == (other.boundaries, other.beyond)

    def __hash__(self) -> int:
        return hash((self.boundaries, self.beyond))
