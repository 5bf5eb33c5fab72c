"""Steps for ``distpad certify``, run by gpu.sh: with and without XLA, in float32 and in mixed precision.

cd benchmarks && distpad certify certified:compiled --replicas 2
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

import distpad

WORDS, LENGTH, ROWS = 50, 12, 16


def plain() -> dict[str, Any]:
    return _of("float32", jit_compile=False)


def compiled() -> dict[str, Any]:
    return _of("float32", jit_compile=True)


def mixed() -> dict[str, Any]:
    return _of("mixed_float16", jit_compile=False)


def mixed_compiled() -> dict[str, Any]:
    return _of("mixed_float16", jit_compile=True)


def _of(policy: str, *, jit_compile: bool) -> dict[str, Any]:
    tf.keras.mixed_precision.set_global_policy(policy)
    layers = [tf.keras.layers.Embedding(WORDS, 16), tf.keras.layers.Conv1D(32, 3, padding="causal", activation="relu")]
    model = tf.keras.Sequential([tf.keras.Input([None], dtype="int64"), *layers, tf.keras.layers.Dense(WORDS)])
    loss_fn = distpad.DistributedLoss(tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    random = np.random.default_rng(0)  # the same batch on all workers
    batch = {name: random.integers(1, WORDS, [ROWS, LENGTH]) for name in ("x", "y")}
    batch["lengths"] = random.integers(1, LENGTH + 1, ROWS)
    if not jit_compile:
        return {"model": model, "loss": loss_fn, "batch": batch}

    @tf.function(jit_compile=True, autograph=False)
    def differentiate(batch: dict[str, tf.Tensor], count: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = loss_fn(batch["y"], model(batch["x"], training=True), lengths=batch["lengths"], denominator=count)
        return tape.gradient(loss, model.trainable_variables)

    def step(batch: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        """XLA compiles what has no collective: the count is summed before, and the gradients after."""
        engine = distpad.backends.resolve()
        count = engine.all_reduce(tf.cast(tf.reduce_sum(batch["lengths"]), tf.float32))
        return engine.reduce_in_optimizer(engine.reduce_gradients(differentiate(batch, count)))

    return {"model": model, "loss": loss_fn, "step": step, "batch": batch}
