"""What Keras's fit needs in a world: an optimiser for its engine, and its data."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

import distpad
from distpad.versions import KERAS as KERAS
from replica_world import World


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
