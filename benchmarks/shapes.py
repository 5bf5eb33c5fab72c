#!/usr/bin/env python
"""The first epoch with and without buckets. Every new batch shape costs a trace and, with XLA, a compilation.

The batches have two ragged features, pictures and labels. Each run creates a new model and trains it for one epoch.
"""

from __future__ import annotations

import atexit
import functools
import os
import pathlib
import tempfile
import time

import engine
import numpy as np
import rounds
import tensorflow as tf
from rich.console import Console

import distpad
from distpad import backends

EXAMPLES = """\
examples:
  python benchmarks/shapes.py
  horovodrun -np 2 python benchmarks/shapes.py --steps 100
"""
SIZE, HEIGHT, CLASSES, UNITS = 8, 16, 32, 64
PADDING = {"image": distpad.Pad(), "label": distpad.Pad()}
BOUNDARIES = 6
BUCKETS = f"buckets of {BOUNDARIES}"


def main() -> None:
    parser = rounds.parser(__doc__, EXAMPLES, default=3)
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="steps of the epoch (default 60)")
    parser.add_argument("--count", action="store_true", help="count XLA's compilations by its dumps (slower)")
    options = parser.parse_args()
    dumped = count_compilations() if options.count else None

    backend = engine.start()
    count = options.steps * SIZE * backend.replicas_here
    held = [
        drawn(worker, count) for worker in range(backend.num_workers)
    ]  # the data of all workers, so that all workers compute the same buckets
    lengths = {name: [len(example[name]) for part in held for example in part] for name in PADDING}
    buckets = {name: distpad.Buckets.from_lengths(found, BOUNDARIES) for name, found in lengths.items()}
    reports: dict[str, str] = {}

    def first_epoch(name: str, buckets: dict[str, distpad.Buckets] | None, jit_compile: bool) -> float:
        trainer = engine.Trainer(backend, model, functools.partial(loss, backend), jit_compile=jit_compile)
        mine = held[backend.worker_index]
        batches = distpad.PaddedBatches(mine, SIZE, padding=PADDING, tokens="label", buckets=buckets, backend=backend)
        began, at = time.perf_counter(), []
        for step, batch in enumerate(batches):
            before = trainer.step.experimental_get_tracing_count()
            trainer.step(batch)
            if trainer.step.experimental_get_tracing_count() > before:
                at.append(step)
        seconds = time.perf_counter() - began
        reports[name] = f"{len(at)} traces of the step, at steps {at}"
        if dumped is not None and jit_compile:
            compiled = sorted(dumped.glob("*differentiate*.before_optimizations.txt"))
            reports[name] += f"; {len(compiled)} compilations by XLA"
            for path in compiled:
                path.unlink()
        return seconds

    contenders = {
        f"{name}{how}": functools.partial(first_epoch, f"{name}{how}", buckets, jit)
        for how, jit in (("", False), (", XLA", True))
        for name, buckets in ((BUCKETS, buckets), ("no buckets", None))
    }
    figures = rounds.take_turns(contenders, BUCKETS, options.rounds, quiet=backend.worker_index > 0)
    if backend.worker_index == 0:
        title = f"first epoch of {options.steps} steps, {backend.num_workers} workers ({backend.name})"
        rounds.show(title, "seconds", figures)
    for name, text in reports.items():
        Console(width=200).print(f"worker {backend.worker_index}, {name}: {text}", highlight=False)


def count_compilations() -> pathlib.Path:
    """Configure XLA to dump each compiled program. Return the dump folder; the process removes it at exit."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder.name} --xla_dump_hlo_as_text {os.environ.get('XLA_FLAGS', '')}"
    return pathlib.Path(folder.name)


def drawn(worker: int, count: int) -> list[dict[str, np.ndarray]]:
    """Draw pictures of 16 to 256 columns. A label has about one class for 16 columns."""
    random = np.random.default_rng([1, worker])
    widths = np.clip(random.lognormal(4, 0.8, count).astype(int), 16, 256)
    labels = np.maximum(1, widths // 16 + random.integers(-1, 3, count))
    return [
        {"image": random.normal(size=[w, HEIGHT]).astype(np.float32), "label": random.integers(CLASSES, size=n)}
        for w, n in zip(widths, labels)
    ]


def model() -> tf.keras.Model:
    """Build a model from columns to states. Label positions attend to the states."""
    layers = tf.keras.layers
    made = tf.keras.Sequential([layers.Dense(UNITS, activation="elu"), layers.Dense(CLASSES)])
    made.build([None, None, HEIGHT])
    return made


def loss(backend: backends.Backend, trained: tf.keras.Model, batch: distpad.Batch) -> tf.Tensor:
    """Compute the loss. Position k of a label attends to the columns near 16 k + 8."""
    states = trained(batch.data["image"])
    columns, positions = tf.shape(states)[1], tf.shape(batch.data["label"])[1]
    distance = tf.range(columns)[tf.newaxis] - (16 * tf.range(positions)[:, tf.newaxis] + 8)
    attention = tf.nn.softmax(-tf.abs(tf.cast(distance, tf.float32)) / 8)
    logits = tf.einsum("pc,bck->bpk", attention, states)
    counted = distpad.DistributedLoss(entropy, backend=backend)
    return counted(batch.data["label"], logits, lengths=batch.lengths["label"], denominator=batch.counts)


def entropy(true: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(true, logits)


if __name__ == "__main__":
    main()
