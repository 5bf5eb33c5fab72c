"""Sequences of one-hot vectors, with categorical cross-entropy.

    python examples/labels/one_hot.py --replicas 4
    horovodrun -np 2 python examples/labels/one_hot.py
    launch/multiworker.sh -np 2 -- python examples/labels/one_hot.py

Padding creates rows of zeros. A row of zeros is not a one-hot vector. Its cross-entropy is 0, but it still needs a
mask, for three reasons. The mean counts the row. With logits, its gradient is softmax(logits) instead of 0, because
TensorFlow assumes that a label sums to 1. Predicted probabilities of all zeros, as a masked layer outputs, give NaN.
DistributedLoss avoids all three: at padded positions it replaces the predictions by safe values, and excludes the
result from sum and count. The gradient of the model's output is exactly 0 there.
"""

from __future__ import annotations

import sys

import compare
import numpy as np
import tensorflow as tf

import distpad

ROWS, FEATURES, CLASSES = 6, 8, 12  # rows of each replica

per_position = tf.keras.losses.CategoricalCrossentropy(from_logits=True, reduction="none")
loss_fn = distpad.DistributedLoss(per_position)


def sequences(replica: int) -> tuple[list, list]:
    """Return features [n, FEATURES] and labels [n, CLASSES] of a replica's rows. Replicas have distinct data."""
    random = np.random.default_rng([2, replica])
    sizes = compare.lengths(random, ROWS)
    features = [random.normal(size=[n, FEATURES]).astype("float32") for n in sizes]
    return features, [np.eye(CLASSES, dtype="float32")[random.integers(0, CLASSES, size=n)] for n in sizes]


# With distpad: pad on the host, pad to the global maximum in the step, and divide the loss by the global count.


def pad(features: list, labels: list) -> compare.Batch:
    padded = distpad.pad(labels)
    return {"x": distpad.pad(features).values, "y": padded.values, "lengths": padded.lengths}


def step(model: compare.Linear, batch: compare.Batch) -> tuple:
    # One collective for both. Steps that gather or compile need it; gradients do not (see integers.py).
    x, y = distpad.pad_to_global_max((batch["x"], batch["y"])).values
    with tf.GradientTape() as tape:
        loss = loss_fn(y, model(x), lengths=batch["lengths"])
    return loss, distpad.gradient(tape, loss, model.variables)


# The plain Keras way: padding counts like valid positions.


def keras_pad(features: list, labels: list) -> compare.Batch:
    padded = tf.keras.utils.pad_sequences(features, dtype="float32")  # the default dtype is an integer
    return {"x": padded, "y": tf.keras.utils.pad_sequences(labels)}


def keras_mean(model: compare.Linear, batch: compare.Batch) -> tf.Tensor:
    return tf.reduce_mean(per_position(batch["y"], model(batch["x"])))


# Masked by hand: correct on one device. On several, positions of a replica with fewer positions weigh more.


def own_mean(model: compare.Linear, batch: compare.Batch) -> tf.Tensor:
    losses = per_position(batch["y"], model(batch["x"]))
    mask = tf.sequence_mask(batch["lengths"], tf.shape(losses)[1], losses.dtype)
    return tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)


def by_hand(labels: np.ndarray, logits: np.ndarray) -> tuple[float, np.ndarray]:
    """Compute the loss of one sequence and its derivative by the logits, in NumPy."""
    odds = np.exp(logits)
    probabilities = odds / odds.sum(axis=-1, keepdims=True)
    return -(labels * np.log(probabilities)).sum(), probabilities - labels


KIND = compare.Kind(
    "Sequences of one-hot vectors, categorical cross-entropy",
    FEATURES,
    CLASSES,
    sequences,
    by_hand,
    {
        compare.DISTPAD: (pad, step),
        compare.KERAS: (keras_pad, compare.mean_of_means(keras_mean)),
        compare.OWN: (pad, compare.mean_of_means(own_mean)),
    },
)

if __name__ == "__main__":
    sys.exit(compare.main(KIND))
