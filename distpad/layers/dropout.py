"""Dropout whose random numbers belong to the examples, so that they are alike on any number of replicas."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors, precision, versions


class _KeyedDropout(tf.keras.layers.Layer):
    """What Dropout and SpatialDropout1D share; ``_shared_axes`` have one random number for all their positions."""

    _shared_axes: tuple[int, ...] = ()

    def __init__(self, rate: float, seed: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        name = type(self).__name__
        self.rate = errors.number(name, "rate", rate)
        if not 0 <= self.rate < 1:
            raise ValueError(errors.sentence(name, "rate", rate, "at least 0, and below 1"))
        self.seed = None if seed is None else errors.integer(name, "seed", seed, least=0)
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        """Make the variable ``step``, the number of training calls, which a saved model keeps."""
        self.step = self.add_weight(
            name="step", shape=(), dtype="int64", initializer="zeros", trainable=False, **_own_on_each_replica()
        )
        super().build(input_shape)

    @tf.autograph.experimental.do_not_convert
    def call(self, inputs: Any, training: Any = None, indices: Any = None) -> tf.Tensor:
        """Drop components of the inputs.

        Args:
          inputs: floating ``[batch, ...]``.
          training: whether to drop; a Python bool. Each call with True is a step.
          indices: ``[batch]`` integers, the example index of each row, as ``batch.indices``. None: the row's index in
            this replica's batch, so that results depend on the number of replicas.

        Returns: a tensor of the inputs' shape, in the layer's compute dtype; kept components are divided by
          ``1 - rate``.

        Raises: ValueError, TypeError: indices of wrong rank, dtype or static number of rows.

        No collective.
        """
        name = type(self).__name__
        if isinstance(training, (tf.Tensor, tf.Variable)) and not tf.executing_eagerly():
            raise TypeError(errors.sentence(name, "training", "a tensor", "True, False or None"))
        x = tf.convert_to_tensor(tf.cast(inputs, self.compute_dtype))
        indices = tf.range(tf.shape(x)[0]) if indices is None else precision.to_tensor(indices, f"{name}: indices")
        if indices.shape.rank != 1 or not indices.dtype.is_integer:
            found = f"of shape {tuple(indices.shape)} and dtype {indices.dtype.name}"
            raise ValueError(errors.sentence(name, "indices", found, "[batch] integers"))
        if not indices.shape.is_compatible_with(x.shape[:1]):
            raise ValueError(
                errors.sentence(name, "indices", f"of {indices.shape[0]} rows", f"the {x.shape[0]} of inputs")
            )
        if not training or not self.rate:
            return x
        with tf.control_dependencies(
            [tf.debugging.assert_equal(tf.shape(indices)[0], tf.shape(x)[0], f"{name}: indices")]
        ):
            step = tf.identity(self.step)
        self.step.assign_add(1)
        seed = zlib.crc32(self.name.encode()) if self.seed is None else self.seed
        bits = random_bits(seed, step, indices, x, self._shared_axes)
        kept = bits >= np.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        wide = precision.widened(x.dtype)
        return tf.where(kept, tf.cast(tf.cast(x, wide) / (1 - self.rate), x.dtype), tf.zeros([], x.dtype))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """As in Keras."""
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


@tf.keras.utils.register_keras_serializable("distpad")
class Dropout(_KeyedDropout):
    """Drop components of the inputs at random, by numbers keyed by (seed, step, example index, position).

    The same components of an example are dropped on 1, 2 or 4 replicas, whatever other rows the batch has, however far
    it is padded, and after a model was saved and loaded. So training with dropout is the same on any number of
    replicas. As a drop-in for ``tf.keras.layers.Dropout`` the layer works without ``indices`` too, keyed by row.

    Args:
      rate: the fraction to drop, at least 0 and below 1.
      seed: an integer; None: a hash of the layer's name. Layers of one seed drop alike.

    Raises: ValueError, TypeError: a rate or seed out of range.

    >>> layer = Dropout(0.5, seed=3)
    >>> whole = layer(tf.ones([4, 8]), training=True, indices=[7, 2, 5, 1])
    >>> again = Dropout(0.5, seed=3)
    >>> half = again(tf.ones([2, 6]), training=True, indices=[5, 7])
    >>> bool(tf.reduce_all(half == tf.gather(whole, [2, 0])[:, :6]))
    True
    """


@tf.keras.utils.register_keras_serializable("distpad")
class SpatialDropout1D(_KeyedDropout):
    """Drop whole channels of ``[batch, length, channels]``, as Dropout does: one number for all positions of a row.

    >>> y = SpatialDropout1D(0.5, seed=0)(tf.ones([2, 5, 4]), training=True, indices=[0, 1])
    >>> bool(tf.reduce_all(y == y[:, :1]))
    True
    """

    _shared_axes = (1,)


def random_bits(seed: int, step: Any, indices: Any, like: tf.Tensor, shared_axes: tuple[int, ...] = ()) -> tf.Tensor:
    """Return uniform uint32 for each component of ``like``, a function of seed, step, index and position alone.

    TensorFlow's stateless generators take one key for a tensor. Here each row has its own key, and a position its own
    counter, so that rows and padding do not move the numbers of others.

    Returns: ``[batch, ...]``, of size 1 on ``shared_axes``.
    """
    word = lambda number: tf.cast(tf.bitwise.bitwise_and(tf.cast(number, tf.int64), 0xFFFFFFFF), tf.uint32)
    high = lambda number: word(tf.bitwise.right_shift(tf.cast(number, tf.int64), tf.constant(32, tf.int64)))
    key = tf.zeros_like(word(indices))
    for part in (word(seed), high(seed), word(step), high(step), word(indices), high(indices)):
        key = _mixed(tf.bitwise.bitwise_xor(key, tf.broadcast_to(part, tf.shape(key))))
    sizes = tf.shape(like)
    for axis in range(1, like.shape.rank):
        size = 1 if axis in shared_axes else sizes[axis]
        at = word(tf.range(size))
        shape = tf.concat([tf.shape(key), [size]], 0)
        key = _mixed(tf.bitwise.bitwise_xor(tf.broadcast_to(key[..., tf.newaxis], shape), tf.broadcast_to(at, shape)))
    return key


def _mixed(bits: tf.Tensor) -> tf.Tensor:
    """A bijection of uint32 in which each bit of the input changes half of the output's.

    Source: the constants are those of C. Wellons's hash prospector ("lowbias32"), 2018.
    """
    constant = lambda number: tf.constant(number, tf.uint32)
    shifted = lambda x, by: tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, constant(by)))
    bits = shifted(bits + constant(0x9E3779B9), 16) * constant(0x7FEB352D)
    return shifted(shifted(bits, 15) * constant(0x846CA68B), 16)


def _own_on_each_replica() -> dict[str, Any]:
    """Options of a weight that each replica changes alike, in Keras 2; Keras 3 needs none."""
    if versions.KERAS >= 3:
        return {}
    synchronization, aggregation = tf.VariableSynchronization.ON_READ, tf.VariableAggregation.ONLY_FIRST_REPLICA
    return {"synchronization": synchronization, "aggregation": aggregation}
