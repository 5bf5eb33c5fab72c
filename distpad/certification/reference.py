"""The average that a DistributedLoss stands for, on one device, written plainly: a row at a time, nothing exchanged.

Shares nothing with the loss but what was given to it: were both wrong in the same way, a certificate would not tell.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import losses
from distpad.losses import weights

_NEUTRAL = 0.25  # at padded places of predictions; another than the loss's own, so that who looks there is noticed


def of_rows(loss: losses.DistributedLoss, rows: dict[str, Any], y_pred: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """The average of ``loss`` over ``rows``, and what it is divided by: two scalars.

    The unreduced loss is asked for each row by itself, so that what one row's loss owes to another's is noticed.

    Args:
      rows: "y", and whichever of "lengths", "mask" and "sample_weight" the loss is given, ``[rows, ...]`` each.
      y_pred: what the model predicts for them.
    """
    number = tf.nest.flatten(rows["y"])[0].shape[0]
    if not number:
        return tf.add_n([tf.cast(tf.reduce_sum(leaf), tf.float64) for leaf in tf.nest.flatten(y_pred)]), tf.zeros([])
    y_true = tf.nest.map_structure(_wide, rows["y"])
    sequences = loss.per == "sequence"
    find = _of_sequences if sequences else _of_positions
    weight, rank, tokens, labels = find(rows, y_true, y_pred, loss.padding_value)
    if getattr(loss.loss, "drops_invalid", False):
        weight *= _can_be_aligned(number, *y_true)
    y_true = _clean(y_true, labels, 0)
    y_pred = tf.nest.map_structure(lambda leaf: _clean(_wide(leaf), weight, _NEUTRAL), y_pred)
    totals, counts = [], []
    for i in range(number):
        row = slice(i, i + 1)
        each = _wide(loss.call(*tf.nest.map_structure(lambda leaf, row=row: leaf[row], (y_true, y_pred))))
        own = weight[row][..., 0] if weight.shape.rank == each.shape.rank + 1 else weight[row]
        axes = min(rank or each.shape.rank, each.shape.rank)
        each = tf.reduce_mean(each, axis=list(range(axes, each.shape.rank)))
        own = tf.broadcast_to(_trail(tf.cast(own, each.dtype), axes), tf.shape(each))
        totals.append(tf.reduce_sum(tf.where(own != 0, each, 0) * own))
        counts.append(tf.reduce_sum(own))
    total, own = (tf.cast(tf.stack(column), tf.float64) for column in (totals, counts))
    if loss.average == "sequence_mean" and not sequences:
        total = tf.math.divide_no_nan(total, own)
    if isinstance(loss.average, float):
        count = tf.constant(loss.average, tf.float64)
    elif loss.average == "token":
        count = tf.reduce_sum(own * (tokens if sequences else 1.0))
    else:
        count = tf.reduce_sum(tf.cast(own > 0, tf.float64))
    return tf.math.divide_no_nan(tf.reduce_sum(total), count), count


class _Found(NamedTuple):
    """What counts: the weight of each position or row, 0 where it does not; how many leading axes of the loss are
    positions (None: all); each row's number of positions, for losses of one value a row; and which labels are any."""

    weight: tf.Tensor
    rank: int | None
    tokens: tf.Tensor | None
    labels: tf.Tensor


def _of_positions(rows: dict[str, Any], y_true: Any, y_pred: Any, padding_value: Any) -> _Found:
    factors = []
    if "lengths" in rows:
        width = next(tf.shape(leaf)[1] for leaf in tf.nest.flatten([y_pred, y_true]) if leaf.shape.rank > 1)
        factors.append(tf.sequence_mask(rows["lengths"], width))
    if "mask" in rows:
        factors.append(tf.cast(rows["mask"], tf.bool))
    if padding_value is not None:
        is_vector = y_true.shape.rank > 2 and (tf.nest.is_nested(y_pred) or y_pred.shape.rank == y_true.shape.rank)
        factors.append(_is_label(y_true, padding_value, is_vector))
    if weights.keras_mask(y_pred) is not None:
        factors.append(tf.cast(weights.keras_mask(y_pred), tf.bool))
    masked = bool(factors)
    if "sample_weight" in rows:
        factors.append(rows["sample_weight"])
    weight = _product(factors, rows)
    return _Found(weight, weight.shape.rank if masked or weight.shape.rank > 1 else None, None, weight)


def _of_sequences(rows: dict[str, Any], y_true: Any, y_pred: Any, padding_value: Any) -> _Found:
    positions, factors, tokens = [], [], None
    width = tf.shape(y_true)[1] if weights.has_positions(y_true, y_pred) else None
    mask = rows.get("mask")
    says_rows = mask is not None and mask.shape.rank == 1  # then rows without any positions may count
    if "lengths" in rows:
        tokens = tf.cast(rows["lengths"], tf.float64)
        positions += [] if width is None else [tf.sequence_mask(rows["lengths"], width)]
        factors += [] if says_rows else [tokens > 0]
    if padding_value is not None:
        positions.append(_is_label(y_true, padding_value, y_true.shape.rank > 2))
    if mask is not None:
        (factors if says_rows else positions).append(tf.cast(mask, tf.bool))
    labels = _product(positions, rows)
    if positions:
        tokens = tf.reduce_sum(labels, axis=list(range(1, labels.shape.rank)))
        factors += [] if says_rows else [tokens > 0]
    elif tokens is None:
        tokens = tf.ones_like(labels) * tf.cast(1 if width is None else width, tf.float64)
    if weights.keras_mask(y_pred) is not None:  # of the prediction's frames
        frames = tf.cast(weights.keras_mask(y_pred), tf.bool)
        factors.append(tf.reduce_any(frames, axis=list(range(1, frames.shape.rank))))
    if "sample_weight" in rows:
        given = rows["sample_weight"]
        factors.append(given[:, 0] if given.shape.rank == 2 else given)
    weight = _product(factors, rows)
    return _Found(weight, 1, tokens, labels * _trail(weight, labels.shape.rank))


def _can_be_aligned(number: int, labels: Any, lengths: Any, frames: Any) -> tf.Tensor:
    """CTC: 1 for each row whose label has a frame for each class, and one more between two that are alike."""
    fits = []
    for i in range(number):
        text = labels[i, : lengths[i]]
        needed = tf.size(text) + tf.math.count_nonzero(text[1:] == text[:-1], dtype=tf.int32)
        fits.append(needed <= tf.cast(frames[i], tf.int32))
    return tf.cast(tf.stack(fits), tf.float64)


def _product(factors: list[Any], rows: dict[str, Any]) -> tf.Tensor:
    """The product of masks and weights, each of which may have fewer axes than another, or axes of size 1."""
    rank = max((factor.shape.rank for factor in factors), default=1)
    product = _trail(tf.ones(tf.shape(tf.nest.flatten(rows["y"])[0])[:1], tf.float64), rank)
    for factor in factors:
        product *= _trail(tf.cast(factor, tf.float64), rank)
    return product


def _trail(tensor: tf.Tensor, rank: int) -> tf.Tensor:
    """Axes of size 1 behind the tensor's own, up to ``rank``."""
    for _ in range(rank - tensor.shape.rank):
        tensor = tensor[..., tf.newaxis]
    return tensor


def _clean(tensor: Any, weight: tf.Tensor, filling: float) -> Any:
    """``filling`` where the weight is 0. Nests of labels, and what has not the weight's axes, are handed on."""
    if not isinstance(tensor, tf.Tensor) or tensor.dtype == tf.string or tensor.shape.rank < weight.shape.rank:
        return tensor
    sizes = zip(weight.shape, tensor.shape)
    if any(w not in (1, size) for w, size in sizes if w is not None and size is not None):
        return tensor
    replaced = tf.cast(filling if tensor.dtype.is_floating else 0, tensor.dtype)
    return tf.where(_trail(weight, tensor.shape.rank) != 0, tensor, replaced)


def _is_label(y_true: tf.Tensor, padding_value: Any, is_vector: bool) -> tf.Tensor:
    is_nan = y_true.dtype.is_floating and np.isnan(padding_value)  # which is equal to nothing, itself included
    padding = tf.math.is_nan(y_true) if is_nan else y_true == tf.constant(padding_value, y_true.dtype)
    return tf.math.logical_not(tf.reduce_all(padding, axis=-1) if is_vector else padding)


def _wide(tensor: Any) -> Any:
    is_half = isinstance(tensor, tf.Tensor) and tensor.dtype in (tf.float16, tf.bfloat16)
    return tf.cast(tensor, tf.float32) if is_half else tensor
