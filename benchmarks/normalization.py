#!/usr/bin/env python
"""Batch normalisation on several replicas: how far each layer is from one device, and what a step costs.

The error is that of outputs and of gradients by the inputs, gamma and beta, relative to those of one device that
has the valid positions of all replicas, in float32. The cases are replicas with equally many rows, with different
numbers of rows, and with padding that a mask tells. The time is that of a forward and a backward pass of the layer.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import engine
import numpy as np
import rounds
import tensorflow as tf
from rich.console import Console
from rich.table import Table

import distpad
from distpad import backends

EXAMPLES = """
examples:
  python benchmarks/normalization.py --replicas 2
  launch/multiworker.sh -np 2 -- python benchmarks/normalization.py
  horovodrun -np 2 python benchmarks/normalization.py --rounds 3
"""
TIME, CHANNELS, EPSILON = 64, 64, 1e-3
OWN = "distpad"
CASES = ("equally many rows", "different numbers of rows", "padding, with a mask")


def main() -> None:
    parser = rounds.parser(__doc__, EXAMPLES)
    parser.add_argument("--replicas", type=int, metavar="N", help="replicas of one process (default: the launcher's)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="steps of a run (default 50)")
    options = parser.parse_args()

    backend = backends.start("mirrored", options.replicas) if options.replicas else engine.start()
    steps = {name: Step(backend, make) for name, make in layers(backend).items()}
    errors = {name: [step.error(case) for case in CASES] for name, step in steps.items()}
    figures = rounds.take_turns(
        {name: functools.partial(step.seconds, options.steps) for name, step in steps.items()},
        OWN,
        options.rounds,
        quiet=backend.worker_index > 0,
    )
    if backend.worker_index == 0:
        title = f"{backend.num_replicas} replicas ({backend.name})"
        table = Table("layer", *CASES, title=f"{title}: largest relative error")
        for name, found in errors.items():
            table.add_row(name, *("refuses it" if math.isnan(error) else f"{error:.0e}" for error in found))
        Console().print(table)
        rounds.show(f"{title}, {options.rounds} rounds of {options.steps} steps", "ms a step", figures, scale=1000)


def layers(backend: backends.Backend) -> dict[str, Callable[[], Any]]:
    """What makes the layer of each contender that runs here."""
    found: dict[str, Callable[[], Any]] = {
        "Keras": tf.keras.layers.BatchNormalization,
        "Keras, synchronized=True": functools.partial(tf.keras.layers.BatchNormalization, synchronized=True),
    }
    if isinstance(backend, backends.HorovodBackend):
        import horovod.tensorflow as hvd

        try:
            hvd.SyncBatchNormalization()
            found["Horovod's SyncBatchNormalization"] = hvd.SyncBatchNormalization
        except Exception as error:  # it is a subclass of what Keras 3 no longer has
            print(f"left out: Horovod's SyncBatchNormalization ({type(error).__name__}: {error})")
    return {**found, OWN: distpad.layers.BatchNormalization}


def drawn(replica: int, case: str, size: int = 16) -> dict[str, np.ndarray]:
    """A replica's inputs and mask."""
    random = np.random.default_rng(replica)
    rows = size - replica % 2 * (size // 2) if case == CASES[1] else size
    lengths = random.integers(4, TIME + 1, rows) if case == CASES[2] else np.full(rows, TIME)
    mask = np.arange(TIME) < lengths[:, np.newaxis]
    x = random.normal(replica, 1 + replica, [rows, TIME, CHANNELS]).astype(np.float32)
    return {"x": np.where(mask[..., np.newaxis], x, 0), "mask": mask}


class Step:
    """A forward and a backward pass of one layer on all replicas."""

    def __init__(self, backend: backends.Backend, make: Callable[[], Any]) -> None:
        self._backend = backend
        with backend.scope():
            layer = make()
            layer.build((None, TIME, CHANNELS))
        scale = backend.num_replicas if backend.gradient_reduction == "mean" else 1

        def step(given: dict[str, tf.Tensor], masked: bool) -> Any:
            options = {"mask": given["mask"]} if masked else {}
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(given["x"])
                y = layer(given["x"], training=True, **options)
                y = tf.where(given["mask"][..., tf.newaxis], y, 0.0)
                loss = scale * tf.reduce_sum(tf.sin(2 * y))
            reduced = distpad.gradient(tape, loss, [layer.gamma, layer.beta], backend=backend)
            if backend.strategy is not None:
                reduced = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, reduced)
            return y, tape.gradient(loss, given["x"]) / scale, *reduced

        def run(given: Any, masked: bool) -> Any:
            call = functools.partial(step, masked=masked)
            return call(given) if backend.strategy is None else backend.strategy.run(call, args=(given,))

        self._run = tf.function(run, autograph=False, reduce_retracing=False)

    def _given(self, case: str) -> Any:
        first = self._backend.worker_index * self._backend.replicas_here
        return self._backend.to_device([drawn(first + r, case) for r in range(self._backend.replicas_here)])

    def error(self, case: str) -> float:
        """The largest relative error on this worker; NaN where the layer refuses the case. Collective."""
        try:
            results = self._run(self._given(case), case == CASES[2])
        except (TypeError, ValueError):
            return math.nan
        expected = of_one_device([drawn(r, case) for r in range(self._backend.num_replicas)])
        first = self._backend.worker_index * self._backend.replicas_here
        worst = 0.0
        for i in range(self._backend.replicas_here):
            own = [np.asarray(self._backend.local_results(part)[i]) for part in results]
            for found, wanted in zip(own, [*(parts[first + i] for parts in expected[:2]), *expected[2:]]):
                worst = max(worst, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
        return worst

    def seconds(self, steps: int) -> float:
        """Seconds of a step, with a mask of all positions where the layer takes one."""
        given = self._given(CASES[0])
        self._wait(self._run(given, False))
        began = time.perf_counter()
        for _ in range(steps):
            results = self._run(given, False)
        self._wait(results)
        return (time.perf_counter() - began) / steps

    def _wait(self, results: Any) -> None:
        for part in self._backend.local_results(results[0]):
            np.asarray(part)


def of_one_device(every: list[dict[str, np.ndarray]]) -> tuple[Any, ...]:
    """Outputs and gradients by the inputs, for each replica; gradients by gamma and beta."""
    flat = np.concatenate([given["x"][given["mask"]] for given in every]).astype(np.float64)
    x, gamma, beta = tf.constant(flat), tf.ones([CHANNELS], tf.float64), tf.zeros([CHANNELS], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch([x, gamma, beta])
        mean = tf.reduce_mean(x, 0)
        variance = tf.reduce_mean((x - mean) ** 2, 0)
        y = gamma * (x - mean) / tf.sqrt(variance + EPSILON) + beta
        loss = tf.reduce_sum(tf.sin(2 * y))
    d_x, d_gamma, d_beta = tape.gradient(loss, [x, gamma, beta])

    def by_replica(values: tf.Tensor) -> list[np.ndarray]:
        whole = [np.zeros(given["x"].shape) for given in every]
        parts = np.split(values.numpy(), np.cumsum([given["mask"].sum() for given in every])[:-1])
        for each, given, part in zip(whole, every, parts):
            each[given["mask"]] = part
        return whole

    return by_replica(y), by_replica(d_x), d_gamma.numpy(), d_beta.numpy()


if __name__ == "__main__":
    main()
