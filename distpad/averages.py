"""Averages: one replica's sums of a weighed loss, and the share of the global mean that follows from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from distpad import masking


class Sums(NamedTuple):
    """One replica's numerator (differentiable) and counts, all float64, and the dtype that the loss comes back in."""

    total: Any
    tokens: Any
    sequences: Any
    dtype: tf.DType = tf.float32


def sum_up(losses: tf.Tensor, valid: masking.Valid, average: str | float) -> Sums:
    """Weigh, mask and sum: within rows in the loss's dtype (float32 at least), over rows in float64."""
    mask, weight, rank = _fit(losses, valid)
    losses = tf.reduce_mean(losses, axis=list(range(rank, losses.shape.rank)))
    ones = tf.ones_like(losses)
    if mask is not None:
        ones = tf.where(mask, ones, 0)
        losses = tf.where(mask, losses, 0)
    if weight is not None:
        ones *= tf.cast(weight, losses.dtype)
    inner = list(range(1, rank))
    row_total = tf.reduce_sum(losses * ones, axis=inner)
    row_weight = tf.reduce_sum(ones, axis=inner)
    if average == "sequence_mean":
        row_total = tf.math.divide_no_nan(row_total, row_weight)
    row_tokens = tf.cast(row_weight, tf.float64)
    if valid.tokens is not None:
        row_tokens *= valid.tokens
    sequences = tf.reduce_sum(tf.cast(row_weight > 0, tf.float64))
    total = tf.reduce_sum(tf.cast(row_total, tf.float64))
    return Sums(total, tf.reduce_sum(row_tokens), sequences, losses.dtype)


def _fit(losses: tf.Tensor, valid: masking.Valid) -> tuple[tf.Tensor | None, tf.Tensor | None, int]:
    """Mask and weight widened to the loss's position axes, and how many these are."""
    mask, weight, rank = valid.mask, valid.weight, valid.rank or losses.shape.rank
    if weight is not None and rank == losses.shape.rank + 1 and weight.shape[-1] == 1:
        # weights [batch, length, 1], as Keras allows them
        mask, weight, rank = tf.squeeze(mask, -1), tf.squeeze(weight, -1), rank - 1
    if rank > losses.shape.rank:
        raise ValueError(
            f"DistributedLoss: mask or sample_weight has rank {rank}, expected at most {losses.shape.rank}, the rank "
            f"of the loss {tuple(losses.shape)}."
        )
    if mask is None:
        return None, None, rank
    mask = masking.widen(mask, rank)
    weight = None if weight is None else masking.widen(weight, rank)
    for axis in range(rank):
        stretches = weight is not None and axis > 0 and weight.shape[axis] == 1
        sizes = {mask.shape[axis], losses.shape[axis]} - {None}
        if len(sizes) > 1 and not stretches:
            name, given = ("mask", mask) if weight is None or weight.shape[axis] == 1 else ("sample_weight", weight)
            raise ValueError(
                f"DistributedLoss: {name} has shape {tuple(given.shape)}, expected {tuple(losses.shape[:rank])}, the "
                f"leading axes of the loss {tuple(losses.shape)}."
            )
    return mask, weight, rank


@tf.custom_gradient
def value_with_gradient(value: tf.Tensor, share: tf.Tensor) -> Any:
    """``value`` going forward, ``share`` going back; adding share - share instead would turn infinity into NaN."""
    return tf.identity(value), lambda upstream: (None, upstream)
