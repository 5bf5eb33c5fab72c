"""A training step whose arguments are wrong on one worker, found while tracing; all workers must raise the cause.

    distpad launch -np 2 -- python tests/workers/refused_step.py KIND
    horovodrun --gloo -np 2 python tests/workers/refused_step.py KIND

Prints "worker N: SECONDS: MESSAGE" for the error of each worker.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

import distpad
import replica_world


def plain(world: replica_world.World, optimizer: Any = None) -> Callable[[Any], Any]:
    """The usual step, as a function of the lengths."""
    with world.scope():
        kernel = tf.Variable(tf.ones([3, 4]))
        optimizer = optimizer or tf.keras.optimizers.SGD(0.1)
    loss_fn = distpad.DistributedLoss("sparse_categorical_crossentropy", backend=world.backend)

    def step(lengths: Any) -> tf.Tensor:
        x, y = tf.ones([2, 5, 3]), tf.zeros([2, 5], tf.int32)
        with tf.GradientTape() as tape:
            loss = loss_fn(y, tf.nn.softmax(x @ kernel), lengths=lengths)
        gradients = distpad.gradient(tape, loss, [kernel], backend=world.backend)
        optimizer.apply_gradients(zip(gradients, [kernel]))
        return loss

    return step


def clipping_optimizer(world: replica_world.World) -> Callable[[Any], Any]:
    with world.scope():
        optimizer = tf.keras.optimizers.Adam(0.1, global_clipnorm=1.0)
    return plain(world, optimizer)


def clipped(world: replica_world.World) -> Callable[[Any], Any]:
    """Clipping by the global norm, whose all-reduce comes between the loss and the optimiser."""
    with world.scope():
        kernel, optimizer = tf.Variable(tf.ones([3, 1])), tf.keras.optimizers.SGD(0.1)
    loss_fn = distpad.DistributedLoss("mse", average="sequence_mean", backend=world.backend)

    def step(lengths: Any) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_fn(tf.zeros([2, 5, 1]), tf.ones([2, 5, 3]) @ kernel, lengths=lengths)
        gradients = distpad.gradient(tape, loss, [kernel], backend=world.backend)
        gradients, _ = distpad.clip_by_global_norm(gradients, 1.0, backend=world.backend)
        optimizer.apply_gradients(zip(gradients, [kernel]))
        return loss

    return step


def accumulated(world: replica_world.World) -> Callable[[Any], Any]:
    """Two micro-batches and an embedding, whose gradients are sparse."""
    with world.scope():
        table, optimizer = tf.Variable(tf.ones([7, 3])), tf.keras.optimizers.SGD(0.1)
    loss_fn = distpad.DistributedLoss(tf.keras.losses.MeanAbsoluteError(), backend=world.backend)
    accumulator = distpad.GradientAccumulator([table], backend=world.backend)

    def step(lengths: Any) -> tf.Tensor:
        for row in range(2):
            with tf.GradientTape() as tape:
                predicted = tf.nn.embedding_lookup(table, tf.fill([2, 5], row))
                loss = loss_fn(tf.zeros([2, 5, 3]), predicted, lengths=lengths)
            accumulator.add(tape, loss)
        optimizer.apply_gradients(zip(accumulator.take(), [table]))
        return loss

    return step


KINDS = {step.__name__: step for step in (plain, clipping_optimizer, clipped, accumulated)}


def raised(world: replica_world.World, kind: str) -> tuple[str, float]:
    """This worker's error, and its seconds, if the last worker gives lengths of dtype float."""
    step = KINDS[kind](world)
    is_last = world.backend.worker_index == world.backend.num_workers - 1
    lengths = tf.constant([1.0, 2.0] if is_last else [1, 2])
    started = time.monotonic()
    try:
        world.run(step, lambda _: lengths)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "nothing", time.monotonic() - started


if __name__ == "__main__":
    here = replica_world.made()
    assert here.backend.num_workers > 1
    message, seconds = raised(here, sys.argv[1])
    print(f"worker {here.backend.worker_index}: {seconds:.1f}: {message}", flush=True)
    if message == "nothing":
        sys.exit(1)
