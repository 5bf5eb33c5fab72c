"""Rounds: contenders take turns, so that other load on the machine affects all contenders alike."""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from scipy import stats
from tqdm import tqdm

ROUNDS = 9
COVERAGE = 0.95


class Figures(NamedTuple):
    """Measurements: the figures of each contender, and their ratios to the base."""

    own: dict[str, list[float]]
    ratios: dict[str, list[float]]
    base: str


def parser(description: str, examples: str, *, default: int = ROUNDS) -> argparse.ArgumentParser:
    """A parser with the option --rounds."""
    found = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    help_text = f"number of rounds (default {default})"
    found.add_argument("--rounds", type=int, default=default, metavar="N", help=help_text)
    return found


def take_turns(
    contenders: Mapping[str, Callable[[], float]], base: str, rounds: int = ROUNDS, *, quiet: bool = False
) -> Figures:
    """Run each contender once a round, and the base before each contender.

    The order changes each round, and is the same on all workers. The two runs of a ratio follow one another, so a slow
    minute of the machine affects both.

    Args:
      contenders: functions to measure; each returns its figure, for example seconds per step.
      base: name of the contender to compare with.
      rounds: number of figures of each contender.
      quiet: show no progress bar; true on all workers except the first.
    """
    own: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, list[float]] = {name: [] for name in contenders if name != base}
    order = []
    for turn in range(rounds):
        order += random.Random(turn).sample([*found], len(found))
    for name in tqdm(order, unit="run", disable=quiet, file=sys.stderr, mininterval=1):
        own[base].append(contenders[base]())
        own[name].append(contenders[name]())
        found[name].append(own[name][-1] / own[base][-1])
    return Figures(own, found, base)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return an interval that contains the median with at least 95 %, for any distribution.

    Both ends are values of the sample. Fewer than six values give no 95 %; the ends are then minimum and maximum.
    """
    count, outside = len(values), 0  # number of values to exclude at each end
    while 2 * stats.binom.cdf(outside + 1, count, 0.5) <= 1 - COVERAGE:
        outside += 1
    ordered = sorted(values)
    return ordered[outside], ordered[-1 - outside]


def show(title: str, unit: str, figures: Figures, *, scale: float = 1.0) -> None:
    """Print a table: the median figure of each contender, and the median of its ratios with an interval."""
    table = Table(title=title, title_justify="left")
    table.add_column("contender")
    for heading in (f"{unit}, median", f"ratio to {figures.base}", "95 % interval"):
        table.add_column(heading, justify="right")
    for name, own in figures.own.items():
        median = f"{statistics.median(own) * scale:,.2f}"
        if name == figures.base:
            table.add_row(name, median, "1", "")
            continue
        low, high = interval(figures.ratios[name])
        table.add_row(name, median, f"{statistics.median(figures.ratios[name]):.3f}", f"{low:.3f} to {high:.3f}")
    Console(width=110).print(table)
