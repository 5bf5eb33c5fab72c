"""TokenAccuracy and SequenceAccuracy: the fraction of positions, and of whole sequences, that are right."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from distpad import errors
from distpad.backends import keras_masks
from distpad.collectives import checked, shapes
from distpad.losses import averages, weights
from distpad.metrics import classes, means, ratio


@tf.keras.utils.register_keras_serializable("distpad")
class TokenAccuracy(means.PositionMean):
    """The fraction of valid positions whose label is predicted.

    ``y_true`` holds ids ``[batch, length]``, or one-hot vectors where ``y_pred`` holds scores. ``y_pred`` holds scores
    ``[batch, length, classes]``, logits or probabilities, whose largest is the prediction; or integer ids. Floats
    ``[batch, length]`` or ``[batch, length, 1]`` are probabilities of binary labels, as in Keras's BinaryAccuracy.

    Args:
      threshold: binary predictions above it are label 1. None means 0.5, for probabilities; write 0.0 for logits.
      padding_value, backend, name: see ``distpad.metrics``.

    >>> metric = TokenAccuracy()
    >>> metric.update_state([[1, 2, 3], [1, -1, -1]], [[1, 2, 0], [0, -1, -1]], lengths=[3, 1])
    >>> float(metric.result())
    0.5
    """

    def __init__(self, *, threshold: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.threshold = None if threshold is None else errors.number(self._kind, "threshold", threshold)

    def _checks(self, y_true: Any, y_pred: Any) -> list[checked.Check]:
        return [classes.binary_check(self.threshold, y_true, y_pred), classes.vector_check(y_true, y_pred)]

    def _values(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        if classes.is_binary(y_true, y_pred):
            return tf.equal(*classes.binary_ids(self.threshold, y_true, y_pred))
        return tf.equal(*classes.ids_of(self._kind, y_true, y_pred))

    def get_config(self) -> dict[str, Any]:
        """As in Keras."""
        return {**super().get_config(), "threshold": self.threshold}


@tf.keras.utils.register_keras_serializable("distpad")
class SequenceAccuracy(ratio.Ratio):
    """The fraction of sequences whose valid positions are all right. Sequences without valid positions do not count.

    ``y_true`` and ``y_pred`` are as in ``TokenAccuracy``. Sample weights ``[batch]`` or ``[batch, 1]`` weigh sequences.
    Sample weights of positions mask the positions whose weight is 0.

    Args:
      threshold: as in ``TokenAccuracy``.
      padding_value, backend, name: see ``distpad.metrics``.

    >>> metric = SequenceAccuracy(padding_value=-1)
    >>> metric.update_state([[1, 2], [3, -1], [-1, -1]], [[1, 2], [4, 0], [0, 0]])
    >>> float(metric.result())
    0.5
    """

    def __init__(self, *, threshold: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.threshold = None if threshold is None else errors.number(self._kind, "threshold", threshold)

    def get_config(self) -> dict[str, Any]:
        """As in Keras."""
        return {**super().get_config(), "threshold": self.threshold}

    def _sums(self, y_true: Any, y_pred: Any, sources: dict[str, Any]) -> tuple[averages.Sums, list[checked.Check]]:
        sources = {**sources, "keras_mask": keras_masks.of(y_pred)}
        y_true, y_pred = self._tensor("y_true", y_true), self._tensor("y_pred", y_pred)
        valid, checks = self._valid(y_true, y_pred, sources)
        if classes.is_binary(y_true, y_pred):
            cleaned = weights.clean(y_pred, valid.effective_mask, prediction=True)
            checks = [*checks, classes.binary_check(self.threshold, y_true, cleaned)]
            right = tf.equal(*classes.binary_ids(self.threshold, y_true, y_pred))
        else:
            checks = [
                *checks,
                classes.vector_check(weights.clean(y_true, valid.effective_mask, prediction=False), y_pred),
            ]
            right = tf.equal(*classes.ids_of(self._kind, y_true, y_pred))
        counted, is_broadcastable, rank = valid.effective_mask, valid.is_broadcastable, right.shape.rank
        inner = list(range(1, rank))
        if counted is None:
            counted = tf.ones_like(right)
        else:
            counted, fit = shapes.broadcast(shapes.Source("mask", counted, True), shapes.sizes_of(right, rank))
            counted = tf.broadcast_to(shapes.widen(counted, rank), tf.shape(right))
            is_broadcastable = tf.logical_and(is_broadcastable, fit)
        whole = tf.cast(tf.reduce_all(tf.logical_or(right, tf.logical_not(counted)), axis=inner), tf.float64)
        rows = weights.Weights(
            tf.reduce_any(counted, axis=inner), ratio.row_weight(valid.weight), 1, is_broadcastable=is_broadcastable
        )
        rows, check = weights.broadcast_to(self._kind, whole, rows)
        return averages.sum_up(whole, rows, "token"), [*checks, check]
