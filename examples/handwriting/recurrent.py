"""A recurrent layer that reads in both directions at once."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

keras = tf.keras


class BidirectionalGRU(keras.layers.Layer):
    """Two gated recurrent units, one from the left and one from the right, side by side in a single loop.

    The result equals ``Bidirectional(GRU(units, return_sequences=True))`` on masked rows. On a CPU, a loop runs many
    small operations, and TensorFlow traces them for each replica. One loop for both directions has fewer operations.
    The loop needs no mask: the second direction reverses each row, so padding comes last in both directions.
    """

    def __init__(self, units: int, **keywords: Any):
        super().__init__(**keywords)
        self.units = units
        self.gates = keras.layers.Dense(2 * 3 * units)

    def build(self, shape: Any) -> None:
        self.gates.build(shape)
        # Recurrent kernels and biases of both directions, for update, reset and candidate.
        self.kernel = self.add_weight(
            name="kernel", shape=(2, self.units, 3 * self.units), initializer="orthogonal", trainable=True
        )
        self.bias = self.add_weight(name="bias", shape=(2, 1, 3 * self.units), initializer="zeros", trainable=True)
        super().build(shape)

    def call(self, x: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        """Return the states of each position, ``[batch, length, 2 * units]``, left-to-right states first.

        Args:
            x: ``[batch, length, features]``.
            lengths: ``[batch]`` int32; states after the length carry no meaning.
        """
        forward, backward = tf.split(self.gates(x), 2, axis=-1)
        backward = tf.reverse_sequence(backward, lengths, seq_axis=1, batch_axis=0)
        inputs = tf.transpose(tf.stack([forward, backward]), [2, 0, 1, 3])  # [length, 2, batch, 3 * units]
        kernel, bias = tf.convert_to_tensor(self.kernel), tf.convert_to_tensor(self.bias)

        def advance(state: tf.Tensor, gates: tf.Tensor) -> tf.Tensor:
            from_state = tf.matmul(state, kernel) + bias
            update, reset = tf.split(
                tf.sigmoid(gates[..., : 2 * self.units] + from_state[..., : 2 * self.units]), 2, axis=-1
            )
            candidate = tf.tanh(gates[..., 2 * self.units :] + reset * from_state[..., 2 * self.units :])
            return candidate + update * (state - candidate)

        states = tf.scan(advance, inputs, tf.zeros_like(inputs[0, :, :, : self.units]))
        forward, backward = tf.unstack(tf.transpose(states, [1, 2, 0, 3]), 2)
        return tf.concat([forward, tf.reverse_sequence(backward, lengths, seq_axis=1, batch_axis=0)], axis=-1)
