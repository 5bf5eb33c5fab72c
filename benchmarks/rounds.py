"""Rounds: contenders take turns, so that whatever else the machine does meets them all alike."""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from scipy import stats
from tqdm import tqdm

ROUNDS = 9
COVERAGE = 0.95


def take_turns(
    contenders: Mapping[str, Callable[[], float]], rounds: int = ROUNDS, *, quiet: bool = False
) -> dict[str, list[float]]:
    """Run each contender once a round, in another order each round (the same on all workers).

    Args:
      contenders: what is measured; each returns its own figure, such as seconds a step.
      rounds: figures of each.
      quiet: no progress bar, as on all workers but the first.
    """
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    order = []
    for turn in range(rounds):
        order += random.Random(turn).sample([*contenders], len(contenders))
    for name in tqdm(order, unit="run", disable=quiet, file=sys.stderr, mininterval=1):
        figures[name].append(contenders[name]())
    return figures


def ratios(figures: Mapping[str, Sequence[float]], base: str) -> dict[str, list[float]]:
    """Each contender's figure over that of ``base`` in the same round."""
    return {name: [a / b for a, b in zip(found, figures[base])] for name, found in figures.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where their median lies with at least 95 %, whatever their distribution: two of the values in order.

    Of fewer than six values none are so far apart: then the least and the largest.
    """
    count, outside = len(values), 0  # so many are left out at each end
    while 2 * stats.binom.cdf(outside + 1, count, 0.5) <= 1 - COVERAGE:
        outside += 1
    ordered = sorted(values)
    return ordered[outside], ordered[-1 - outside]


def show(title: str, unit: str, figures: Mapping[str, Sequence[float]], base: str, *, scale: float = 1.0) -> None:
    """Print a table: the median figure of each contender, and the median of its ratios to ``base`` with an interval."""
    table = Table(title=title, title_justify="left")
    table.add_column("contender")
    for heading in (f"{unit}, median", f"ratio to {base}", "95 % interval"):
        table.add_column(heading, justify="right")
    for name, found in ratios(figures, base).items():
        low, high = interval(found)
        median = f"{statistics.median(figures[name]) * scale:,.2f}"
        bounds = "" if name == base else f"{low:.3f} to {high:.3f}"
        table.add_row(name, median, f"{statistics.median(found):.3f}", bounds)
    Console(width=110).print(table)
