"""Perplexity: the exponential of the mean cross-entropy over all valid positions."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from distpad.metrics import classes, means


@tf.keras.utils.register_keras_serializable("distpad")
class Perplexity(means.PositionMean):
    r"""The exponential of the mean cross-entropy over valid positions, :math:`\exp(\sum w l / \sum w)`.

    The mean over all replicas and all batches comes before the exponential, so perplexity does not depend on the batch
    size, unlike a mean of the perplexities of batches. ``y_true`` holds ids ``[batch, length]`` or one-hot vectors,
    ``y_pred`` is ``[batch, length, classes]``.

    Args:
      from_logits: whether ``y_pred`` holds logits, not probabilities. Probabilities are at least
        ``tf.keras.backend.epsilon()``, as in Keras's losses.
      padding_value, backend, name: see ``distpad.metrics``.

    Source: F. Jelinek et al., Perplexity, a measure of the difficulty of speech recognition tasks, 1977.

    >>> metric = Perplexity()
    >>> metric.update_state([[0, 1]], [[[0.5, 0.5], [0.0, 1.0]]], lengths=[1])
    >>> round(float(metric.result()), 6)
    2.0
    """

    def __init__(self, *, from_logits: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.from_logits = from_logits

    def _values(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        classes.refuse_binary(self._kind, y_true, y_pred, "Stack 1 - p and p for two classes.")
        labels = tf.cast(classes.labels_of(self._kind, y_true, y_pred), tf.int64)
        if self.from_logits:
            return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, y_pred)
        chances = tf.gather(y_pred, labels, batch_dims=labels.shape.rank)
        return -tf.math.log(tf.maximum(chances, tf.cast(tf.keras.backend.epsilon(), chances.dtype)))

    def _final(self, ratio: tf.Tensor) -> tf.Tensor:
        return tf.exp(ratio)

    def get_config(self) -> dict[str, Any]:
        """As in Keras."""
        return {**super().get_config(), "from_logits": self.from_logits}
