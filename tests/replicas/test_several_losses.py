"""Several losses of one model, each averaged over its own valid positions: their weighted sum is what is trained on."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

FEATURES, CLASSES, WEIGHT = 5, 4, 0.3


def rows_of(replica):
    """Texts and tags whose lengths have nothing to do with one another; a replica may have none of one kind."""
    random = np.random.default_rng([61, replica])
    return [
        {
            "text": random.normal(size=[n, FEATURES]),
            "letters": random.integers(0, CLASSES, n),
            "tags": random.normal(size=[m, FEATURES]),
        }
        for n, m in zip(random.integers(0, 7, 3), random.integers(0, 4, 3) if replica else [0, 1, 0])
    ]


def padded(rows):
    def stacked(name, filling):
        longest = 1 + max(len(row[name]) for row in rows)
        behind = lambda row: [(0, longest - len(row[name]))] + [(0, 0)] * (row[name].ndim - 1)
        return np.stack([np.pad(row[name], behind(row), constant_values=filling) for row in rows])

    batch = {"text": stacked("text", 0.0), "letters": stacked("letters", -9), "tags": stacked("tags", 0.0)}
    return {**batch, **{f"{name}_lengths": np.array([len(row[name]) for row in rows]) for name in ("letters", "tags")}}


def expected(world, kernel):
    """The value and gradient on one device: position by position, in NumPy."""
    rows = [row for r in range(world.num_replicas) for row in rows_of(r)]
    letters, tags = sum(len(row["letters"]) for row in rows), sum(len(row["tags"]) for row in rows)
    value, gradient = 0.0, np.zeros_like(kernel)
    for row in rows:
        for x, letter in zip(row["text"], row["letters"]):
            odds = np.exp(x @ kernel) / np.exp(x @ kernel).sum()
            value -= np.log(odds[letter]) / letters
            gradient += np.outer(x, odds - np.eye(CLASSES)[letter]) / letters
        for x in row["tags"]:
            value += WEIGHT * np.mean((x @ kernel) ** 2) / tags
            gradient += WEIGHT * np.outer(x, 2 * (x @ kernel) / CLASSES) / tags
    return value, gradient


@pytest.mark.parametrize("counted", [False, True])
def test_a_weighted_sum_of_losses_has_the_gradient_of_one_device(world, counted):
    kernel = np.random.default_rng(62).normal(size=[FEATURES, CLASSES])
    with world.scope():
        variable = tf.Variable(kernel)
    entropy = distpad.DistributedLoss(
        lambda y, p: tf.nn.sparse_softmax_cross_entropy_with_logits(y, p), backend=world.backend
    )
    squares = distpad.DistributedLoss(lambda y, p: p**2, backend=world.backend)
    every = [row for r in range(world.num_replicas) for row in rows_of(r)]
    totals = {name: float(sum(len(row[name]) for row in every)) for name in ("letters", "tags")}
    denominator = totals if counted else dict.fromkeys(totals)

    def step(batch):
        with tf.GradientTape() as tape:
            logits, sizes = batch["text"] @ variable, batch["tags"] @ variable
            text = entropy(
                batch["letters"], logits, lengths=batch["letters_lengths"], denominator=denominator["letters"]
            )
            tags = squares(sizes, sizes, lengths=batch["tags_lengths"], denominator=denominator["tags"])
            loss = text + WEIGHT * tags
        gradients = world.reduce(distpad.gradient(tape, loss, [variable], backend=world.backend))
        return gradients[0], distpad.global_value(loss, backend=world.backend)

    value, gradient = expected(world, kernel)
    for mine, mean in world.run(step, lambda r: padded(rows_of(r)), graph=False).values():
        assert oracle.relative_error(mine, gradient) <= 1e-12
        assert abs(mean - value) <= 1e-12 * value


def test_the_pipeline_counts_for_each_loss(world):
    """batch.counts[NAME], where tokens maps names to features; one row a replica."""
    held = [row for r in range(world.num_replicas) for row in rows_of(r)]
    here = world.backend.replicas_here
    mine = [row for i in range(here) for row in rows_of(world.backend.worker_index * here + i)]
    padding = {"text": distpad.Pad(), "letters": distpad.Pad(value=-9), "tags": distpad.Pad()}
    batches = distpad.PaddedBatches(
        mine, 3, padding=padding, tokens={"spelling": "letters", "tagging": "tags"}, backend=world.backend
    )
    (batch,) = list(batches)
    counts = {
        name: world.strategy.experimental_local_results(c.tokens)[0] if world.strategy else c.tokens
        for name, c in batch.counts.items()
    }
    assert float(counts["spelling"]) == sum(len(row["letters"]) for row in held)
    assert float(counts["tagging"]) == sum(len(row["tags"]) for row in held)
