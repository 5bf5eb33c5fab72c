"""Variables of Keras 2, Keras 3 and TensorFlow."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.backends import base

# odd constants of splitmix64, as int64
_ODD, _OTHER_ODD = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64


def tensorflow_variable(variable: Any, function: str) -> tf.Variable:
    """The ``tf.Variable`` of a variable of Keras or TensorFlow. TypeError for other objects."""
    held = variable if isinstance(variable, tf.Variable) else getattr(variable, "value", None)  # Keras 3 wraps it
    if not isinstance(held, tf.Variable):
        raise TypeError(errors.sentence(function, "variables", f"with a {type(variable).__name__}", "only variables"))
    return held


def check_alike(variables: Sequence[tf.Variable], backend: base.Backend, function: str) -> None:
    """Raise ValueError on all workers if their variables differ in number, shapes or dtypes. Collective."""
    described = [(tuple(variable.shape), variable.dtype.name) for variable in variables]
    mine = np.array([len(described), zlib.crc32(repr(described).encode())], np.int64)
    extremes = backend.host_max(np.concatenate([mine, -mine]))
    most, least = extremes[:2], -extremes[2:]
    if np.array_equal(most, least):
        return
    raise ValueError(
        f"{function}: variables are {len(described)} on worker {backend.worker_index}, expected the same number, "
        f"shapes and dtypes on all workers (numbers: {least[0]} to {most[0]}). Build the model and the optimiser on "
        "all workers first."
    )


def checksums(variables: Sequence[tf.Variable], backend: base.Backend) -> list[np.ndarray]:
    """The checksums of variables, ``[variables]`` int64, of each replica of this worker."""
    found = [local_parts(variable, backend) for variable in variables]
    return [_checksums([*map(tf.convert_to_tensor, part)]).numpy() for part in zip(*found)]


def local_parts(variable: tf.Variable, backend: base.Backend) -> list[Any]:
    """A variable on each replica of this worker; one outside the strategy's scope is the same on all."""
    found = backend.local_results(variable)
    return found if len(found) == backend.replicas_here else found[:1] * backend.replicas_here


@tf.function(autograph=False)
def _checksums(values: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.stack([_checksum(value) for value in values])


def _checksum(value: tf.Tensor) -> tf.Tensor:
    """The sum of a tensor's 64-bit words and its size, each mixed with its position, modulo 2**64.

    A GPU sums int64, but no smaller integers.
    """
    if value.dtype == tf.bool:
        value = tf.cast(value, tf.uint8)
    in_word, flat = 8 // value.dtype.size, tf.reshape(value, [-1])
    size = tf.size(flat, tf.int64)
    if in_word < 2:
        return _mixed(tf.bitcast(flat, tf.int64), 0) + _mixed(size[tf.newaxis], -1)
    whole = size // in_word * in_word
    rest = tf.pad(flat[whole:], [[0, whole + in_word - size]])
    words = [tf.bitcast(tf.reshape(part, [-1, in_word]), tf.int64) for part in (flat[:whole], rest)]
    return _mixed(words[0], 0) + _mixed(words[1], whole) + _mixed(size[tf.newaxis], -1)


def _mixed(words: tf.Tensor, begin: Any) -> tf.Tensor:
    """The sum of words, each mixed with its position, as in splitmix64: the order of the words matters."""
    words = tf.reshape(words, [-1])
    words = (words + (tf.range(tf.size(words, tf.int64)) + begin) * _ODD) * _OTHER_ODD
    return tf.reduce_sum(tf.bitwise.bitwise_xor(words, tf.bitwise.right_shift(words, tf.constant(29, tf.int64))))


def extremes(sums: Sequence[np.ndarray]) -> list[float]:
    """The highest hash of the replicas' checksums, and the negative of the lowest: 48 bits, which a float64 holds."""
    hashes = [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=6).digest(), "big") for row in sums]
    return [float(max(hashes)), -float(min(hashes))] if hashes else [0.0, 0.0]


def replica_variable(shape: Sequence[int | None], dtype: tf.DType) -> tf.Variable:
    """A variable of which each replica changes its own part: zeros, with no rows on axes of unknown size."""
    with tf.init_scope():  # the caller may be a function that is being traced
        return tf.Variable(
            empty(shape, dtype), trainable=False, shape=shape, synchronization=tf.VariableSynchronization.ON_READ
        )


def empty(shape: Sequence[int | None], dtype: tf.DType) -> tf.Tensor:
    """The initial value of ``replica_variable``: zeros, with no rows on axes of unknown size."""
    return tf.zeros([size or 0 for size in shape], dtype)
