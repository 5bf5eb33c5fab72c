"""Variables of Keras 2, Keras 3 and TensorFlow, as engines take them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.backends import base


def tensorflow_variable(variable: Any, function: str) -> tf.Variable:
    """A Keras 3 variable holds TensorFlow's as its value. TypeError for what is no variable."""
    held = variable if isinstance(variable, tf.Variable) else getattr(variable, "value", None)
    if not isinstance(held, tf.Variable):
        raise TypeError(errors.sentence(function, "variables", f"with a {type(variable).__name__}", "variables alone"))
    return held


def check_alike(variables: Sequence[tf.Variable], backend: base.Backend, function: str) -> None:
    """Raise ValueError on all workers where they do not hold variables of the same shapes and dtypes. Collective."""
    described = [(tuple(variable.shape), variable.dtype.name) for variable in variables]
    mine = np.array([len(described), zlib.crc32(repr(described).encode())], np.int64)
    extremes = backend.host_max(np.concatenate([mine, -mine]))
    most, least = extremes[:2], -extremes[2:]
    if np.array_equal(most, least):
        return
    raise ValueError(
        f"{function}: variables are {len(described)} on worker {backend.worker_index}, expected the same number, "
        f"shapes and dtypes on all workers (numbers: {least[0]} to {most[0]}). Build model and optimiser on all of "
        "them first."
    )


def replica_variable(shape: Sequence[int | None], dtype: tf.DType) -> tf.Variable:
    """Zeros that each replica changes alone; no rows where any number of them may come."""
    with tf.init_scope():  # the first to ask may be a function that is being traced
        return tf.Variable(
            empty(shape, dtype), trainable=False, shape=shape, synchronization=tf.VariableSynchronization.ON_READ
        )


def empty(shape: Sequence[int | None], dtype: tf.DType) -> tf.Tensor:
    """What such a variable begins with."""
    return tf.zeros([size or 0 for size in shape], dtype)
