"""Averages: one replica's sums of a weighted loss, and its local contribution to the global mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, precision
from distpad.losses.weights import Gate, Weights


class Sums(NamedTuple):
    """One replica's sums, float64 scalars.

    Attributes:
      total: the sum of weight times loss, differentiable.
      tokens: the sum of the weights.
      sequences: the number of rows whose weights sum to more than 0.
      dtype: the dtype of the loss that DistributedLoss returns.
    """

    total: Any
    tokens: Any
    sequences: Any
    dtype: tf.DType = tf.float32


def sum_up(losses: tf.Tensor, w: Weights, average: str | float, gate: Gate | None = None) -> Sums:
    """Mask, weigh and sum a loss: within rows in the loss's dtype (float32 at least), over rows in float64.

    Args:
      losses: ``[batch, ...]``; axes after the positions are averaged first.
      w: weights that ``weights.broadcast_to`` returned for these losses.
      average: as in DistributedLoss.
      gate: makes the gradient NaN where a check fails.
    """
    rank = losses.shape.rank if w.rank is None else w.rank
    if rank < losses.shape.rank:
        losses = tf.reduce_mean(losses, axis=list(range(rank, losses.shape.rank)))
    ones = tf.ones_like(losses)
    if w.weight is not None:
        ones *= tf.cast(w.weight, losses.dtype)
    if w.mask is not None:
        ones = tf.where(w.mask, ones, 0)
        losses = (gate or Gate()).where(w.mask, losses, 0)
    inner = list(range(1, rank))
    row_total = tf.reduce_sum(losses * ones, axis=inner)
    row_weight = tf.reduce_sum(ones, axis=inner)
    if average == "sequence_mean":
        row_total = tf.math.divide_no_nan(row_total, row_weight)
    row_tokens = tf.cast(row_weight, tf.float64)
    if w.tokens is not None:
        row_tokens *= w.tokens
    sequences = tf.reduce_sum(tf.cast(row_weight > 0, tf.float64))
    total = tf.reduce_sum(tf.cast(row_total, tf.float64))
    return Sums(total, tf.reduce_sum(row_tokens), sequences, losses.dtype)


def nan_sums(y_pred: Any) -> Sums:
    """NaN that depends on all predictions, for a replica that has an argument error while a step is traced.

    The gradients of this replica then exist as on the other replicas. So the optimiser does not end the trace, and the
    step reaches the checked all-gather, where all replicas raise.

    Raises: ValueError: no prediction is floating, so that no gradient can exist.
    """
    leaves = [leaf for leaf in tf.nest.flatten(y_pred, expand_composites=True) if tf.is_tensor(leaf)]
    floating = [leaf for leaf in leaves if leaf.dtype.is_floating]
    if not floating:
        raise ValueError("y_pred holds no floating tensor")
    total = tf.add_n([tf.reduce_sum(tf.cast(leaf, tf.float64)) for leaf in floating])
    return Sums(total * np.nan, 0.0, 0.0, precision.widened(floating[0].dtype))


def local_contribution(backend: backends.Backend, sums: Sums, count: Any) -> tf.Tensor:
    """This replica's term of the global mean, times the gradient scale of the engine.

    After the engine's reduction, its gradient is that of the global mean.
    """
    contribution = tf.math.divide_no_nan(tf.cast(sums.total, tf.float64), tf.cast(count, tf.float64))
    return tf.cast(contribution * tf.cast(backend.gradient_scale, contribution.dtype), sums.dtype)


@tf.custom_gradient
def value_with_gradient(value: tf.Tensor, contribution: tf.Tensor) -> Any:
    """``value`` with the gradient of ``contribution``. Adding contribution - contribution would make infinity NaN."""
    return tf.identity(value), lambda upstream: (None, upstream)
