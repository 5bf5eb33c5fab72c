"""TokenAccuracy and SequenceAccuracy: how many positions, and how many whole sequences, are right."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from distpad import errors
from distpad.collectives import checked, shapes
from distpad.losses import averages, weights
from distpad.metrics import classes, means, ratio


@tf.keras.utils.register_keras_serializable("distpad")
class TokenAccuracy(means.PositionMean):
    """The share of valid positions whose label is predicted.

    ``y_true`` holds ids ``[batch, length]`` (or one-hot vectors beside scores), ``y_pred`` scores
    ``[batch, length, classes]``, logits or probabilities, of which the largest is taken, or integers: ids. Floats
    ``[batch, length]`` or ``[batch, length, 1]`` are probabilities of binary labels, as in Keras's BinaryAccuracy.

    Args:
      threshold: binary predictions above it are label 1; None: 0.5, of probabilities. Logits want 0.0.
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
    """The share of sequences of which all valid positions are right; those without any do not count.

    ``y_true`` and ``y_pred`` are as in ``TokenAccuracy``. Sample weights of ``[batch]`` or ``[batch, 1]`` weigh
    sequences; of those of positions it only matters which are 0: such positions need not be right.

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
        sources = {**sources, "keras_mask": weights.keras_mask(y_pred)}
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
