#!/usr/bin/env python
"""Cost of the window sync in a step: PaddedBatches against an oracle that knows all plans in advance.

The oracle is also PaddedBatches. It reads and pads the same batches, and moves them to the device, but replays recorded
sync results. The contenders sync every window of 4, 16, 32 and 128 steps. The last contender, written by hand, blocks
on one sync in each step, and then pads the batch.
"""

from __future__ import annotations

import concurrent.futures
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import engine
import numpy as np
import rounds
import tensorflow as tf

import distpad
from distpad import backends

EXAMPLES = """\
examples:
  horovodrun -np 2 python benchmarks/overhead.py
  launch/multiworker.sh -np 2 -- python benchmarks/overhead.py --rounds 3
"""
WINDOWS = (4, 16, 32, 128)
FEATURES, CLASSES = 16, 32
BUCKETS = distpad.Buckets([16, 32, 64])
PADDING = {"x": distpad.Pad(), "y": distpad.Pad()}


def main() -> None:
    parser = rounds.parser(__doc__, EXAMPLES)
    parser.add_argument("--steps", type=int, default=256, metavar="N", help="steps of a run (default 256)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="examples per replica (default 16)")
    parser.add_argument("--units", type=int, default=448, metavar="N", help="units of the model, to set the step time")
    parser.add_argument("--jit-compile", action="store_true", help="compile forward and backward pass with XLA")
    parser.add_argument("--mixed-precision", action="store_true", help="compute in float16, as GPUs do fast")
    options = parser.parse_args()

    backend = engine.start(mixed_precision=options.mixed_precision)
    build, loss_fn = functools.partial(model, options.units), functools.partial(loss, backend)
    trainer = engine.Trainer(backend, build, loss_fn, jit_compile=options.jit_compile)
    held = examples(backend, options.steps * options.batch_size * backend.replicas_here)
    make = functools.partial(
        distpad.PaddedBatches, held, options.batch_size, padding=PADDING, tokens="y", buckets=BUCKETS
    )
    oracle = oracle_of(backend)
    contenders: dict[str, Callable[[], Iterator[Any]]] = {"the oracle": make(backend=oracle).__iter__}
    contenders |= {f"a window of {n}": make(lookahead=n, backend=backend).__iter__ for n in WINDOWS}
    contenders["a sync in each step"] = functools.partial(blocking, backend, held, options.batch_size)
    for batches in contenders.values():  # trace the step, and record the sync results for the oracle
        run(trainer, batches)
    oracle.replays = True
    chief = backend.worker_index == 0
    timed = {name: functools.partial(run, trainer, batches) for name, batches in contenders.items()}
    figures = rounds.take_turns(timed, "the oracle", options.rounds, quiet=not chief)
    if chief:
        title = f"{backend.num_workers} workers ({backend.name}), {options.rounds} rounds of {options.steps} steps"
        rounds.show(title, "ms a step", figures, scale=1000)


def model(units: int) -> tf.keras.Model:
    layers = [tf.keras.layers.Dense(units, activation="relu") for _ in range(2)]
    made = tf.keras.Sequential([*layers, tf.keras.layers.Dense(CLASSES)])
    made.build([None, None, FEATURES])
    return made


def loss(backend: backends.Backend, trained: tf.keras.Model, batch: distpad.Batch) -> tf.Tensor:
    return loss_of(backend)(
        batch.data["y"], trained(batch.data["x"]), lengths=batch.lengths["y"], denominator=batch.counts
    )


@functools.lru_cache
def loss_of(backend: backends.Backend) -> distpad.DistributedLoss:
    entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    return distpad.DistributedLoss(entropy, backend=backend)


def examples(backend: backends.Backend, count: int) -> list[dict[str, np.ndarray]]:
    """Draw the examples of this worker: sequences of 4 to 64 positions."""
    random = np.random.default_rng([0, backend.worker_index])
    lengths = random.integers(4, 65, size=count)
    return [
        {"x": random.normal(size=[n, FEATURES]).astype(np.float32), "y": random.integers(CLASSES, size=n)}
        for n in lengths
    ]


def run(trainer: engine.Trainer, batches: Callable[[], Iterator[Any]]) -> float:
    """Run one epoch and return the seconds per step, without the first step."""
    steps = batches()
    float_of(trainer, trainer.step(next(steps)))
    began, count = time.perf_counter(), 0
    for batch in steps:
        value = trainer.step(batch)
        count += 1
    float_of(trainer, value)
    return (time.perf_counter() - began) / count


def float_of(trainer: engine.Trainer, value: Any) -> float:
    """Wait for a step, and return its loss on the first replica of this worker."""
    strategy = getattr(trainer.backend, "strategy", None)
    return float(strategy.experimental_local_results(value)[0] if strategy else value)


def oracle_of(backend: backends.Backend) -> Any:
    """Return the engine with a recorder of sync results. With ``replays``, the recorder replays the first epoch."""

    def host_merge(self: Any, *vectors_and_limits: Any) -> Any:
        if not self.replays:
            self.recorded.append(type(backend).host_merge(self, *vectors_and_limits))
            return self.recorded[-1]
        self.at += 1
        return self.recorded[(self.at - 1) % len(self.recorded)]

    made = object.__new__(type("Oracle", (type(backend),), {"host_merge": host_merge}))
    made.__dict__.update(backend.__dict__, replays=False, recorded=[], at=0)
    return made


def blocking(backend: backends.Backend, held: list[dict[str, np.ndarray]], size: int) -> Iterator[distpad.Batch]:
    """Yield batches in the usual way: sync length and count in each step, then pad the batch."""

    def read(step: int) -> list[dict[str, np.ndarray]]:
        return held[step * size : (step + 1) * size]

    steps = len(held) // size
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(read, 0)
        for step in range(steps):
            rows = following.result()
            following = ahead.submit(read, step + 1)
            lengths = np.array([len(row["y"]) for row in rows], np.int32)
            maxima, sums = np.array([float(lengths.max())]), np.array([float(lengths.sum()), float(len(rows))])
            maxima, sums = backend.host_merge(maxima, sums, 600.0)
            length = BUCKETS(int(maxima[0]))
            data = {name: distpad.pad([row[name] for row in rows], length=length).values for name in ("x", "y")}
            indices = np.arange(step * size, (step + 1) * size)
            counts = distpad.Counts(np.float64(sums[0]), np.float64(sums[1]))
            batch = distpad.Batch(data, {"x": lengths, "y": lengths}, np.int32(size), counts, indices)
            yield backend.to_device([batch])


if __name__ == "__main__":
    main()
