#!/usr/bin/env python
"""Share of the time that a training step waits for its batch: PaddedBatches beside tf.data and grain.

Steps of 2, 5, 10 and 25 ms take batches of long sequences. A step sleeps in TensorFlow's runtime, in the kernel of
SleepDataset, without Python's lock (the GIL), as a process does while its GPU computes. The first table shows the share
of the epoch in which the loop waits for the next batch, without the first batch. The second table shows the time of
the steps over their time without an input pipeline: a pipeline in Python threads can delay the return to Python.
"""

from __future__ import annotations

import functools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import contenders
import engine
import rounds
import sequences
import tensorflow as tf
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import distpad
from distpad import backends

EXAMPLES = """\
examples:
  python benchmarks/waiting.py
  python benchmarks/waiting.py --rounds 3 --ms 2 10
"""
STEPS_MS = (2.0, 5.0, 10.0, 25.0)
ALONE = "no input pipeline"


class Run(NamedTuple):
    """Seconds of an epoch after its first batch: waiting for batches, and in steps."""

    waiting: float
    stepping: float


def main() -> None:
    parser = rounds.parser(__doc__, EXAMPLES)
    parser.add_argument("--steps", type=int, default=128, metavar="N", help="steps of a run (default 128)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="sequences of a batch (default 64)")
    parser.add_argument("--ms", type=float, nargs="+", default=STEPS_MS, help="times of a step (default 2 5 10 25)")
    options = parser.parse_args()

    backend = engine.start()
    chief = backend.worker_index == 0
    data = [{"y": item} for item in sequences.drawn(options.steps * options.batch_size)]
    pipelines = sources(backend, contenders.Workload(data, ("y",)), options.batch_size)
    steps = {ms: sleeper(ms) for ms in options.ms}
    for batches in pipelines.values():  # warm up
        run(lambda: None, batches)
    runs: dict[tuple[str, float], list[Run]] = {(name, ms): [] for name in pipelines for ms in steps}
    order = [key for turn in range(options.rounds) for key in random.Random(turn).sample([*runs], len(runs))]
    for name, ms in tqdm(order, unit="run", disable=not chief, file=sys.stderr, mininterval=1):
        runs[name, ms].append(run(steps[ms], pipelines[name]))
    if not chief:
        return
    alone = {ms: statistics.median(each.stepping for each in runs[ALONE, ms]) for ms in steps}
    Console().print(f"{options.rounds} rounds of {options.steps} steps, batches of {options.batch_size} sequences")
    if contenders.left_out():
        Console().print(contenders.left_out())
    show("Waiting for batches, % of the time", runs, lambda each, ms: 100 * each.waiting / sum(each))
    show("Time of the steps, over steps alone", runs, lambda each, ms: each.stepping / alone[ms])


def sleeper(ms: float) -> Callable[[], Any]:
    """Return a step that sleeps in TensorFlow's runtime."""
    endless = tf.data.Dataset.range(2**62)
    spec = tf.TensorSpec([], tf.int64)
    sleeping = tf.raw_ops.SleepDataset(
        input_dataset=tf.data.experimental.to_variant(endless),
        sleep_microseconds=round(1000 * ms),
        output_types=[spec.dtype],
        output_shapes=[spec.shape],
    )
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.inject_prefetch = False  # else it sleeps ahead, while the loop waits
    elements = iter(tf.data.experimental.from_variant(sleeping, spec).with_options(options))
    step = tf.function(lambda: next(elements), autograph=False)
    step()  # trace it
    return step


def sources(backend: backends.Backend, workload: contenders.Workload, size: int) -> dict[str, Iterable[Any]]:
    """The input pipelines, each of the same examples."""
    ours = functools.partial(contenders.padded_batches, backend, workload)
    mapped, sampler = contenders.mapped(workload), contenders.sampler(backend, workload, size)
    return {
        ALONE: range(-(-len(workload.examples) // size)),
        "padded_batch, prefetch": contenders.padded(mapped, size),
        **{name: make() for name, make in contenders.of_other_libraries(workload, size).items()},
        "distpad, list": ours(workload.examples, size),
        "distpad, list, sampler": ours((workload.examples, sampler), None),
        "distpad, Columns": ours(distpad.Columns(contenders.tensors(workload)), size),
        "distpad, tf.data": ours(mapped, size),
    }


def run(step: Callable[[], Any], batches: Iterable[Any]) -> Run:
    """Run one epoch. The first batch is not counted, since it begins the epoch."""
    epoch, waiting, stepping = iter(batches), 0.0, 0.0
    next(epoch)
    step()
    while True:
        began = time.perf_counter()
        if next(epoch, None) is None:
            return Run(waiting, stepping)
        taken = time.perf_counter()
        step()
        waiting += taken - began
        stepping += time.perf_counter() - taken


def show(title: str, runs: dict[tuple[str, float], list[Run]], figure: Callable[[Run, float], float]) -> None:
    """Print the medians of a figure, a row for each contender and a column for each time of a step."""
    table = Table(title=title, title_justify="left")
    table.add_column("contender")
    times = [*dict.fromkeys(ms for _, ms in runs)]
    for ms in times:
        table.add_column(f"{ms:g} ms", justify="right")
    for name in dict.fromkeys(name for name, _ in runs):
        cells = [f"{statistics.median(figure(each, ms) for each in runs[name, ms]):.2f}" for ms in times]
        table.add_row(name, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
