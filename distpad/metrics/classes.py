"""Labels and predictions in any of their forms as class ids."""

from __future__ import annotations

import tensorflow as tf

from distpad import errors


def ids_of(function: str, y_true: tf.Tensor, y_pred: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Both as ids ``[batch, length]``; floating predictions are scores, of which the largest is taken."""
    labels, guesses = labels_of(function, y_true, y_pred), y_pred
    if y_pred.dtype.is_floating:
        guesses = tf.argmax(y_pred, axis=-1)
    if not labels.shape.is_compatible_with(guesses.shape):
        shapes = f"{tuple(labels.shape)} and {tuple(guesses.shape)}"
        expected = "the same, position by position"
        raise ValueError(errors.sentence(function, "the shape of labels and predicted ids", shapes, expected))
    if labels.dtype == tf.string:
        return labels, guesses
    return tf.cast(labels, tf.int64), tf.cast(guesses, tf.int64)


def labels_of(function: str, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    """Labels as ids: of vectors beside scores, the largest component; an axis of size one is dropped."""
    for name, given in (("y_true", y_true), ("y_pred", y_pred)):
        if not isinstance(given, tf.Tensor):
            raise TypeError(
                errors.sentence(function, name, f"a {type(given).__name__}", "a tensor [batch, length, ...]")
            )
    if not y_pred.dtype.is_floating or y_true.shape.rank != y_pred.shape.rank:
        return y_true
    return tf.squeeze(y_true, -1) if y_true.shape[-1] == 1 else tf.argmax(y_true, axis=-1)
