"""The reader: a small convolutional network, a recurrent network over its columns, and one of two heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf

import distpad
from handwriting import recurrent

keras = tf.keras

STRIDE = 4  # pixels of width for each output column


@dataclasses.dataclass(frozen=True)
class Config:
    """Config of the reader.

    Attributes:
        alphabet: the characters to read; one more class is the blank of CTC, or the end symbol.
        head: "ctc", one output for each column; "position", one for each position in the text.
        max_length: length of the longest text that the "position" head can output.
        height: height of the pictures in pixels, a multiple of 4.
        filters: number of filters in the three convolutions.
        units: units of the recurrent network in each direction.
        batch_normalization: whether batch normalisation follows each convolution.
    """

    alphabet: str
    head: str = "ctc"
    max_length: int = 12
    height: int = 16
    filters: tuple[int, int, int] = (16, 32, 48)
    units: int = 64
    batch_normalization: bool = False


def columns(width: Any) -> Any:
    """Return the number of outputs of the "ctc" head for a picture of this width."""
    return (width + STRIDE - 1) // STRIDE


class Reader(keras.Model):
    """Reads pictures of text.

    The result of a row does not depend on its padding: the model sets the padding to zero after each convolution, and
    masks it in all later layers. It does not depend on other rows either, or, with batch normalisation, on the rows of
    all replicas alike. So a step on several replicas equals a step on one device. The model is also smooth (no ReLU, no
    maximum). At a kink, a difference in the last bit changes the gradient, and several replicas sum in another order
    than one device.
    """

    def __init__(self, config: Config):
        super().__init__(name="reader")
        self.config = config
        layers = keras.layers
        self.convolutions = [layers.Conv2D(n, 3, padding="same") for n in config.filters]
        normalized = config.filters if config.batch_normalization else ()
        self.normalizations = [distpad.layers.BatchNormalization() for _ in normalized]
        self.halve = layers.AveragePooling2D(2)
        self.project = layers.Dense(config.units, activation="elu")
        self.recurrent = recurrent.BidirectionalGRU(config.units)
        self.classify = layers.Dense(len(config.alphabet) + 1)
        if config.head == "position":
            self.positions = layers.Embedding(config.max_length + 1, 2 * config.units)
            # A character has three or four columns, so the pen starts at this pace.
            self.advance = layers.Dense(1, activation="sigmoid", bias_initializer=keras.initializers.Constant(-1.0))

    def call(self, inputs: dict[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Compute the logits of each column or each position.

        Args:
            inputs: "image" ``[batch, width, height, 1]``, "width" ``[batch]`` int32; to train, "counts" ``[batch]``
                bool, False for filler rows; and for the "position" head "positions", a scalar int32: the number of
                positions to output.
            training: whether batch normalisation takes the moments of the batch.

        Returns:
            ``[batch, columns(width), classes]`` or ``[batch, positions, classes]``.
        """
        states, mask = self._encode(inputs["image"], inputs["width"], inputs.get("counts"), training)
        if self.config.head == "position":
            states = self._attend(states, mask, inputs["positions"])
        return self.classify(states)

    def _encode(
        self, x: tf.Tensor, width: tf.Tensor, counts: tf.Tensor | None, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the states ``[batch, columns, 2 * units]`` and the mask ``[batch, columns]`` of valid columns."""
        # Round up to full columns: otherwise the padded width decides whether the last column of a picture exists.
        x = tf.pad(x, [[0, 0], [0, -tf.shape(x)[1] % STRIDE], [0, 0], [0, 0]])
        width = columns(width) * STRIDE
        for place, convolve in enumerate(self.convolutions):
            x = convolve(x)
            if self.normalizations:
                valid = width if counts is None else tf.where(counts, width, 0)
                x = self.normalizations[place](x, training=training, lengths=valid)
            x = tf.nn.elu(x)
            if place < 2:
                x = self.halve(x)
                width //= 2
            mask = tf.sequence_mask(width, tf.shape(x)[1])
            x = tf.where(mask[:, :, tf.newaxis, tf.newaxis], x, 0.0)
        shape = tf.shape(x)
        x = self.project(tf.reshape(x, [shape[0], shape[1], x.shape[2] * x.shape[3]]))
        return self.recurrent(x, width), mask

    def _attend(self, states: tf.Tensor, mask: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        """Compute cross attention from text positions to columns, ``[batch, positions, 2 * units]``.

        The attention is monotonic: every column moves a pen forward by a fraction of a character, and position k
        attends to the columns where the pen is near k.
        """
        pen = tf.cumsum(
            self.advance(states) * tf.cast(mask, states.dtype)[..., tf.newaxis], axis=1
        )  # [batch, columns, 1]
        places = tf.range(positions)
        distance = (
            tf.cast(places, states.dtype)[:, tf.newaxis, tf.newaxis] + 0.5 - tf.transpose(pen, [0, 2, 1])[:, tf.newaxis]
        )
        scores = -4.0 * tf.square(distance)[:, :, 0]
        # Every row has at least one column, so no softmax is empty. An empty softmax gives NaN, also in masked rows.
        scores = tf.where(mask[:, tf.newaxis, :], scores, -1e9)
        return tf.matmul(tf.nn.softmax(scores), states) + self.positions(places)


def build(config: Config) -> Reader:
    """Build a reader and create its variables."""
    reader = Reader(config)
    width = 4 * STRIDE
    reader(
        {"image": tf.zeros([1, width, config.height, 1]), "width": tf.constant([width]), "positions": tf.constant(2)}
    )
    return reader
