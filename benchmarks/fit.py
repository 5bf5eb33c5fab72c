#!/usr/bin/env python
"""Cost of a step of Keras's fit with for_keras, beside a loop over the same batches, and beside plain Keras.

The loop is written by hand, with the same model, loss and batches. Plain Keras has its own loss on batches of
``padded_batch``, and counts padding. Each batch has a longest example, so that all batches have the same shape.
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
  python benchmarks/fit.py
  python benchmarks/fit.py --replicas 2
  horovodrun -np 2 python benchmarks/fit.py --rounds 3
"""
LENGTH, FEATURES, CLASSES = 64, 16, 32
FED, LOOP, PLAIN = "fit with for_keras", "a loop by hand", "fit, plain Keras with padded_batch"


class Clock(tf.keras.callbacks.Callback):
    """Measures the seconds per step of an epoch, without the first step."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 0:
            self.began = time.perf_counter()
        self.steps = batch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds = (time.perf_counter() - self.began) / self.steps


def main() -> None:
    parser = rounds.parser(__doc__, EXAMPLES)
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="steps of an epoch (default 64)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="examples per replica (default 16)")
    parser.add_argument("--units", type=int, default=448, metavar="N", help="units of the model, to set the step time")
    parser.add_argument("--replicas", type=int, metavar="N", help="devices of this machine (default: of the launcher)")
    options = parser.parse_args()

    backend = engine.start(replicas=options.replicas)
    held = examples(options.steps, options.batch_size * backend.replicas_here, backend.worker_index)
    padding = {"x": distpad.Pad(), "y": distpad.Pad()}
    batches = distpad.PaddedBatches(held, options.batch_size, padding=padding, tokens="y", backend=backend)
    entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    exact = distpad.DistributedLoss(entropy, backend=backend)
    build = functools.partial(model, options.units)

    def loss(trained: tf.keras.Model, batch: distpad.Batch) -> tf.Tensor:
        return exact(batch.data["y"], trained(batch.data["x"], training=True), batch=batch)

    padded = plain_batches(held, options.batch_size * backend.replicas_here)
    contenders: dict[str, Callable[[], float]] = {
        FED: functools.partial(fit, compiled(build, exact, backend), batches.for_keras(x="x", y="y")),
        LOOP: functools.partial(loop, engine.Trainer(backend, build, loss), batches),
        PLAIN: functools.partial(fit, compiled(build, entropy, backend), padded),
    }
    for run in contenders.values():  # trace
        run()
    chief = backend.worker_index == 0
    figures = rounds.take_turns(contenders, FED, options.rounds, quiet=not chief)
    if chief:
        title = f"{backend.num_replicas} replicas ({backend.name}), {options.rounds} rounds of {options.steps} steps"
        rounds.show(title, "ms a step", figures, scale=1000)


def examples(steps: int, rows: int, worker: int) -> list[dict[str, np.ndarray]]:
    """Draw the examples of this worker: sequences of 4 to 64 positions, one of 64 in each step."""
    random = np.random.default_rng([0, worker])
    lengths = random.integers(4, LENGTH + 1, size=[steps, rows])
    lengths[:, 0] = LENGTH
    return [
        {"x": random.normal(size=[n, FEATURES]).astype(np.float32), "y": random.integers(CLASSES, size=n)}
        for n in lengths.ravel()
    ]


def model(units: int) -> tf.keras.Model:
    layers = [tf.keras.layers.Dense(units, activation="relu") for _ in range(2)]
    return tf.keras.Sequential([tf.keras.Input([None, FEATURES]), *layers, tf.keras.layers.Dense(CLASSES)])


def compiled(build: Callable[[], tf.keras.Model], loss: Any, backend: backends.Backend) -> tf.keras.Model:
    with backend.scope():
        made = build()
        optimizer = distpad.DistributedOptimizer(tf.keras.optimizers.SGD(1e-3))
        made.compile(loss=loss, optimizer=optimizer, jit_compile=False)
    return made


def plain_batches(held: list[dict[str, np.ndarray]], rows: int) -> tf.data.Dataset:
    """Batches by ``padded_batch``. As those of distpad, they are not sharded again."""
    lengths = [len(each["y"]) for each in held]
    x, y = (tf.RaggedTensor.from_row_lengths(np.concatenate([e[name] for e in held]), lengths) for name in ("x", "y"))
    options = tf.data.Options()
    options.autotune.enabled = False  # see distpad/data/keras.py
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    made = tf.data.Dataset.from_tensor_slices((x, y)).map(lambda *rows: tuple(tf.identity(row) for row in rows))
    made = made.padded_batch(rows, ([None, FEATURES], [None]))
    return made.prefetch(2).with_options(options)


def fit(trained: tf.keras.Model, data: Any) -> float:
    clock = Clock()
    trained.fit(data, verbose=0, callbacks=[clock])
    return clock.seconds


def loop(trainer: engine.Trainer, batches: distpad.PaddedBatches) -> float:
    steps = iter(batches)
    value = trainer.step(next(steps))
    strategy = getattr(trainer.backend, "strategy", None)
    began, count = time.perf_counter(), 0
    for batch in steps:
        value = trainer.step(batch)
        count += 1
    float(strategy.experimental_local_results(value)[0] if strategy else value)
    return (time.perf_counter() - began) / count


if __name__ == "__main__":
    main()
