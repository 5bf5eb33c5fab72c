"""The average of a DistributedLoss on one device, row by row, without collectives.

This module shares with the loss only the loss's arguments: a certificate does not detect an error that both contain.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import losses
from distpad.backends import keras_masks
from distpad.losses import weights

_NEUTRAL = 0.25  # replaces padded predictions; other than in the loss, so that a use of padding shows as an error


def of_rows(loss: losses.DistributedLoss, rows: dict[str, Any], y_pred: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """The average of ``loss`` over ``rows`` and its divisor, two float64 scalars.

    The unreduced loss is called with one row at a time, so that a loss that mixes rows shows as an error.

    Args:
      rows: "y" and, where the batch has them, "lengths", "mask" and "sample_weight", ``[rows, ...]`` each.
      y_pred: the predictions for the rows.
    """
    number = tf.nest.flatten(rows["y"])[0].shape[0]
    if not number:
        return tf.add_n([tf.cast(tf.reduce_sum(leaf), tf.float64) for leaf in tf.nest.flatten(y_pred)]), tf.zeros([])
    y_true = tf.nest.map_structure(_wide, rows["y"])
    per_sequence = loss.per == "sequence"
    valid = (_valid_sequences if per_sequence else _valid_positions)(rows, y_true, y_pred, loss.padding_value)
    if getattr(loss.loss, "drops_invalid", False):
        valid = valid._replace(weight=valid.weight * _can_be_aligned(number, *y_true))
    y_true = _clean(y_true, valid.labels, 0)
    y_pred = tf.nest.map_structure(lambda leaf: _clean(_wide(leaf), valid.weight, _NEUTRAL), y_pred)
    columns = zip(*(_sum_of_row(loss, slice(i, i + 1), y_true, y_pred, valid) for i in range(number)))
    total, weight = (tf.cast(tf.stack(column), tf.float64) for column in columns)
    if loss.average == "sequence_mean" and not per_sequence:
        total = tf.math.divide_no_nan(total, weight)
    if isinstance(loss.average, float):
        divisor = tf.constant(loss.average, tf.float64)
    elif loss.average == "token":
        divisor = tf.reduce_sum(weight * valid.tokens)
    else:
        divisor = tf.reduce_sum(tf.cast(weight > 0, tf.float64))
    return tf.math.divide_no_nan(tf.reduce_sum(total), divisor), divisor


class _Valid(NamedTuple):
    """The valid positions or sequences.

    Attributes:
      weight: of each position or sequence, 0 for padding.
      rank: the number of leading axes of the loss that are positions; None: all.
      tokens: the number of positions in each value of the loss.
      labels: which labels are valid, as a weight.
    """

    weight: tf.Tensor
    rank: int | None
    tokens: Any
    labels: tf.Tensor


def _sum_of_row(loss: Any, row: slice, y_true: Any, y_pred: Any, valid: _Valid) -> tuple[tf.Tensor, tf.Tensor]:
    """The weighted sum of one row's losses, and the sum of the weights."""
    values = _wide(loss.call(*tf.nest.map_structure(lambda leaf: leaf[row], (y_true, y_pred))))
    weight = valid.weight[row]
    if weight.shape.rank == values.shape.rank + 1:
        weight = weight[..., 0]
    rank = min(valid.rank or values.shape.rank, values.shape.rank)
    values = tf.reduce_mean(values, axis=list(range(rank, values.shape.rank)))
    weight = tf.broadcast_to(_widen(tf.cast(weight, values.dtype), rank), tf.shape(values))
    return tf.reduce_sum(tf.where(weight != 0, values, 0) * weight), tf.reduce_sum(weight)


def _valid_positions(rows: dict[str, Any], y_true: Any, y_pred: Any, padding_value: Any) -> _Valid:
    factors = []
    if "lengths" in rows:
        width = next(tf.shape(leaf)[1] for leaf in tf.nest.flatten([y_pred, y_true]) if leaf.shape.rank > 1)
        factors.append(tf.sequence_mask(rows["lengths"], width))
    if "mask" in rows:
        factors.append(tf.cast(rows["mask"], tf.bool))
    if padding_value is not None:
        is_vector = y_true.shape.rank > 2 and (tf.nest.is_nested(y_pred) or y_pred.shape.rank == y_true.shape.rank)
        factors.append(_not_padding(y_true, padding_value, is_vector))
    if keras_masks.of(y_pred) is not None:
        factors.append(tf.cast(keras_masks.of(y_pred), tf.bool))
    masked = bool(factors)
    if "sample_weight" in rows:
        factors.append(rows["sample_weight"])
    weight = _product(factors, rows)
    return _Valid(weight, weight.shape.rank if masked or weight.shape.rank > 1 else None, 1.0, weight)


def _valid_sequences(rows: dict[str, Any], y_true: Any, y_pred: Any, padding_value: Any) -> _Valid:
    positions, factors, tokens = [], [], None
    width = tf.shape(y_true)[1] if weights.has_positions(y_true, y_pred) else None
    mask = rows.get("mask")
    masks_rows = mask is not None and mask.shape.rank == 1  # such a mask also decides on rows of length 0
    if "lengths" in rows:
        tokens = tf.cast(rows["lengths"], tf.float64)
        positions += [] if width is None else [tf.sequence_mask(rows["lengths"], width)]
        factors += [] if masks_rows else [tokens > 0]
    if padding_value is not None:
        positions.append(_not_padding(y_true, padding_value, y_true.shape.rank > 2))
    if mask is not None:
        (factors if masks_rows else positions).append(tf.cast(mask, tf.bool))
    labels = _product(positions, rows)
    if positions:
        tokens = tf.reduce_sum(labels, axis=list(range(1, labels.shape.rank)))
        factors += [] if masks_rows else [tokens > 0]
    elif tokens is None:
        tokens = tf.ones_like(labels) * tf.cast(1 if width is None else width, tf.float64)
    if keras_masks.of(y_pred) is not None:  # a mask of the frames of predictions
        frames = tf.cast(keras_masks.of(y_pred), tf.bool)
        factors.append(tf.reduce_any(frames, axis=list(range(1, frames.shape.rank))))
    if "sample_weight" in rows:
        given = rows["sample_weight"]
        factors.append(given[:, 0] if given.shape.rank == 2 else given)
    weight = _product(factors, rows)
    return _Valid(weight, 1, tokens, labels * _widen(weight, labels.shape.rank))


def _can_be_aligned(number: int, labels: Any, lengths: Any, frames: Any) -> tf.Tensor:
    """For CTC: 1 for each row with a frame for each label, and one more frame between two equal labels."""
    aligned = []
    for i in range(number):
        text = labels[i, : lengths[i]]
        needed = tf.size(text) + tf.math.count_nonzero(text[1:] == text[:-1], dtype=tf.int32)
        aligned.append(needed <= tf.cast(frames[i], tf.int32))
    return tf.cast(tf.stack(aligned), tf.float64)


def _product(factors: list[Any], rows: dict[str, Any]) -> tf.Tensor:
    """The product of masks and weights. A factor may have fewer axes than another, or axes of size 1."""
    rank = max((factor.shape.rank for factor in factors), default=1)
    product = _widen(tf.ones(tf.shape(tf.nest.flatten(rows["y"])[0])[:1], tf.float64), rank)
    for factor in factors:
        product *= _widen(tf.cast(factor, tf.float64), rank)
    return product


def _widen(tensor: tf.Tensor, rank: int) -> tf.Tensor:
    """Add trailing axes of size 1 up to ``rank``."""
    for _ in range(rank - tensor.shape.rank):
        tensor = tensor[..., tf.newaxis]
    return tensor


def _clean(tensor: Any, weight: tf.Tensor, value: float) -> Any:
    """Put ``value`` where the weight is 0. Nests, and tensors that do not match the weight, are returned unchanged."""
    if not isinstance(tensor, tf.Tensor) or tensor.dtype == tf.string or tensor.shape.rank < weight.shape.rank:
        return tensor
    sizes = zip(weight.shape, tensor.shape)
    if any(w not in (1, size) for w, size in sizes if w is not None and size is not None):
        return tensor
    replaced = tf.cast(value if tensor.dtype.is_floating else 0, tensor.dtype)
    return tf.where(_widen(weight, tensor.shape.rank) != 0, tensor, replaced)


def _not_padding(y_true: tf.Tensor, padding_value: Any, is_vector: bool) -> tf.Tensor:
    is_nan = y_true.dtype.is_floating and np.isnan(padding_value)  # NaN does not equal itself
    padding = tf.math.is_nan(y_true) if is_nan else y_true == tf.constant(padding_value, y_true.dtype)
    return tf.math.logical_not(tf.reduce_all(padding, axis=-1) if is_vector else padding)


def _wide(tensor: Any) -> Any:
    """Half precision as float32."""
    is_half = isinstance(tensor, tf.Tensor) and tensor.dtype in (tf.float16, tf.bfloat16)
    return tf.cast(tensor, tf.float32) if is_half else tensor
