#!/usr/bin/env python
"""Cost of DistributedLoss in a step, against a handwritten masked sum over a constant.

PaddedBatches provides the global count. With this count, the step has no collective except the gradient all-reduce. A
count in the step needs one more small all-reduce, as a handwritten count does.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import engine
import numpy as np
import rounds
import tensorflow as tf

import distpad
from distpad import backends

EXAMPLES = """\
examples:
  python benchmarks/wrapper.py
  python benchmarks/wrapper.py --replicas 4
  horovodrun -np 2 python benchmarks/wrapper.py
"""
LENGTH, FEATURES, CLASSES = 64, 16, 32
BY_HAND = "by hand"
COUNT = 1000.0  # common denominator of all contenders, so that they train alike


def main() -> None:
    parser = rounds.parser(__doc__, EXAMPLES)
    parser.add_argument("--replicas", type=int, metavar="N", help="replicas of one process (default: the launcher's)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="steps of a run (default 100)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="examples per replica (default 16)")
    parser.add_argument("--units", type=int, default=448, metavar="N", help="units of the model, to set the step time")
    options = parser.parse_args()

    backend = engine.start(replicas=options.replicas)
    batch = backend.to_device([drawn(r, options.batch_size) for r in range(backend.replicas_here)])
    contenders = {
        name: functools.partial(run, trainer, batch, options.steps)
        for name, trainer in trainers(backend, options.units)
    }
    for warm in contenders.values():
        warm()
    figures = rounds.take_turns(contenders, BY_HAND, options.rounds, quiet=backend.worker_index > 0)
    if backend.worker_index == 0:
        title = f"{backend.num_replicas} replicas ({backend.name}), {options.rounds} rounds of {options.steps} steps"
        rounds.show(title, "ms a step", figures, scale=1000)


def drawn(replica: int, size: int) -> dict[str, np.ndarray]:
    """Draw a batch of one replica, with lengths of 4 to 64."""
    random = np.random.default_rng([0, replica])
    return {
        "x": random.normal(size=[size, LENGTH, FEATURES]).astype(np.float32),
        "y": random.integers(CLASSES, size=[size, LENGTH]).astype(np.int32),
        "lengths": random.integers(4, LENGTH + 1, size=size).astype(np.int32),
    }


def model(units: int) -> tf.keras.Model:
    layers = [tf.keras.layers.Dense(units, activation="relu") for _ in range(2)]
    made = tf.keras.Sequential([*layers, tf.keras.layers.Dense(CLASSES)])
    made.build([None, None, FEATURES])
    return made


def trainers(backend: backends.Backend, units: int) -> list[tuple[str, engine.Trainer]]:
    """Return each contender's name and trainer. Each trainer has its own model."""
    entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    wrapped = distpad.DistributedLoss(entropy, backend=backend)

    def by_hand(trained: tf.keras.Model, batch: dict[str, Any]) -> tf.Tensor:
        mask = tf.sequence_mask(batch["lengths"], LENGTH)
        return tf.reduce_sum(tf.where(mask, entropy(batch["y"], trained(batch["x"])), 0.0)) / COUNT

    def with_count(trained: tf.keras.Model, batch: dict[str, Any]) -> tf.Tensor:
        return wrapped(batch["y"], trained(batch["x"]), lengths=batch["lengths"], denominator=COUNT)

    def counting(trained: tf.keras.Model, batch: dict[str, Any]) -> tf.Tensor:
        return wrapped(batch["y"], trained(batch["x"]), lengths=batch["lengths"])

    losses: dict[str, Callable[[tf.keras.Model, Any], tf.Tensor]] = {
        BY_HAND: by_hand,
        "denominator given": with_count,
        "counting in the step": counting,
    }
    return [(name, engine.Trainer(backend, functools.partial(model, units), loss)) for name, loss in losses.items()]


def run(trainer: engine.Trainer, batch: Any, steps: int) -> float:
    """Run the steps and return the seconds per step, without the first step."""
    wait_for(trainer, trainer.step(batch))
    began = time.perf_counter()
    for _ in range(steps):
        value = trainer.step(batch)
    wait_for(trainer, value)
    return (time.perf_counter() - began) / steps


def wait_for(trainer: engine.Trainer, value: Any) -> None:
    strategy = getattr(trainer.backend, "strategy", None)
    for mine in strategy.experimental_local_results(value) if strategy else [value]:
        mine.numpy()


if __name__ == "__main__":
    main()
