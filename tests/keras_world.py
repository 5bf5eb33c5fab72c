"""What Keras's fit needs in a world: an optimiser for its engine, and its data."""

from __future__ import annotations

import contextlib
from typing import Any

import tensorflow as tf

import distpad
from distpad.versions import KERAS as KERAS
from replica_world import World


def needs_help(world: World) -> bool:
    """Whether Keras's own fit fails there (keras#20585)."""
    return world.kind == "multiworker" and KERAS >= 3


def model_class(world: World) -> type[tf.keras.Model]:
    """The class of models that fit works with. A new one each time: Keras makes a functional class of what is once
    used so."""

    class Fit(tf.keras.Model):  # as README.md tells: Keras reduces what a step returns along an axis
        def train_step(self, data: Any) -> dict[str, tf.Tensor]:
            return {name: value[tf.newaxis] for name, value in super().train_step(data).items()}

        def test_step(self, data: Any) -> dict[str, tf.Tensor]:
            return {name: value[tf.newaxis] for name, value in super().test_step(data).items()}

    return Fit if needs_help(world) else tf.keras.Model


def around_model(world: World) -> Any:
    """The scope to make the model object in. Its layers are made in the strategy's; so that Keras 3 does not look at a
    batch beforehand, which fails there, the object itself is made outside."""
    return contextlib.nullcontext() if needs_help(world) else world.scope()


def fit_optimizer(world: World, optimizer: Any) -> Any:
    """The optimiser that makes fit distributed in this world: only Horovod needs one of its own."""
    if world.kind not in ("horovod", "mpirun"):
        return optimizer
    if KERAS >= 3:
        return distpad.DistributedOptimizer(optimizer)
    import horovod.tensorflow.keras as hvd

    return hvd.DistributedOptimizer(optimizer)


def steps_dataset(world: World, steps: list[Any]) -> tf.data.Dataset:
    """Global batches as fit is fed them: strategies deal their rows out themselves; under Horovod, each rank takes its
    own. All steps have the same number of rows, so that each counts alike in the history."""
    ranks = world.num_replicas if world.strategy is None else 1
    mine = slice(world.backend.worker_index if ranks > 1 else 0, None, ranks)
    parts = [tf.nest.map_structure(lambda column: column[mine], tuple(step)) for step in steps]
    rows = len(tf.nest.flatten(parts[0])[0])
    columns = tf.nest.map_structure(lambda *pieces: tf.concat(pieces, axis=0), *parts)
    options = tf.data.Options()
    options.autotune.enabled = False  # see distpad/data/keras.py
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return tf.data.Dataset.from_tensor_slices(columns).batch(rows).with_options(options)
