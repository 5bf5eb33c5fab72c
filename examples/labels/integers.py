"""Integer sequences (characters, words, phonemes, tags), with sparse categorical cross-entropy.

    python examples/labels/integers.py --replicas 4
    horovodrun -np 2 python examples/labels/integers.py
    launch/multiworker.sh -np 2 -- python examples/labels/integers.py

Label 0 is an ordinary class here: lengths say what is padding, not values. The plain way pads with that 0 (at the
front, by default) and then trains the model to predict it, on as many positions as the longest sequence leaves over.
"""

from __future__ import annotations

import sys

import compare
import numpy as np
import tensorflow as tf

import distpad

ROWS, FEATURES, CLASSES = 6, 8, 12  # rows of each replica

per_position = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
loss_fn = distpad.DistributedLoss(per_position)


def sequences(replica: int) -> tuple[list, list]:
    """Features [n, FEATURES] and labels [n] of a replica's rows; every replica has its own."""
    random = np.random.default_rng([1, replica])
    sizes = compare.lengths(random, ROWS)
    features = [random.normal(size=[n, FEATURES]).astype("float32") for n in sizes]
    return features, [random.integers(0, CLASSES, size=n) for n in sizes]


# With distpad: pad on the host, agree on the length in the step, and let the loss divide by the global count.


def pad(features: list, labels: list) -> compare.Batch:
    padded = distpad.pad(labels)
    return {"x": distpad.pad(features).values, "y": padded.values, "lengths": padded.lengths}


def step(model: compare.Linear, batch: compare.Batch) -> tuple:
    # One exchange for both. Gradients do not need it: their shape is that of the weights, whatever the labels' shape.
    # What gathers predictions or labels, or compiles for one shape, does.
    x, y = distpad.pad_to_global_max((batch["x"], batch["y"])).values
    with tf.GradientTape() as tape:
        loss = loss_fn(y, model(x), lengths=batch["lengths"])
    return loss, distpad.gradient(tape, loss, model.variables)


# The plain Keras way: padding counts like everything else, in the sum and in what it is divided by.


def keras_pad(features: list, labels: list) -> compare.Batch:
    padded = tf.keras.utils.pad_sequences(features, dtype="float32")  # by default it would make them integers
    return {"x": padded, "y": tf.keras.utils.pad_sequences(labels)}


def keras_mean(model: compare.Linear, batch: compare.Batch) -> tf.Tensor:
    return tf.reduce_mean(per_position(batch["y"], model(batch["x"])))


# Masked by hand: right on one device. On several, a position weighs more where its replica has fewer.


def own_mean(model: compare.Linear, batch: compare.Batch) -> tf.Tensor:
    losses = per_position(batch["y"], model(batch["x"]))
    mask = tf.sequence_mask(batch["lengths"], tf.shape(losses)[1], losses.dtype)
    return tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)


def by_hand(labels: np.ndarray, logits: np.ndarray) -> tuple[float, np.ndarray]:
    """One sequence's loss and its derivative by the logits, in NumPy."""
    odds = np.exp(logits)
    probabilities = odds / odds.sum(axis=-1, keepdims=True)
    wanted = np.eye(CLASSES)[labels]
    return -np.log(probabilities[wanted == 1]).sum(), probabilities - wanted


KIND = compare.Kind(
    "Integer sequences, sparse categorical cross-entropy",
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
