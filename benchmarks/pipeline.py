#!/usr/bin/env python
"""Examples per second of the input pipeline alone: PaddedBatches by source, beside tf.data and other libraries.

The consumer only takes the batches. Each contender runs one epoch to warm up; then the contenders of a workload take
turns, an epoch each. The first table of a workload shows examples per second of wall time, and per second of CPU time
of the whole process, all threads included. The second table shows for each source of PaddedBatches the time from the
beginning of an epoch to its first batch, and the number of calls of Python functions per example in a later epoch.

Workloads: sequences of about 14 and of about 230 integers; images of 32 to 256 columns of 32 pixels; several features
(two of varying length, a vector and a string); and a slow source, whose examples take 2 ms each.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import contenders
import engine
import numpy as np
import rounds
import sequences
from rich.console import Console
from rich.table import Table

import distpad
from distpad import backends

EXAMPLES = """\
examples:
  python benchmarks/pipeline.py
  python benchmarks/pipeline.py --rounds 3 --examples 4096 --workloads short slow
"""
OWN = "distpad, "  # names of PaddedBatches begin with it
BASE, ONE_READ = "padded_batch, mapped", f"{OWN}1 read"
HEIGHT, READS, READ_S = 32, 16, 0.002
Makers = dict[str, Callable[[], Iterable[Any]]]


class Run(NamedTuple):
    """An epoch of a contender: examples per second of wall time and of CPU time."""

    name: str
    wall: float
    cpu: float


def main() -> None:
    parser = rounds.parser(__doc__, EXAMPLES)
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="examples of a batch (default 64)")
    count = "examples of an epoch of short sequences, of other workloads a fixed part of it (default 16384)"
    parser.add_argument("--examples", type=int, default=16384, metavar="N", help=count)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=[*WORKLOADS], help="default: all")
    options = parser.parse_args()

    backend = engine.start()
    chief = backend.worker_index == 0
    if chief and contenders.left_out():
        Console().print(contenders.left_out())
    for name in options.workloads:
        part, draw = WORKLOADS[name]
        workload = draw(max(1, options.examples // part // options.batch_size) * options.batch_size)
        make = slow if name == "slow" else functools.partial(usual, mapped_file=name == "short")
        makers = make(backend, workload, options.batch_size)
        base = ONE_READ if name == "slow" else BASE
        runs = compare(makers, base, options, quiet=not chief)
        startups = {
            own: startup(maker, options) for own, maker in makers.items() if own.startswith(OWN)
        }  # all workers take part
        if chief:
            title = f"{name}: batches of {options.batch_size}, {options.rounds} epochs of {len(workload.examples):,}"
            show(title, makers, runs, base)
            show_startups(f"{name}: beginning of an epoch, and Python", startups)


# -- workloads --------------------------------------------------------------------------------------------------------


def short_sequences(count: int) -> contenders.Workload:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(2.5, 0.6, count).astype(int), 1, 64)
    return contenders.Workload([{"y": random.integers(1, 128, size=n)} for n in lengths], ("y",))


def long_sequences(count: int) -> contenders.Workload:
    return contenders.Workload([{"y": item} for item in sequences.drawn(count)], ("y",))


def images(count: int, dtype: Any) -> contenders.Workload:
    """Images of 32 to 256 columns of 32 pixels."""
    random = np.random.default_rng(0)
    widths = random.integers(32, 257, size=count)
    return contenders.Workload(
        [{"image": random.integers(256, size=[w, HEIGHT]).astype(dtype)} for w in widths], ("image",)
    )


def several_features(count: int) -> contenders.Workload:
    """Two features of varying length, a vector, and a string."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(3, 0.7, count).astype(int), 4, 128)
    examples = [
        {
            "x": random.normal(size=[n, 8]).astype(np.float32),
            "y": random.integers(1, 128, size=n // 2),
            "speaker": random.normal(size=16).astype(np.float32),
            "name": b"example %d" % i,
        }
        for i, n in enumerate(lengths)
    ]
    return contenders.Workload(examples, ("y", "x"))


# from names to the divisor of --examples, and the function that draws the examples
WORKLOADS: dict[str, tuple[int, Callable[[int], contenders.Workload]]] = {
    "short": (1, short_sequences),
    "long": (4, long_sequences),
    "float-images": (8, functools.partial(images, dtype=np.float32)),
    "uint8-images": (8, functools.partial(images, dtype=np.uint8)),
    "several": (4, several_features),
    "slow": (16, short_sequences),
}


# -- contenders -------------------------------------------------------------------------------------------------------


def usual(backend: backends.Backend, workload: contenders.Workload, size: int, *, mapped_file: bool) -> Makers:
    """Contenders in memory. ``mapped_file``: and PaddedBatches over a memory-mapped file."""
    examples, mapped, unmapped = workload.examples, contenders.mapped(workload), contenders.unmapped(workload)
    ours = functools.partial(contenders.padded_batches, backend, workload)
    sampler, columns = contenders.sampler(backend, workload, size), distpad.Columns(contenders.tensors(workload))
    makers: Makers = {
        BASE: lambda: contenders.padded(mapped, size),
        "ragged_batch + to_tensor, mapped": lambda: contenders.ragged(mapped, size),
        "ragged_batch + to_tensor, unmapped": lambda: contenders.ragged(unmapped, size),
        "bucket_by_sequence_length": lambda: contenders.bucketed(workload, mapped, size),
        "NumPy by hand, list": lambda: contenders.by_hand(workload, size),
        "NumPy by hand, one array": lambda: contenders.by_hand_flat(workload, size),
        **contenders.of_other_libraries(workload, size),
        f"{OWN}list": lambda: ours(examples, size),
        f"{OWN}list, sampler": lambda: ours((examples, sampler), None),
        f"{OWN}Columns": lambda: ours(columns, size),
        f"{OWN}Columns, sampler": lambda: ours((columns, sampler), None),
        f"{OWN}tf.data, mapped": lambda: ours(mapped, size),
        f"{OWN}tf.data, unmapped": lambda: ours(unmapped, size),
    }
    if mapped_file:
        rows, lengths = mapped_rows(workload), workload.lengths
        makers[f"{OWN}memmap, rows of {rows.shape[1]}"] = lambda: ours(FixedRows(rows, lengths), size)
        columns_of_rows = distpad.Columns({"y": rows, "length": lengths})
        makers[f"{OWN}Columns of memmap, rows of {rows.shape[1]}"] = lambda: ours(columns_of_rows, size)
    return makers


def slow(backend: backends.Backend, workload: contenders.Workload, size: int) -> Makers:
    """Contenders over a source whose examples take 2 ms each."""
    source, sampler = Slow(workload.examples), contenders.sampler(backend, workload, size)
    ours = functools.partial(contenders.padded_batches, backend, workload)

    def pooled() -> Iterable[Any]:
        with futures.ThreadPoolExecutor(READS) as pool:
            examples = pool.map(source.__getitem__, range(len(source)))
            while batch := [*itertools.islice(examples, size)]:
                yield contenders.pad_examples(workload.padded, batch)

    makers: Makers = {
        ONE_READ: lambda: ours(source, size, num_parallel_reads=1),
        f"{OWN}{READS} reads": lambda: ours(source, size, num_parallel_reads=READS),
        f"{OWN}sampler, {READS} reads": lambda: ours((source, sampler), None, num_parallel_reads=READS),
        f"threads by hand, {READS} reads": lambda: contenders.Iterations(pooled),
    }
    if contenders.grain is not None:
        makers[f"grain, {READS} reads"] = lambda: contenders.grain_dataset(workload, size, source)
    return makers


class Slow:
    """A source whose examples take 2 ms each, as from a disk or a network."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Any:
        time.sleep(READ_S)
        return self._examples[index]


class FixedRows:
    """A source of rows of one size, and of their lengths."""

    def __init__(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        self._rows, self._lengths = rows, lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"y": self._rows[index], "length": self._lengths[index]}


def mapped_rows(workload: contenders.Workload) -> np.memmap:
    """Write the sequences as rows of one size to a file, and map it. The process removes the file at exit."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    padded = contenders.pad_examples(workload.padded, workload.examples)["y"]
    path = Path(folder.name) / "rows.npy"
    np.save(path, padded)
    return np.load(path, mmap_mode="r")


# -- measurements -----------------------------------------------------------------------------------------------------


def compare(makers: Makers, base: str, options: argparse.Namespace, *, quiet: bool) -> list[Run]:
    """Run the contenders in turns. Each run of a contender follows a run of the base."""
    runs: list[Run] = []

    def timed(name: str, batches: Iterable[Any]) -> float:
        wall, cpu = time.perf_counter(), time.process_time()
        examples = options.batch_size * take(batches)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        runs.append(Run(name, examples / wall, examples / cpu))
        return runs[-1].wall

    takers = {name: functools.partial(timed, name, make()) for name, make in makers.items()}
    for taker in takers.values():
        taker()  # warm up
    runs.clear()
    rounds.take_turns(takers, base, options.rounds, quiet=quiet)
    return runs


def take(batches: Iterable[Any]) -> int:
    """Take an epoch of batches. Return their number."""
    return sum(1 for _ in batches)


class Startup(NamedTuple):
    """Seconds to the first batch of the first and of the second epoch, and Python calls per example."""

    first: float
    second: float
    calls: float


def startup(make: Callable[[], Iterable[Any]], options: argparse.Namespace) -> Startup:
    """Measure the beginning of epochs, medians over new objects."""
    first, second = [], []
    for _ in range(options.rounds):
        batches = make()
        for seconds in (first, second):
            began = time.perf_counter()
            epoch = iter(batches)
            next(epoch)
            seconds.append(time.perf_counter() - began)
            if seconds is first:
                take(epoch)
        del epoch  # leave the second epoch
    return Startup(statistics.median(first), statistics.median(second), calls(make, options.batch_size))


def calls(make: Callable[[], Iterable[Any]], size: int) -> float:
    """Return the number of calls of Python functions per example, in all threads that Python started."""
    counter = itertools.count()

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            next(counter)

    batches = make()
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        take(batches)  # warm up, profiled as well: a thread that runs on keeps the profile function
        before = next(counter)
        examples = size * take(batches)
        return (next(counter) - before) / examples
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


# -- tables -----------------------------------------------------------------------------------------------------------


def show(title: str, names: Iterable[str], runs: Sequence[Run], base: str) -> None:
    """Print the medians of all contenders, and the medians of their ratios to the base, by wall and by CPU time."""
    table = Table(title=f"{title}; ratios to {base}", title_justify="left")
    table.add_column("contender")
    for heading in ("1000 a second", "ratio", "95 % interval", "1000 a CPU second", "ratio", "95 % interval"):
        table.add_column(heading, justify="right")
    by_name: dict[str, list[tuple[Run, Run]]] = {name: [] for name in names}
    for before, run in zip(runs[::2], runs[1::2]):
        by_name[base].append((before, before))
        by_name[run.name].append((before, run))
    for name, pairs in by_name.items():
        cells = []
        for clock in ("wall", "cpu"):
            own = [getattr(run, clock) for _, run in pairs]
            cells.append(f"{statistics.median(own) / 1000:,.1f}")
            ratios = [getattr(run, clock) / getattr(before, clock) for before, run in pairs]
            cells.append("1" if name == base else f"{statistics.median(ratios):.2f}")
            cells.append("" if name == base else "{:.2f} to {:.2f}".format(*rounds.interval(ratios)))
        table.add_row(name, *cells)
    Console(width=130).print(table)


def show_startups(title: str, startups: dict[str, Startup]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("contender")
    for heading in ("first epoch, ms to a batch", "second epoch, ms", "Python calls per example"):
        table.add_column(heading, justify="right")
    for name, found in startups.items():
        table.add_row(name, f"{1000 * found.first:.1f}", f"{1000 * found.second:.1f}", f"{found.calls:.2f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
