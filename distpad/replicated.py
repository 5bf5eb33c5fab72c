"""Variables of which each replica has its own."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf


def replica_variable(shape: Sequence[int | None], dtype: tf.DType) -> tf.Variable:
    """Zeros that each replica changes alone; no rows where any number of them may come."""
    with tf.init_scope():  # the first to ask may be a function that is being traced
        return tf.Variable(
            empty(shape, dtype), trainable=False, shape=shape, synchronization=tf.VariableSynchronization.ON_READ
        )


def empty(shape: Sequence[int | None], dtype: tf.DType) -> tf.Tensor:
    """What such a variable begins with."""
    return tf.zeros([size or 0 for size in shape], dtype)
