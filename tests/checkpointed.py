"""A small training with checkpoints, whose whole state is compared with an undisturbed one's."""

from __future__ import annotations

import contextlib
import random
import threading

import numpy as np
import tensorflow as tf

import distpad

LENGTHS = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 2, 4]
EXAMPLES = [
    {"x": np.linspace(-1, i / 12, 2 * n, dtype="float32").reshape(n, 2), "y": np.ones(n)} for i, n in enumerate(LENGTHS)
]


class Training:
    """A linear model with momentum and dropout, whose every random number comes from a saved state."""

    def __init__(self, backend, folder, *, noisy=False, **options):
        self.backend, self.noisy = backend, noisy  # a generator's numbers differ between replicas
        with backend.scope():
            self.dropout = distpad.layers.Dropout(0.5, seed=3)
            self.dense = tf.keras.layers.Dense(1, kernel_initializer="ones")
            self.model = tf.keras.Sequential([tf.keras.Input([None, 2]), self.dense])
            self.dropout.build([None, None, 2])
            self.optimizer = tf.keras.optimizers.SGD(0.05, momentum=0.9)
            self.optimizer.build(self.model.trainable_variables)
            self.noise = tf.random.Generator.from_seed(5)
        self.order, self.numbers = np.random.default_rng(backend.worker_index), random.Random(backend.worker_index)
        data = EXAMPLES, distpad.LengthSampler(LENGTHS, global_batch_size=4)
        padding = {"x": distpad.Pad(), "y": distpad.Pad()}
        self.batches = distpad.PaddedBatches(data, padding=padding, tokens="y", backend=backend)
        self.loss = distpad.DistributedLoss(lambda t, p: tf.square(p[..., 0] - t), backend=backend)
        saved = {"model": self.model, "optimizer": self.optimizer, "batches": self.batches, "noise": self.noise}
        objects = {**saved, "dropout": self.dropout, "order": self.order, "numbers": self.numbers}
        self.checkpoints = distpad.Checkpoints(folder, backend=backend, **objects, **options)

    def step(self, batch):
        with tf.GradientTape() as tape:
            x = self.dropout(batch.data["x"], training=True, indices=batch.indices)
            x = x + self.noise.normal([1, 1, 2]) if self.noisy else x
            loss = self.loss(tf.cast(batch.data["y"], tf.float32), self.model(x), batch=batch)
        variables = self.model.trainable_variables
        gradients = distpad.gradient(tape, loss, variables, backend=self.backend)
        self.optimizer.apply_gradients(zip(gradients, variables))

    def after_step(self, done, batch):
        """What a test does between a step and its checkpoint."""

    def run(self, last):
        """Train from where the folder's checkpoint is to step ``last``; all that belongs to the state."""
        run = self.backend.strategy.run if self.backend.strategy else lambda function, args: function(*args)
        # Python handles signals in the main thread alone
        is_main = threading.current_thread() is threading.main_thread()
        with self.checkpoints if is_main else contextlib.nullcontext():
            first = self.checkpoints.restore()
            for done, batch in zip(range(first + 1, last + 1), self.batches.repeat()):
                run(self.step, args=(batch,))
                self.after_step(done, batch)
                self.checkpoints.step(done)
        return first, self.state()

    def state(self):
        stats = {name: count for name, count in self.batches.stats.as_dict().items() if not name.endswith("seconds")}
        drawn = [self.order.random(), self.numbers.random()]
        random_state = [self.noise.state.numpy().tolist(), int(self.dropout.step.numpy()), *drawn]
        weights = [value.copy() for value in self.model.get_weights()]
        return {"weights": weights, "random": random_state, "stats": stats, "position": self.batches.state_dict()}
