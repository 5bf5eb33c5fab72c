"""Keras's mixed precision: half precision in the model, float32 in the sums, and steps that are skipped on all."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from test_clipping import loss_scaled

import distpad
import oracle
from keras_world import KERAS, steps_dataset

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

# Eight roundings of half precision, 2**-11 and 2**-8: a matmul adds rows in another order on each number of replicas,
# and rounds its sum for each of them. The mean of means is 20 % off.
LIMIT = {"mixed_float16": 4e-3, "mixed_bfloat16": 3e-2}
STEPS, RATE, OVERFLOWS = 4, 0.25, 1  # the step that overflows


def small_layers(policy):
    inputs = tf.keras.Input([None, oracle.FEATURES])
    hidden = tf.keras.layers.Dense(8, activation="tanh", dtype=policy)(inputs)
    return inputs, tf.keras.layers.Dense(oracle.CLASSES, dtype=policy)(hidden)


def begin(made):
    random = np.random.default_rng(51)
    made.set_weights([random.normal(size=weight.shape) for weight in made.get_weights()])
    return made


def small_model(policy):
    return begin(tf.keras.Model(*small_layers(policy)))


def rows_of(world, replica, step, overflow):
    rows = oracle.rows_of(replica, "uneven", world.num_replicas, step)
    if overflow and step == OVERFLOWS and replica == world.num_replicas - 1:
        rows = [*rows, {"x": np.full([1, oracle.FEATURES], 6e4), "y": np.zeros([1], int), "w": np.ones(1)}]
        rows[-1]["x"][0, 0] = np.inf
    return rows


def mean_of(made, rows):
    """By a masked sum of its own."""
    batch = oracle.padded(rows, "float32")
    logits = tf.cast(made(batch["x"], training=True), tf.float32)
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(np.where(batch["mask"], batch["y"], 0), logits)
    return tf.reduce_sum(tf.where(batch["mask"], each, 0.0)) / max(1, batch["mask"].sum())


def on_one_device(policy, steps):
    """The weights after these steps, of one device in the same precision, how many steps overflowed, and the losses'
    mean. A step is a list of groups of rows: one group is right, one for each replica gives the mean of own means."""
    made, skipped, losses = small_model(policy), 0, []
    for groups in steps:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean([mean_of(made, rows) for rows in groups])
            scaled = loss * 1024.0
        losses.append(loss)
        gradients = [gradient / 1024.0 for gradient in tape.gradient(scaled, made.trainable_variables)]
        if not all(np.isfinite(gradient).all() for gradient in gradients):
            skipped += 1
            continue
        for variable, gradient in zip(made.trainable_variables, gradients):
            variable.assign(variable - RATE * gradient)
    return made.get_weights(), skipped, np.mean(losses)


def error_of(found, wanted, begun):
    return max(oracle.relative_error(f - b, w - b) for f, w, b in zip(found, wanted, begun, strict=True))


def check_equal_on_all_workers(world, weights):
    for found in weights:
        lowest, highest = -world.backend.host_max(-found), world.backend.host_max(found)
        np.testing.assert_array_equal(lowest, highest)  # to the last bit


@pytest.mark.parametrize(("policy", "overflow"), [("mixed_float16", True), ("mixed_bfloat16", False)])
def test_training_is_that_of_one_device(world, policy, overflow):
    every = [
        [row for r in range(world.num_replicas) for row in rows_of(world, r, step, overflow)] for step in range(STEPS)
    ]
    wanted, skipped, _ = on_one_device(policy, [[rows] for rows in every])
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
        finite += [np.isfinite(norm) for norm in list(world.run(step, given, graph=False).values())[:1]]
    assert finite == [number != OVERFLOWS or not overflow for number in range(STEPS)]
    assert dtypes == {(policy.removeprefix("mixed_"), "float32")}
    assert scale() == (512.0 if overflow else 1024.0)
    assert error_of(made.get_weights(), wanted, start) <= LIMIT[policy]
    check_equal_on_all_workers(world, made.get_weights())


def fit_rows(step, overflow):
    """A global batch of 8 rows. Those with most positions are odd ones of the second half, and their features point
    elsewhere: so replicas differ however rows are dealt."""
    random = np.random.default_rng([53, step])
    rows = [
        {
            "x": random.normal(size=[n, oracle.FEATURES]) + (2 if n > 2 else -2),
            "y": random.integers(0, oracle.CLASSES, n),
            "w": np.ones(n),
        }
        for n in (1, 2, 0, 1, 1, 7, 1, 6)
    ]
    if overflow and step == OVERFLOWS:
        rows[-1]["x"][0, 0] = np.inf
    return rows


def dealt(world, rows):
    """By replica: under Horovod as steps_dataset does, else as strategies do."""
    n = world.num_replicas
    return [rows[r::n] if world.strategy is None else rows[r * len(rows) // n :][: len(rows) // n] for r in range(n)]


@pytest.fixture
def global_policy():
    """As users set it: Keras's compile looks at it, too."""
    yield tf.keras.mixed_precision.set_global_policy
    tf.keras.mixed_precision.set_global_policy("float32")


@pytest.mark.worlds("mirrored:2")
@pytest.mark.parametrize(("policy", "overflow"), [("mixed_float16", True), ("mixed_bfloat16", False)])
def test_fit_is_that_of_one_device(world, global_policy, policy, overflow):
    """compile and fit under the policy; an overflow in the last row is one replica's, and its step is skipped on all.
    That replicas divide by counts of their own would be seen: it is ten limits off."""
    with world.scope():
        assert distpad.backends.resolve().num_replicas == world.num_replicas
    steps = [fit_rows(step, overflow) for step in range(STEPS)]
    wanted, skipped, value = on_one_device(policy, [[rows] for rows in steps])
    assert skipped == int(overflow)

    global_policy(policy)
    with world.scope():
        inputs, outputs = small_layers(policy)
        made = tf.keras.Model(inputs, outputs)
        start = begin(made).get_weights()
        optimizer = tf.keras.optimizers.SGD(RATE)
        optimizer = distpad.DistributedOptimizer(loss_scaled(optimizer, 1024.0)[0] if overflow else optimizer)
        entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        loss = distpad.DistributedLoss(entropy, padding_value=-99)
        made.compile(
            loss=loss, optimizer=optimizer, run_eagerly=True, **({"auto_scale_loss": False} if KERAS >= 3 else {})
        )
        batch = oracle.padded([row for rows in steps for row in rows], "float32", beyond=0)
        columns = [(batch["x"][i : i + 8], batch["y"][i : i + 8]) for i in range(0, 8 * STEPS, 8)]
        history = made.fit(steps_dataset(world, columns), verbose=0, shuffle=False).history["loss"]
    found = made.get_weights()
    assert outputs.dtype == policy.removeprefix("mixed_")
    if overflow:
        scale = optimizer.inner_optimizer.dynamic_scale if KERAS >= 3 else optimizer.loss_scale
        assert float(scale.numpy()) == 512.0
    assert error_of(found, wanted, start) <= LIMIT[policy]
    assert oracle.relative_error(history, value) <= LIMIT[policy]
    check_equal_on_all_workers(world, found)

    if world.num_replicas > 1:
        own_means, *_ = on_one_device(policy, [dealt(world, rows) for rows in steps])
        assert error_of(own_means, wanted, start) > 10 * LIMIT[policy]


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
    share = float(world.backend.gradient_scale)
    for replica, (value, gradient) in world.run(step, errors, graph=False).items():
        assert abs(value - np.mean(every**2)) <= 1e-6 * np.mean(every**2)
        wanted = 2 * errors(replica).astype("float64") / len(every) * 1000 * share
        assert gradient.dtype == half and oracle.relative_error(gradient, wanted) <= LIMIT[f"mixed_{dtype}"]
