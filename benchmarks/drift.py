#!/usr/bin/env python
"""Dependence of the weights on the number of replicas, with the masks and means of TensorFlow, Keras and distpad.

Each contender trains the same model on the same global batches, by plain gradient descent, on 1, 2 and 4 replicas of a
MirroredStrategy. Two errors are possible. On one replica, the loss may differ from the mean over valid positions. On
several replicas, the loss may differ from the loss on one. Sums and means over rows use a proportionally smaller
learning rate.

A second table has a model with batch normalisation and dropout under one exact loss, with Keras's layers and distpad's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

EXAMPLES = """\
examples:
  python benchmarks/drift.py
  python benchmarks/drift.py --steps 3 --replicas 1 2
"""
ROWS, FEATURES, UNITS, CLASSES = 16, 8, 16, 5  # rows of the global batch, sizes of the model
RATE, POSITIONS = 0.5, 190  # learning rate; approximate number of valid positions in a batch
TARGET = "the mean over valid positions"
START, PADDED = ", before training", ", padded further"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="training steps (default 10)")
    parser.add_argument(
        "--replicas", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="replicas (default 1 2 4)"
    )
    parser.add_argument("--one", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # one run, in this process
    options = parser.parse_args()
    if 1 not in options.replicas:
        parser.error(
            f"--replicas is {options.replicas}, expected a list with 1: all others are compared with 1 replica"
        )
    if options.one:
        options.one.write_text(json.dumps(train_all(options.replicas[-1], options.steps)))
        return
    found = {n: in_a_process(n, options.steps) for n in tqdm(options.replicas, unit="run", desc="replicas")}
    show({n: each["losses"] for n, each in found.items()}, options.steps)
    show_layers({n: each["layers"] for n, each in found.items()}, options.steps)


def in_a_process(replicas: int, steps: int) -> dict[str, Any]:
    """Train in a subprocess, because a process has one fixed number of devices."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.json"
        argv = [sys.executable, __file__, "--one", file, "--steps", steps, "--replicas", 1, replicas]
        subprocess.run([str(part) for part in argv], check=True)
        return json.loads(file.read_text())


def show(found: dict[int, dict[str, list[float]]], steps: int) -> None:
    """Print the distances of weights, relative to the distance that the target moves the weights."""
    start, target = (np.array(found[1][name]) for name in ("start", TARGET))
    moved = np.linalg.norm(target - start)
    several = [n for n in found if n != 1]
    title = (
        f"Distance of the weights after {steps} steps, relative to the distance that exact training moves the weights. "
        f"Exact: {TARGET}."
    )
    table = Table(title=title, title_justify="left")
    table.add_column("contender")
    for heading in ("1 replica to exact", *(f"{n} to 1 replica" for n in several)):
        table.add_column(heading, justify="right")
    for name, weights in found[1].items():
        if name in ("start", TARGET):
            continue
        own = np.array(weights)
        gaps = [own - target, *(np.array(found[n][name]) - own for n in several)]
        table.add_row(name, *(f"{np.linalg.norm(gap) / moved:.1e}" for gap in gaps))
    Console(width=120).print(table)


def show_layers(found: dict[int, dict[str, list[float]]], steps: int) -> None:
    """Print the distances of weights and moving averages, relative to the distance that one replica moves them."""
    several = [n for n in found if n != 1]
    title = f"Distance of the weights and moving averages after {steps} steps, with distpad.DistributedLoss"
    table = Table(title=title, title_justify="left")
    table.add_column("layers")
    for heading in ("50 % more padding", *(f"{n} to 1 replica" for n in several)):
        table.add_column(heading, justify="right")
    for name in (name for name in found[1] if not name.endswith((START, PADDED))):
        own = np.array(found[1][name])
        moved = np.linalg.norm(own - np.array(found[1][name + START]))
        gaps = [np.array(found[1][name + PADDED]) - own, *(np.array(found[n][name]) - own for n in several)]
        table.add_row(name, *(f"{np.linalg.norm(gap) / moved:.1e}" for gap in gaps))
    Console(width=120).print(table)


# -- one number of replicas -------------------------------------------------------------------------------------------


def train_all(replicas: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Return the flat weights of each contender after training, and the common start weights."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    assert strategy.num_replicas_in_sync == replicas
    flat = lambda model: np.concatenate([weight.ravel() for weight in model.get_weights()]).tolist()
    results = {"start": flat(build(False))}
    for name, train in contenders(strategy).items():
        with contextlib.nullcontext() if name == TARGET else strategy.scope():
            model = build("Keras mask" in name)
        train(model, list(batches(steps)))
        results[name] = flat(model)
    return {"losses": results, "layers": train_layers(strategy, steps)}


def train_layers(strategy: Any, steps: int) -> dict[str, list[float]]:
    """Return the flat weights and moving averages of a model with each kind of layers."""
    import tensorflow as tf

    import distpad

    def train(normalization: type, dropout: type, options: dict[str, Any], further: int) -> tuple[list, list]:
        with strategy.scope():
            x, mask = tf.keras.Input([None, FEATURES]), tf.keras.Input([None], dtype="bool")
            inputs = [x, mask, tf.keras.Input([], dtype="int64")]
            keys = {"indices": inputs[-1]} if dropout is distpad.layers.Dropout else {}
            hidden = tf.keras.layers.Dense(UNITS, activation="tanh", kernel_initializer=fixed(FEATURES, UNITS))(x)
            hidden = normalization(momentum=0.9, **options)(hidden, mask=mask)
            hidden = dropout(0.3, seed=1)(hidden, **keys)
            outputs = tf.keras.layers.Dense(CLASSES, kernel_initializer=fixed(UNITS, CLASSES))(hidden)
            model, optimizer = tf.keras.Model(inputs, outputs), tf.keras.optimizers.SGD(RATE)
            optimizer.build(model.trainable_variables)
            entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
            loss_fn = distpad.DistributedLoss(entropy)

        def step(x: Any, y: Any, mask: Any, indices: Any) -> None:
            with tf.GradientTape() as tape:
                loss = loss_fn(y, model([x, mask, indices], training=True), mask=mask)
            gradients = distpad.gradient(tape, loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables))

        # the layer's counter of steps is no weight that training moves
        flat = lambda: np.concatenate([np.ravel(w) for w in model.get_weights() if np.ndim(w)]).astype(float).tolist()
        start, run = flat(), tf.function(lambda *batch: strategy.run(step, args=batch))
        columns = [np.concatenate(column) for column in zip(*batches(steps))]
        columns = [np.pad(c, [(0, 0), (0, further), *[(0, 0)] * (c.ndim - 2)]) for c in columns]
        columns = [*columns[:2], columns[2] > 0, np.arange(ROWS * steps)]
        data = tf.data.Dataset.from_tensor_slices(tuple(columns)).batch(ROWS)
        for batch in strategy.experimental_distribute_dataset(data):
            run(*batch)
        return start, flat()

    keras, found = tf.keras.layers, {}
    kinds: dict[str, tuple[type, type, dict[str, Any]]] = {
        "Keras's": (keras.BatchNormalization, keras.Dropout, {}),
        "Keras's, synchronized=True": (keras.BatchNormalization, keras.Dropout, {"synchronized": True}),
        "distpad.layers": (distpad.layers.BatchNormalization, distpad.layers.Dropout, {}),
    }
    for name, (normalization, dropout, options) in kinds.items():
        found[name + START], found[name] = train(normalization, dropout, options, 0)
        if strategy.num_replicas_in_sync == 1:
            found[name + PADDED] = train(normalization, dropout, options, 32)[1]
    return found


def fixed(rows: int, columns: int) -> Any:
    """An initializer with the same values in each run."""
    import tensorflow as tf

    return tf.keras.initializers.Constant(np.random.default_rng(columns).normal(size=[rows, columns]) / 2)


def build(masked: bool) -> Any:
    """Build a model with fixed start weights, with or without a Keras mask."""
    import tensorflow as tf

    layers = [tf.keras.layers.Dense(UNITS, activation="tanh"), tf.keras.layers.Dense(CLASSES)]
    masking = [tf.keras.layers.Masking()] if masked else []
    model = tf.keras.Sequential([tf.keras.Input([None, FEATURES]), *masking, *layers])
    random = np.random.default_rng(0)
    model.set_weights([random.normal(size=weight.shape) / 2 for weight in model.get_weights()])
    return model


def batches(steps: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield features, labels and mask of global batches. Lengths are lognormal(2, 1), at most 64."""
    for step in range(steps):
        random = np.random.default_rng([1, step])
        lengths = np.clip(random.lognormal(2, 1, ROWS).astype(int), 1, 64)
        mask = np.arange(64) < lengths[:, None]
        x = random.normal(size=[ROWS, 64, FEATURES]) * mask[..., None]
        y = np.where(mask, random.integers(0, CLASSES, [ROWS, 64]), 0)
        yield x.astype("float32"), y.astype("int32"), mask.astype("float32")


def contenders(strategy: Any) -> dict[str, Callable[[Any, list], None]]:
    """Return a training function for each contender."""
    import tensorflow as tf

    import distpad

    def keras(name: str) -> Any:
        return tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=name)

    default = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    each = keras("none")

    def fit(loss: Any, weighted: bool, rate: float = RATE) -> Callable[[Any, list], None]:
        def train(model: Any, given: list) -> None:
            with strategy.scope():
                model.compile(loss=loss, optimizer=tf.keras.optimizers.SGD(rate), jit_compile=False)
            columns = [np.concatenate(column) for column in zip(*given)][: 3 if weighted else 2]
            data = tf.data.Dataset.from_tensor_slices(tuple(columns)).batch(ROWS)
            model.fit(data, verbose=0, shuffle=False)

        return train

    def loop(local_loss: Callable[[Any, Any, Any], Any], rate: float = RATE) -> Callable[[Any, list], None]:
        """Return a custom loop with the loss ``local_loss(y_true, logits, mask)`` on each replica."""

        def train(model: Any, given: list) -> None:
            with strategy.scope():
                optimizer = tf.keras.optimizers.SGD(rate)
                optimizer.build(model.trainable_variables)

            def step(x: Any, y: Any, mask: Any) -> None:
                with tf.GradientTape() as tape:
                    loss = local_loss(y, model(x, training=True), mask)
                gradients = tape.gradient(loss, model.trainable_variables)
                optimizer.apply_gradients(zip(gradients, model.trainable_variables))

            run = tf.function(lambda *batch: strategy.run(step, args=batch))
            data = tf.data.Dataset.from_tensor_slices(tuple(map(np.concatenate, zip(*given)))).batch(ROWS)
            for batch in strategy.experimental_distribute_dataset(data):
                run(*batch)

        return train

    def mean_of_valid(y: Any, logits: Any, mask: Any) -> Any:
        return tf.reduce_mean(tf.boolean_mask(each(y, logits), mask > 0)) / strategy.num_replicas_in_sync

    def over_batch(y: Any, logits: Any, mask: Any) -> Any:
        return tf.reduce_sum(tf.nn.compute_average_loss(each(y, logits), sample_weight=mask, global_batch_size=ROWS))

    def over_positions(y: Any, logits: Any, mask: Any) -> Any:
        positions = tf.size(mask) * strategy.num_replicas_in_sync
        return tf.nn.compute_average_loss(each(y, logits) * mask, global_batch_size=positions)

    def exact(model: Any, given: list) -> None:
        """Train on one device, row by row without padding."""
        for x, y, mask in given:
            total = [0.0] * len(model.trainable_variables)
            for row, labels, length in zip(x, y, mask.sum(1).astype(int)):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_sum(each(labels[None, :length], model(row[None, :length], training=True)))
                total = [a + b for a, b in zip(total, tape.gradient(loss, model.trainable_variables))]
            for variable, gradient in zip(model.trainable_variables, total):
                variable.assign_sub(RATE * gradient / mask.sum())

    found = {TARGET: exact}
    for by, weighted in (("Keras mask", False), ("mask as sample_weight", True)):
        found[f"fit: {by}, default reduction"] = fit(default, weighted)
        found[f"fit: {by}, reduction sum"] = fit(keras("sum"), weighted, RATE / POSITIONS)
        for reduction in ("mean", "mean_with_sample_weight"):
            with contextlib.suppress(ValueError):  # Keras 2 does not have these reductions
                found[f"fit: {by}, reduction {reduction}"] = fit(keras(reduction), weighted)
    return {
        **found,
        "loop: mean of tf.boolean_mask, over the replicas": loop(mean_of_valid),
        "loop: tf.nn.compute_average_loss over rows": loop(over_batch, RATE * ROWS / POSITIONS),
        "loop: tf.nn.compute_average_loss over positions": loop(over_positions),
        "fit: distpad.DistributedLoss, Keras mask": fit(distpad.DistributedLoss(each), False),
        "fit: distpad.DistributedLoss, mask as sample_weight": fit(distpad.DistributedLoss(each), True),
        "loop: distpad.DistributedLoss": loop(
            lambda y, logits, mask: distpad.DistributedLoss(each)(y, logits, mask=mask > 0)
        ),
    }


if __name__ == "__main__":
    main()
