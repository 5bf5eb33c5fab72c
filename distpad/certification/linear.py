"""The built-in subject: a linear model under a masked softmax cross-entropy. One device is NumPy, by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import backends, losses
from distpad.certification import comparison, rows, steps

_ROWS_PER_REPLICA, _LENGTH, _FEATURES, _CLASSES = 8, 6, 5, 4
_DTYPES = ("float64", "float32")
_AVERAGES = ("token", "sequence_sum", "sequence_mean", 7.5)


def subject(loss: Any, seed: int, backend: backends.Backend) -> comparison.Subject:
    """The linear model in each dtype, with a ``DistributedLoss`` of each average in turn.

    A ``loss`` replaces these, and must be the average "token". It takes no denominator, so accumulation is left out.
    """
    random = np.random.default_rng([seed, 1])
    number = _ROWS_PER_REPLICA * backend.num_replicas
    fields = {
        "x": {"features": random.normal(size=[number, _LENGTH, _FEATURES]), "bias": np.zeros([number, _LENGTH, 1])},
        "y": random.integers(0, _CLASSES, size=[number, _LENGTH]),
        "lengths": random.integers(0, _LENGTH + 1, size=[number]),
    }
    kernel = random.normal(size=[_FEATURES, _CLASSES])
    comparisons = []
    for dtype in _DTYPES:
        with backend.scope():
            model = _Linear(kernel.astype(dtype))
        averages = _AVERAGES if loss is None else ("token",)
        comparisons.append([_comparison(model, loss, average, fields, dtype, backend) for average in averages])
    left_out = {rows.Kind.UNEVEN_ROWS} | ({rows.Kind.ACCUMULATION} if loss is not None else set())
    return comparison.Subject([kind for kind in rows.Kind if kind not in left_out], comparisons)


class _Linear:
    """The model: ``features @ kernel + bias``. Predictions are NaN where the bias is NaN."""

    def __init__(self, kernel: np.ndarray) -> None:
        self.kernel = tf.Variable(kernel)
        self.trainable_variables = [self.kernel]

    def __call__(self, x: dict[str, tf.Tensor]) -> tf.Tensor:
        return x["features"] @ self.kernel + x["bias"]


def _comparison(
    model: _Linear, loss: Any, average: Any, fields: rows.Fields, dtype: str, backend: backends.Backend
) -> comparison.Comparison:
    kernel = model.kernel.numpy().astype(np.float64)

    def draw(kind: rows.Kind, number: int, seed: Sequence[int]) -> rows.Fields:
        drawn = rows.draw(fields, kind, number, seed, mask_rank=2)
        if kind is rows.Kind.NAN_IN_PADDING:
            is_padding = np.arange(_LENGTH)[:, None] >= drawn["lengths"][:, None, None]
            drawn["x"]["bias"] = np.where(is_padding, np.nan, drawn["x"]["bias"])
        return tf.nest.map_structure(lambda array: array.astype(dtype) if array.dtype.kind == "f" else array, drawn)

    def on_one_device(batch: rows.Fields) -> steps.Device:
        gradient, divisor = _gradient(batch, kernel, average)
        return steps.Device([gradient], 0.0, divisor, dtype)

    def own_loss(y_true: Any, y_pred: Any, sample_weight: Any = None, *, lengths: Any = None, mask: Any = None) -> Any:
        # Only DistributedLoss guarantees gradients of exactly 0 at NaN. For other losses, these gradients are dropped.
        y_pred = tf.where(tf.math.is_nan(y_pred), tf.cast(np.nan, y_pred.dtype), y_pred)
        return loss(y_true, y_pred, sample_weight, lengths=lengths, mask=mask)

    loss_fn = losses.DistributedLoss(_cross_entropy, average=average, backend=backend) if loss is None else own_loss
    on_replicas = steps.on_replicas(model, loss_fn, True, backend)
    takes_denominator = isinstance(average, str)
    return comparison.Comparison(
        draw, on_replicas, on_one_device, backend, ["the kernel"], takes_denominator=takes_denominator
    )


def _cross_entropy(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y_true, y_pred)


def _gradient(batch: rows.Fields, kernel: np.ndarray, average: Any) -> tuple[np.ndarray, float]:
    """The gradient with respect to the kernel, and the divisor of the average: float64, position by position, without
    any code of the product."""
    total, tokens, sequences = np.zeros_like(kernel), 0.0, 0
    for i, length in enumerate(batch["lengths"]):
        own, weight = np.zeros_like(kernel), 0.0
        for k in range(length):
            w = float(batch["mask"][i, k]) if "mask" in batch else 1.0
            w *= float(batch["sample_weight"][i, k]) if "sample_weight" in batch else 1.0
            x = batch["x"]["features"][i, k].astype(np.float64)
            odds = np.exp(x @ kernel)
            own += w * np.outer(x, odds / odds.sum() - np.eye(_CLASSES)[batch["y"][i, k]])
            weight += w
        if weight:
            total += own / weight if average == "sequence_mean" else own
            tokens, sequences = tokens + weight, sequences + 1
    divisor = {"token": tokens, "sequence_sum": sequences, "sequence_mean": sequences}.get(average, average)
    return total / (divisor or 1.0), float(divisor)
