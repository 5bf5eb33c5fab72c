"""Class ids from labels and predictions: ids, vectors, scores, or binary probabilities."""

from __future__ import annotations

import tensorflow as tf

from distpad import errors
from distpad.collectives import checked

_BINARY = "y_pred holds a value outside 0 to 1, expected probabilities for binary labels (found: the first such value)"


def is_binary(y_true: tf.Tensor, y_pred: tf.Tensor) -> bool:
    """Whether predictions are one number a position.

    These are ``[batch, length]`` for labels of the same rank, or ``[batch, length, 1]`` for labels with or without the
    last axis. Labels ``[batch, 1]`` beside scores ``[batch, classes]`` are ids, as Keras 2's fit gives them.
    """
    if not all(isinstance(given, tf.Tensor) for given in (y_true, y_pred)) or not y_pred.dtype.is_floating:
        return False
    both = y_true.shape.rank, y_pred.shape.rank
    if both == (2, 2):
        return y_true.shape[-1] != 1 or y_pred.shape[-1] in (1, None)
    return None not in both and both[1] > 0 and y_pred.shape[-1] == 1 and both[1] - both[0] in (0, 1)


def binary_check(threshold: float | None, y_true: tf.Tensor, y_pred: tf.Tensor) -> checked.Check:
    """Check that binary predictions are probabilities where there is no threshold. Padding was replaced before."""
    text = f"{_BINARY}. Write threshold=0.0 for logits"
    if threshold is not None or not is_binary(y_true, y_pred):
        return checked.Check(text, 0, True)
    flat = tf.reshape(tf.cast(y_pred, tf.float64), [-1])
    outside = tf.logical_not(tf.logical_and(flat >= 0, flat <= 1))  # also NaN
    at = tf.reduce_min(tf.concat([tf.where(outside, tf.range(tf.size(flat)), tf.size(flat)), [tf.size(flat)]], 0))
    return checked.Check(text, tf.concat([flat, [0.0]], 0)[at], tf.logical_not(tf.reduce_any(outside)))


def vector_check(y_true: tf.Tensor, y_pred: tf.Tensor) -> checked.Check:
    """Check that label vectors have one largest component where predictions are scores. Padding was replaced by zeros,
    which pass."""
    text = "y_true holds vectors with several largest components, expected one-hot vectors (found: their number)"
    tensors = isinstance(y_true, tf.Tensor) and isinstance(y_pred, tf.Tensor) and y_pred.dtype.is_floating
    of_vectors = tensors and y_true.shape.rank == y_pred.shape.rank != 0 and y_true.shape[-1] != 1
    if not of_vectors or is_binary(y_true, y_pred) or not (y_true.dtype.is_floating or y_true.dtype.is_integer):
        return checked.Check(text, 0, True)
    largest = tf.reduce_max(y_true, axis=-1, keepdims=True)
    shared = tf.math.count_nonzero(tf.logical_and(y_true == largest, largest > 0), axis=-1) > 1
    return checked.Check(text, tf.math.count_nonzero(shared), tf.logical_not(tf.reduce_any(shared)))


def binary_ids(threshold: float | None, y_true: tf.Tensor, y_pred: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Labels and thresholded predictions ``[batch, length]`` or ``[batch]``."""
    guesses = tf.cast(y_pred > tf.cast(0.5 if threshold is None else threshold, y_pred.dtype), tf.int64)
    if y_pred.shape[-1] == 1 and (y_pred.shape.rank > 2 or y_pred.shape.rank > y_true.shape.rank):
        guesses = tf.squeeze(guesses, -1)
    if y_true.shape.rank > guesses.shape.rank:
        y_true = tf.squeeze(y_true, -1)
    return tf.cast(y_true, tf.int64), guesses


def refuse_binary(function: str, y_true: tf.Tensor, y_pred: tf.Tensor, remedy: str) -> None:
    """Raise ValueError where predictions are one number a position, not scores of classes."""
    if is_binary(y_true, y_pred):
        found = f"{tuple(y_pred.shape)} for labels {tuple(y_true.shape)}"
        expected = "scores [batch, length, classes], one axis more than the labels"
        raise ValueError(errors.sentence(function, "the shape of y_pred", found, expected, remedy))


def ids_of(function: str, y_true: tf.Tensor, y_pred: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Labels and predictions as ids ``[batch, length]``. Floating predictions are scores, whose largest is the id."""
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
    """Labels as ids: the largest component of vectors where predictions are scores. An axis of size one is dropped."""
    for name, given in (("y_true", y_true), ("y_pred", y_pred)):
        is_scalar = isinstance(given, tf.Tensor) and given.shape.rank == 0
        kind, rule = "a scalar" if is_scalar else f"a {type(given).__name__}", "a tensor [batch, length, ...]"
        errors.require(function, isinstance(given, tf.Tensor) and not is_scalar, name, kind, rule, error=TypeError)
    if not y_pred.dtype.is_floating or y_true.shape.rank != y_pred.shape.rank:
        return y_true
    return tf.squeeze(y_true, -1) if y_true.shape[-1] == 1 else tf.argmax(y_true, axis=-1)
