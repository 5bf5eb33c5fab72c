"""A training in small for tests of launchers: three steps of a linear model, compared with one device's in NumPy.

    small_training.py WORKERS

Worker r has r + 1 rows of r + 2 positions, so that a mean of means would be another training. Exit code 1 where the
weights, or the number of workers, are others than they should be.
"""

from __future__ import annotations

import os
import socket
import sys

import numpy as np
import tensorflow as tf

import distpad
from distpad import backends

STEPS, WIDTH, RATE = 3, 2, 0.1


def rows(worker: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(worker)
    return rng.normal(size=[worker + 1, worker + 2, WIDTH]), rng.normal(size=[worker + 1, worker + 2, 1])


def expected(workers: int) -> np.ndarray:
    """Gradient descent on all positions of all workers."""
    x, y = (
        np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
        for parts in zip(*map(rows, range(workers)))
    )
    weights = np.zeros([WIDTH, 1])
    for _ in range(STEPS):
        weights = weights - RATE * 2 * x.T @ (x @ weights - y) / len(y)
    return weights


def main(workers: int) -> int:
    engine = backends.start("auto")
    with engine.scope():
        model = tf.keras.Sequential([tf.keras.Input([None, WIDTH]), tf.keras.layers.Dense(1, use_bias=False)])
        model.set_weights([np.zeros([WIDTH, 1])])
        optimizer = tf.keras.optimizers.SGD(RATE)
        optimizer.build(model.trainable_variables)
    loss_fn = distpad.DistributedLoss(tf.keras.losses.MeanSquaredError(reduction="none"), backend=engine)

    def step(batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x))
        gradients = distpad.gradient(tape, loss, model.trainable_variables, backend=engine)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss

    run = engine.graph(step)
    for _ in range(STEPS):
        run(lambda replica: tuple(part.astype("float32") for part in rows(replica)))
    error = np.abs(model.get_weights()[0] - expected(workers)).max()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    told = f"worker {engine.worker_index} of {engine.num_workers} on {socket.gethostname()}"
    print(f"{told} trained, error {'small' if error < 1e-6 else error}, GPUs {gpus}", flush=True)
    is_right = engine.num_workers == workers and error < 1e-6
    engine.close()
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
