"""Keras's mixed precision: half precision in the model, float32 in the sums, and steps that are skipped on all."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from test_clipping import loss_scaled

import distpad
import oracle

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

# of half precision: a matmul adds rows in another order on each number of replicas. The mean of means is 20 % off.
LIMIT = {"mixed_float16": 4e-3, "mixed_bfloat16": 3e-2}
STEPS, RATE, OVERFLOWS = 4, 0.25, 1  # the step that overflows


def small_model(policy):
    made = tf.keras.Sequential(
        [
            tf.keras.Input([None, oracle.FEATURES]),
            tf.keras.layers.Dense(8, activation="tanh", dtype=policy),
            tf.keras.layers.Dense(oracle.CLASSES, dtype=policy),
        ]
    )
    random = np.random.default_rng(51)
    made.set_weights([random.normal(size=weight.shape) for weight in made.get_weights()])
    return made


def rows_of(world, replica, step, overflow):
    rows = oracle.rows_of(replica, "uneven", world.num_replicas, step)
    if overflow and step == OVERFLOWS and replica == world.num_replicas - 1:
        rows = [*rows, {"x": np.full([1, oracle.FEATURES], 6e4), "y": np.zeros([1], int), "w": np.ones(1)}]
        rows[-1]["x"][0, 0] = np.inf
    return rows


def on_one_device(world, policy, overflow):
    """The weights after these steps, of one device with all rows, in the same precision, by a masked sum of its own."""
    made, skipped = small_model(policy), 0
    for step in range(STEPS):
        rows = [row for r in range(world.num_replicas) for row in rows_of(world, r, step, overflow)]
        batch = oracle.padded(rows, "float32")
        with tf.GradientTape() as tape:
            logits = tf.cast(made(batch["x"], training=True), tf.float32)
            each = tf.nn.sparse_softmax_cross_entropy_with_logits(np.where(batch["mask"], batch["y"], 0), logits)
            total = tf.reduce_sum(tf.where(batch["mask"], each, 0.0))
            scaled = total / max(1, batch["mask"].sum()) * 1024.0
        gradients = [gradient / 1024.0 for gradient in tape.gradient(scaled, made.trainable_variables)]
        if not all(np.isfinite(gradient).all() for gradient in gradients):
            skipped += 1
            continue
        for variable, gradient in zip(made.trainable_variables, gradients):
            variable.assign(variable - RATE * gradient)
    return made.get_weights(), skipped


@pytest.mark.parametrize(("policy", "overflow"), [("mixed_float16", True), ("mixed_bfloat16", False)])
def test_training_is_that_of_one_device(world, policy, overflow):
    wanted, skipped = on_one_device(world, policy, overflow)
    assert skipped == int(overflow)
    with world.scope():
        made = small_model(policy)
        optimizer, scale_loss, unscale, scale = loss_scaled(tf.keras.optimizers.SGD(RATE), 1024.0)
        optimizer.build(made.trainable_variables)
    start = made.get_weights()
    entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    loss_fn = distpad.DistributedLoss(entropy, backend=world.backend)
    dtypes = set()

    def step(batch):
        with tf.GradientTape() as tape:
            logits = made(batch["x"], training=True)
            loss = loss_fn(batch["y"], logits, lengths=batch["lengths"])
            scaled = scale_loss(loss)
        dtypes.update([(logits.dtype.name, loss.dtype.name)])
        gradients = distpad.gradient(tape, scaled, made.trainable_variables, backend=world.backend)
        gradients, norm = distpad.clip_by_global_norm(unscale(gradients), float("inf"), backend=world.backend)
        optimizer.apply_gradients(zip(gradients, made.trainable_variables))
        return norm

    finite = []
    for number in range(STEPS):
        given = lambda r, number=number: oracle.padded(rows_of(world, r, number, overflow), "float32")
        finite += [np.isfinite(norm) for norm in list(world.run(step, given).values())[:1]]
    assert finite == [number != OVERFLOWS or not overflow for number in range(STEPS)]
    assert dtypes == {(policy.removeprefix("mixed_"), "float32")}
    assert scale() == (512.0 if overflow else 1024.0)
    for found, expected, begun in zip(made.get_weights(), wanted, start):
        assert oracle.relative_error(found - begun, expected - begun) <= LIMIT[policy]
        lowest, highest = -world.backend.host_max(-found), world.backend.host_max(found)
        np.testing.assert_array_equal(lowest, highest)  # to the last bit on all workers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_sum_over_100_000_positions_is_not_of_half_precision(world, dtype):
    """Squares of up to 90,000, which float16 does not hold, and a mean to seven digits, which no half precision has."""
    columns = -(-50_000 // world.num_replicas)
    half = tf.as_dtype(dtype).as_numpy_dtype
    errors = lambda r: (np.random.default_rng([52, r]).random([2, columns, 1]) * 300).astype(half)
    loss_fn = distpad.DistributedLoss(tf.keras.losses.MeanSquaredError(reduction="none"), backend=world.backend)

    def step(y_pred):
        with tf.GradientTape() as tape:
            tape.watch(y_pred)
            loss = loss_fn(tf.zeros_like(y_pred), y_pred)
            scaled = loss * 1000.0
        factor = tf.cast(world.num_replicas, tf.float32) if world.backend.gradient_reduction == "sum" else 1.0
        return loss * factor, tape.gradient(scaled, y_pred)

    every = np.concatenate([errors(r).astype("float64").ravel() for r in range(world.num_replicas)])
    assert len(every) >= 100_000
    share = float(world.backend.share_scale)
    for replica, (value, gradient) in world.run(step, errors).items():
        assert abs(value - np.mean(every**2)) <= 1e-6 * np.mean(every**2)
        wanted = 2 * errors(replica).astype("float64") / len(every) * 1000 * share
        assert gradient.dtype == half and oracle.relative_error(gradient, wanted) <= LIMIT[f"mixed_{dtype}"]
