"""What tests/mutants.py showed that no other test would notice."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle


def test_nan_stays_in_its_slot(world):
    """What one replica reports is not made NaN by what another reports: slots are chosen, not multiplied."""

    def given(r):
        return np.array([np.nan, np.inf, 2.0] if r == 0 else [1.0 + r, -np.inf, np.nan])

    for graph in (True, False):
        for stacked in world.run(world.backend.all_gather, given, graph=graph).values():
            np.testing.assert_array_equal(stacked, [given(r) for r in range(world.num_replicas)])


@pytest.mark.parametrize("average", ["token", "sequence_sum"])
def test_rows_of_padding_alone_are_no_sequences(world, average):
    """per="sequence", the valid positions told by padding_value: a row of padding alone is no sequence."""
    loss_fn = distpad.DistributedLoss(
        lambda t, p: tf.square(p), average=average, per="sequence", padding_value=0, backend=world.backend
    )

    def given(r):
        return {"y": np.array([[1, 2, 0], [0, 0, 0], [4 + r, 0, 0]]), "p": np.array([1.0 + r, 99.0, 2.0 + r])}

    def step(batch):
        with tf.GradientTape() as tape:
            tape.watch(batch["p"])
            loss = loss_fn(batch["y"], batch["p"])
        return loss_fn.global_value(loss), tape.gradient(loss, batch["p"])

    count = world.num_replicas * (3 if average == "token" else 2)
    total = sum((1.0 + r) ** 2 + (2.0 + r) ** 2 for r in range(world.num_replicas))
    for replica, (value, gradient) in world.run(step, given, graph=False).items():
        assert oracle.relative_error(value, total / count) <= 1e-6
        wanted = np.array([2.0 + 2 * replica, 0.0, 4.0 + 2 * replica]) / count * world.backend.gradient_scale
        assert oracle.relative_error(gradient, wanted) <= 1e-6


def test_counts_of_a_step_without_valid_positions(world):
    """A step that the pipeline filled up has counts of 0: the value and all gradients are 0, never NaN."""
    with world.scope():
        w = tf.Variable([[2.0], [3.0]])
    loss_fn = distpad.DistributedLoss(lambda t, p: tf.square(t - p)[..., 0], backend=world.backend)

    def step(x):
        with tf.GradientTape() as tape:
            loss = loss_fn(x[..., :1], x @ w, lengths=[0, 0], denominator=distpad.Counts(0.0, 0.0))
        return loss, distpad.gradient(tape, loss, [w], backend=world.backend)

    for value, (gradient,) in world.run(step, lambda r: np.full([2, 3, 2], 1.0 + r, "float32"), graph=False).values():
        assert value == 0
        np.testing.assert_array_equal(gradient, [[0.0], [0.0]])
