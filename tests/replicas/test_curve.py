"""The loss curve of training on PaddedBatches, against one device with NumPy: the same in every world."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad

STEPS, CLASSES, FEATURES, RATE = 20, 4, 3, 0.5
PADDING = {"x": distpad.Pad(), "y": distpad.Pad(value=-1)}


def examples(count: int) -> list[dict]:
    random = np.random.default_rng(7)
    truth = random.normal(size=[FEATURES, CLASSES])
    made = []
    for n in random.integers(0, 12, size=count):
        x = random.normal(size=[n, FEATURES])
        made.append({"x": x.astype(np.float32), "y": (x @ truth).argmax(-1)})
    return made


def curve_of_one_device(steps: list[list[dict]]) -> list[float]:
    """Gradient descent in float64 on the mean cross-entropy over all positions of a step."""
    kernel, losses = np.zeros([FEATURES, CLASSES]), []
    for rows in steps:
        x = np.concatenate([row["x"] for row in rows]).astype(np.float64)
        y = np.concatenate([row["y"] for row in rows])
        logits = x @ kernel
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        losses.append(float(-np.log(p[np.arange(len(y)), y]).mean()))
        kernel -= RATE * x.T @ (p - np.eye(CLASSES)[y]) / len(y)
    return losses


def curve(world, batches) -> list[float]:
    entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    loss_fn = distpad.DistributedLoss(entropy, backend=world.backend)
    with world.scope():
        kernel = tf.Variable(tf.zeros([FEATURES, CLASSES]), name="kernel")
        optimizer = tf.keras.optimizers.SGD(RATE)
        optimizer.build([kernel])

    def step(batch):
        with tf.GradientTape() as tape:
            logits = tf.einsum("blf,fc->blc", batch.data["x"], kernel)
            loss = loss_fn(batch.data["y"], logits, lengths=batch.lengths["y"], denominator=batch.counts)
        (gradient,) = distpad.gradient(tape, loss, [kernel], backend=world.backend)
        optimizer.apply_gradients([(gradient, kernel)])
        return distpad.global_value(loss, backend=world.backend)

    run = tf.function(lambda batch: world.strategy.run(step, args=(batch,)) if world.strategy else step(batch))
    losses = []
    for batch in batches:
        value = run(batch)
        losses.append(float(world.strategy.experimental_local_results(value)[0] if world.strategy else value))
        if len(losses) == STEPS:
            break
    return losses


def check(found: list[float], expected: list[float]) -> None:
    assert len(found) == len(expected) == STEPS and expected[-1] < 0.7 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_with_a_sampler(world):
    """The same numbers in every world, since the steps do not depend on it."""
    data = examples(240)
    lengths = [len(example["y"]) for example in data]
    buckets = distpad.Buckets([4, 8, 12])
    sampler = distpad.LengthSampler(lengths, global_batch_size=12, buckets=buckets, seed=1)
    batches = distpad.PaddedBatches(
        (data, sampler), padding=PADDING, tokens="y", buckets=buckets, lookahead=8, backend=world.backend
    )
    expected = curve_of_one_device([[data[i] for i in step] for step in sampler.plan(0)])
    check(curve(world, batches), expected)


@pytest.mark.parametrize("window", [3, pytest.param(32, marks=pytest.mark.wide)])
def test_with_uneven_shards(world, window):
    """Worker w holds w + 1 parts of the data; the last of them trains alone at the end."""
    workers, here, size = world.backend.num_workers, world.backend.replicas_here, 3
    data = examples(STEPS * size * here * workers)
    held = [data[w * STEPS * size * here :][: (STEPS - 5 * (workers - 1 - w)) * size * here] for w in range(workers)]
    batches = distpad.PaddedBatches(
        held[world.backend.worker_index], size, padding=PADDING, tokens="y", lookahead=window, backend=world.backend
    )
    a_step = size * here
    steps = [[row for part in held for row in part[k * a_step : (k + 1) * a_step]] for k in range(STEPS)]
    check(curve(world, batches), curve_of_one_device(steps))
