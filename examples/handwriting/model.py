"""The reader: a small convolutional network, a recurrent one over its columns, and one of two heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf

from handwriting import recurrent

keras = tf.keras

STRIDE = 4  # pixels of width behind one output


@dataclasses.dataclass(frozen=True)
class Config:
    """All that is needed to build the reader again.

    Attributes:
        alphabet: the characters that it reads; one class more is CTC's blank, or the end of the text.
        head: "ctc", one output for each column; "position", one for each place in the text.
        max_length: the longest text that the "position" head can write.
        height: of the pictures, a multiple of 4.
        filters: of the three convolutions.
        units: of the recurrent network, in each direction.
    """

    alphabet: str
    head: str = "ctc"
    max_length: int = 12
    height: int = 16
    filters: tuple[int, int, int] = (16, 32, 48)
    units: int = 64


def columns(width: Any) -> Any:
    """How many outputs the "ctc" head has for a picture so wide."""
    return (width + STRIDE - 1) // STRIDE


class Reader(keras.Model):
    """Reads pictures of text.

    A row's result depends neither on the other rows (no batch normalisation) nor on how far it is padded: the padding
    is set back to zero after each convolution, and masked in all that follows. This is what makes a step on several
    replicas equal to one on a single device. It is smooth as well (no ReLU, no maximum): at a kink, a difference in the
    last bit sends the gradient another way, and what several replicas add in another order would not stay alike.
    """

    def __init__(self, config: Config):
        super().__init__(name="reader")
        self.config = config
        layers = keras.layers
        self.convolutions = [layers.Conv2D(n, 3, padding="same", activation="elu") for n in config.filters]
        self.halve = layers.AveragePooling2D(2)
        self.project = layers.Dense(config.units, activation="elu")
        self.recurrent = recurrent.BidirectionalGRU(config.units)
        self.classify = layers.Dense(len(config.alphabet) + 1)
        if config.head == "position":
            self.positions = layers.Embedding(config.max_length + 1, 2 * config.units)
            # Three or four columns a character: a pen that starts at that pace has less to learn.
            self.advance = layers.Dense(1, activation="sigmoid", bias_initializer=keras.initializers.Constant(-1.0))

    def call(self, inputs: dict[str, tf.Tensor]) -> tf.Tensor:
        """Logits, for each column or for each position.

        Args:
            inputs: "image" ``[batch, width, height, 1]``, "width" ``[batch]`` int32, and for the "position" head
                "positions", a scalar int32: how many places of the text to write.

        Returns:
            ``[batch, columns(width), classes]`` or ``[batch, positions, classes]``.
        """
        states, mask = self._encode(inputs["image"], inputs["width"])
        if self.config.head == "position":
            states = self._attend(states, mask, inputs["positions"])
        return self.classify(states)

    def _encode(self, x: tf.Tensor, width: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """``[batch, columns, 2 * units]`` and the mask ``[batch, columns]`` of those that are not padding."""
        # Whole columns: otherwise a picture's last one would be there or not, depending on what it is padded to.
        x = tf.pad(x, [[0, 0], [0, -tf.shape(x)[1] % STRIDE], [0, 0], [0, 0]])
        width = columns(width) * STRIDE
        for place, convolve in enumerate(self.convolutions):
            x = convolve(x)
            if place < 2:
                x = self.halve(x)
                width //= 2
            mask = tf.sequence_mask(width, tf.shape(x)[1])
            x = tf.where(mask[:, :, tf.newaxis, tf.newaxis], x, 0.0)
        shape = tf.shape(x)
        x = self.project(tf.reshape(x, [shape[0], shape[1], x.shape[2] * x.shape[3]]))
        return self.recurrent(x, width), mask

    def _attend(self, states: tf.Tensor, mask: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
        """Cross attention from the places of the text to the columns, ``[batch, positions, 2 * units]``.

        Reading goes from left to right, and the keys say so: every column moves the pen on by a part of a character,
        and place k looks where the pen stands at k.
        """
        pen = tf.cumsum(
            self.advance(states) * tf.cast(mask, states.dtype)[..., tf.newaxis], axis=1
        )  # [batch, columns, 1]
        places = tf.range(positions)
        distance = (
            tf.cast(places, states.dtype)[:, tf.newaxis, tf.newaxis] + 0.5 - tf.transpose(pen, [0, 2, 1])[:, tf.newaxis]
        )
        scores = -4.0 * tf.square(distance)[:, :, 0]
        # Every row has a column, so that no row's attention is empty, which would be NaN also where nothing counts.
        scores = tf.where(mask[:, tf.newaxis, :], scores, -1e9)
        return tf.matmul(tf.nn.softmax(scores), states) + self.positions(places)


def build(config: Config) -> Reader:
    """A reader with its variables."""
    reader = Reader(config)
    width = 4 * STRIDE
    reader(
        {"image": tf.zeros([1, width, config.height, 1]), "width": tf.constant([width]), "positions": tf.constant(2)}
    )
    return reader
