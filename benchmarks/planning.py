#!/usr/bin/env python
"""Time of the plans that every worker computes locally: the best buckets, and an epoch of a LengthSampler."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console
from rich.table import Table

import distpad

EXAMPLES = """\
examples:
  python benchmarks/planning.py
  python benchmarks/planning.py --examples 10000000
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="number of rounds (default 5)")
    parser.add_argument("--examples", type=int, default=1_000_000, metavar="N", help="epoch size (default 1000000)")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5, 1, options.examples).astype(int), 16, 1024)
    different = random.permutation(10 * 100_000)[:100_000] + 1  # all lengths differ: the hardest case
    buckets = distpad.Buckets.from_lengths(lengths, 6)
    epochs = iter(range(10**6))  # a new epoch each time, because the sampler caches plans

    def planned(**size: int) -> Callable[[], object]:
        sampler = distpad.LengthSampler(lengths, buckets=buckets, **size)
        return lambda: sampler.plan(next(epochs))

    table = Table(title=f"Seconds, medians of {options.rounds}", title_justify="left")
    table.add_column("operation")
    table.add_column("seconds", justify="right")
    for name, work in {
        "Buckets.from_lengths, 100,000 different lengths, 8 boundaries": lambda: distpad.Buckets.from_lengths(
            different, 8
        ),
        f"construction of a LengthSampler, {options.examples:,} lengths": lambda: planned(global_batch_size=256),
        f"plan of an epoch of {options.examples:,}, 256 examples a step": planned(global_batch_size=256),
        f"plan of an epoch of {options.examples:,}, 65,536 tokens a step": planned(max_tokens=65_536),
    }.items():
        table.add_row(name, f"{statistics.median(seconds(work) for _ in range(options.rounds)):.2f}")
    Console(width=100).print(table)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
