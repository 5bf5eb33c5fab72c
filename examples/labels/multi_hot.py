"""Sequences of multi-hot vectors (several sounds, notes or tags at a time), with binary cross-entropy.

    python examples/labels/multi_hot.py --replicas 4
    horovodrun -np 2 python examples/labels/multi_hot.py
    launch/multiworker.sh -np 2 -- python examples/labels/multi_hot.py

A vector of zeros is a valid label here: no class is active. So no value can mark padding: a mask from a comparison with
zero drops valid positions. Lengths mark the padding. The plain Keras way learns silence from the padding.
"""

from __future__ import annotations

import sys

import compare
import numpy as np
import tensorflow as tf

import distpad

ROWS, FEATURES, CLASSES = 6, 8, 5  # rows of each replica

per_position = tf.keras.losses.BinaryCrossentropy(from_logits=True, reduction="none")  # mean over the classes
loss_fn = distpad.DistributedLoss(per_position)


def sequences(replica: int) -> tuple[list, list]:
    """Return features [n, FEATURES] and labels [n, CLASSES] of a replica's rows. One position in six has no class."""
    random = np.random.default_rng([3, replica])
    sizes = compare.lengths(random, ROWS)
    features = [random.normal(size=[n, FEATURES]).astype("float32") for n in sizes]
    return features, [(random.random(size=[n, CLASSES]) < 0.3).astype("float32") for n in sizes]


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
    probabilities = 1 / (1 + np.exp(-logits))
    likelihood = np.where(labels == 1, probabilities, 1 - probabilities)
    return -np.log(likelihood).mean(axis=-1).sum(), (probabilities - labels) / CLASSES


KIND = compare.Kind(
    "Sequences of multi-hot vectors, binary cross-entropy",
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
