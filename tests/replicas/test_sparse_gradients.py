"""Sparse gradients under DistributedOptimizer: each row reaches the optimiser once, clipped or not."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle
from keras_world import KERAS

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

ROWS, CLASSES, WIDTH, RATE = 5, 7, 3, 0.5
SEEN: list[int] = []  # how many rows of a sparse gradient the optimiser was given, at each update


class Watching(tf.keras.optimizers.SGD):
    """Notes how many rows it is given."""

    def update_step(self, gradient, variable, *rest):
        if isinstance(gradient, tf.IndexedSlices):
            SEEN.append(len(gradient.values))
        super().update_step(gradient, variable, *rest)


def gradients_of(replica, replicas):
    """A replica's local contribution: rows that occur twice on it and on other replicas, and a dense one."""
    random = np.random.default_rng([91, replica])
    indices = np.array([replica % CLASSES, 6, 2, 6, 0])
    scale = 1 / replicas
    return {
        "values": (scale * random.normal(size=[ROWS, WIDTH])).astype("float32"),
        "indices": indices,
        "dense": (scale * random.normal(size=[WIDTH])).astype("float32"),
    }


def stepped(world, **limits):
    """The changes of a sparsely and a densely trained variable by one step."""
    SEEN.clear()
    with world.scope():
        table, bias = tf.Variable(tf.zeros([CLASSES, WIDTH])), tf.Variable(tf.zeros([WIDTH]))
        optimizer = distpad.DistributedOptimizer(Watching(RATE, **limits), backend=world.backend)
        optimizer.build([table, bias])

    def step(given):
        shape = tf.constant([CLASSES, WIDTH], tf.int64)
        sparse = tf.IndexedSlices(given["values"], given["indices"], shape)
        optimizer.apply_gradients([(sparse, table), (given["dense"], bias)])
        return 0

    world.run(step, lambda r: gradients_of(r, world.num_replicas), graph=False)
    return np.array(table), np.array(bias)


def expected(world, limit=None):
    """By NumPy, in float64: what the reduction of the engine gives, clipped as Keras clips it on one device, where the
    rows of a sparse gradient are counted one by one."""
    scale = 1 if world.backend.gradient_reduction == "sum" else world.num_replicas
    every = [gradients_of(r, world.num_replicas) for r in range(world.num_replicas)]
    values = np.concatenate([each["values"] for each in every]).astype(np.float64) / scale
    dense = sum(each["dense"].astype(np.float64) for each in every) / scale
    if limit is not None:
        norm = np.sqrt((values**2).sum() + (dense**2).sum())
        assert norm > limit, "clipping does something"
        values, dense = values * limit / norm, dense * limit / norm
    table = np.zeros([CLASSES, WIDTH])
    np.add.at(table, np.concatenate([each["indices"] for each in every]), values)
    return -RATE * table, -RATE * dense


@pytest.mark.skipif(KERAS < 3, reason="Keras 2 and Horovod reduce there, as ever")
@pytest.mark.parametrize("limit", [None, 0.05])
def test_each_row_reaches_the_optimizer_once(world, limit):
    found = stepped(world, **({} if limit is None else {"global_clipnorm": limit}))
    for mine, wanted in zip(found, expected(world, limit), strict=True):
        assert oracle.relative_error(mine, wanted) <= 1e-5
    if limit is None:  # Keras gives what it clipped as dense
        assert SEEN and max(SEEN) <= world.num_replicas * ROWS
