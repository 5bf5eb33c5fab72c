#!/usr/bin/env python
"""Held-out errors of the handwriting example: batches of similar widths against a full shuffle, over the same seeds.

Each run is examples/handwriting/train.py on one device. Several replicas give the same result up to rounding. Two runs
run in parallel. Errors are character error rates. Differences are in percentage points.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

EXAMPLES = """\
examples:
  python benchmarks/convergence.py
  python benchmarks/convergence.py --seeds 1 --steps 200
"""
TRAIN = Path(__file__).resolve().parents[1] / "examples" / "handwriting" / "train.py"
SHUFFLED = "full shuffle"
VARIANTS = {
    SHUFFLED: ["--randomness", "1"],
    "similar widths": [],
    "similar widths, average over characters": ["--average", "token"],
    # columns: the average of 32 padded strings; average: the average number of characters of 32 strings
    "a budget of columns, constant average": ["--max-columns", "3700", "--average", "208"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds (default 3)")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="steps of each run (default 1000)")
    parser.add_argument("--eval-strings", type=int, default=4000, metavar="N", help="held-out strings (default 4000)")
    options = parser.parse_args()
    common = ["--steps", str(options.steps), "--eval-strings", str(options.eval_strings)]
    runs = [(name, seed) for seed in range(options.seeds) for name in VARIANTS]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda run: error_rate([*VARIANTS[run[0]], "--seed", str(run[1]), *common]), runs)
        found = dict(zip(runs, tqdm(done, total=len(runs), unit="run")))
    table = Table(title=f"{options.seeds} seeds, {options.steps} steps, {options.eval_strings} held-out strings")
    for heading in ("batches", "character errors, %", "points above the full shuffle", "mean"):
        table.add_column(heading, justify="left" if heading == "batches" else "right")
    for name in VARIANTS:
        rates = [found[name, seed] for seed in range(options.seeds)]
        above = [rate - found[SHUFFLED, seed] for seed, rate in enumerate(rates)]
        texts = (
            " ".join(f"{100 * value:{form}}" for value in values) for values, form in ((rates, ".2f"), (above, "+.2f"))
        )
        table.add_row(name, *texts, f"{100 * statistics.mean(above):+.2f}")
    Console(width=110).print(table)


def error_rate(arguments: list[str]) -> float:
    """Train a reader and return its character error rate."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(TRAIN), "--backend", "local", "--no-drift", "--out", out, *arguments]
        settings = {"TF_NUM_INTRAOP_THREADS": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env={**os.environ, **settings}, check=True, capture_output=True)
        return float(json.loads(Path(out, "summary.json").read_text())["character_error_rate"])


if __name__ == "__main__":
    main()
