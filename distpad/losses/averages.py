"""Averages: one replica's sums of a weighed loss, and the share of the global mean that follows from them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import precision
from distpad.collectives import shapes
from distpad.losses import masking
from distpad.losses.gate import Gate


class Sums(NamedTuple):
    """One replica's numerator (differentiable) and counts, all float64; the dtype that the loss comes back in; and the
    loss's number of rows, with whether mask and weights fit it."""

    total: Any
    tokens: Any
    sequences: Any
    dtype: tf.DType = tf.float32
    rows: Any = 0
    is_broadcastable: Any = True


def sum_up(
    function: str, losses: tf.Tensor, valid: masking.Valid, average: str | float, gate: Gate | None = None
) -> Sums:
    """Weigh, mask and sum: within rows in the loss's dtype (float32 at least), over rows in float64.

    Raises ValueError, in the name of the public ``function``, for a mask or weight that does not fit the loss.
    """
    mask, weight, rank, is_broadcastable = _fit(function, losses, valid)
    losses = tf.reduce_mean(losses, axis=list(range(rank, losses.shape.rank)))
    ones = tf.ones_like(losses)
    if weight is not None:
        ones *= tf.cast(weight, losses.dtype)
    if mask is not None:
        ones = tf.where(mask, ones, 0)
        losses = (gate or Gate()).choose(mask, losses, 0)
    inner = list(range(1, rank))
    row_total = tf.reduce_sum(losses * ones, axis=inner)
    row_weight = tf.reduce_sum(ones, axis=inner)
    if average == "sequence_mean":
        row_total = tf.math.divide_no_nan(row_total, row_weight)
    row_tokens = tf.cast(row_weight, tf.float64)
    if valid.tokens is not None:
        row_tokens *= shapes.broadcast(shapes.Source("lengths", valid.tokens), shapes.sizes_of(losses, 1))[0]
    sequences = tf.reduce_sum(tf.cast(row_weight > 0, tf.float64))
    total = tf.reduce_sum(tf.cast(row_total, tf.float64))
    return Sums(total, tf.reduce_sum(row_tokens), sequences, losses.dtype, tf.shape(losses)[0], is_broadcastable)


def abandoned(y_pred: Any) -> Sums:
    """NaN that depends on all predictions, for a replica that refuses its arguments while a step is traced.

    Its gradients then exist as on the other replicas, so that the optimiser does not end the trace, and the step runs
    as far as the exchange that tells all replicas.

    Raises ValueError where no prediction is floating: then no gradient could exist.
    """
    leaves = [leaf for leaf in tf.nest.flatten(y_pred, expand_composites=True) if tf.is_tensor(leaf)]
    floating = [leaf for leaf in leaves if leaf.dtype.is_floating]
    if not floating:
        raise ValueError("y_pred holds no floating tensor")
    total = tf.add_n([tf.reduce_sum(tf.cast(leaf, tf.float64)) for leaf in floating])
    return Sums(total * np.nan, 0.0, 0.0, precision.widened(floating[0].dtype))


def _fit(function: str, losses: tf.Tensor, valid: masking.Valid) -> tuple[tf.Tensor | None, tf.Tensor | None, int, Any]:
    """Mask and weight as they are applied, how many axes of the loss are positions, and whether the shapes fit.

    What weighs nothing is masked, whatever its loss.
    """
    mask, weight, rank = valid.mask, valid.weight, valid.rank or losses.shape.rank
    if weight is not None and rank == losses.shape.rank + 1 and weight.shape[-1] == 1:
        # weights [batch, length, 1], as Keras allows them
        mask = None if mask is None else tf.squeeze(shapes.widen(mask, rank), -1)
        weight, rank = tf.squeeze(weight, -1), rank - 1
    if rank > losses.shape.rank:
        raise ValueError(
            f"{function}: mask or sample_weight has rank {rank}, expected at most {losses.shape.rank}, the rank "
            f"of the loss {tuple(losses.shape)}."
        )
    sizes, is_broadcastable = shapes.sizes_of(losses, rank), valid.is_broadcastable
    sources = []
    for name, given in (("mask", mask), ("sample_weight", weight)):
        if given is None:
            continue
        try:
            given, fit = shapes.broadcast(shapes.Source(name, given, name == "sample_weight"), sizes)
        except ValueError as error:
            raise ValueError(
                f"{function}: {name} has shape {tuple(given.shape)}, expected {tuple(losses.shape[:rank])}, the "
                f"leading axes of the loss {tuple(losses.shape)}."
            ) from error
        is_broadcastable = fit if is_broadcastable is True else tf.logical_and(is_broadcastable, fit)
        given = shapes.widen(given, rank)
        if name == "sample_weight":
            weight, given = given, tf.not_equal(given, 0)
        sources.append(tf.broadcast_to(given, tf.shape(losses)[:rank]))
    mask = functools.reduce(tf.logical_and, sources) if sources else None
    return mask, weight, rank, is_broadcastable


@tf.custom_gradient
def value_with_gradient(value: tf.Tensor, share: tf.Tensor) -> Any:
    """``value`` going forward, ``share`` going back; adding share - share instead would turn infinity into NaN."""
    return tf.identity(value), lambda upstream: (None, upstream)
