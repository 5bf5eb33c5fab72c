"""Integer sequences (characters, words, phonemes, tags), with sparse categorical cross-entropy.

    python examples/labels/integers.py --replicas 4
    horovodrun -np 2 python examples/labels/integers.py
    launch/multiworker.sh -np 2 -- python examples/labels/integers.py

Label 0 is an ordinary class here: lengths mark the padding, values do not. The plain Keras way pads with 0, by default
at the front. It then trains the model to predict class 0 at every padded position.
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
    """Return features [n, FEATURES] and labels [n] of a replica's rows. Replicas have distinct data."""
    random = np.random.default_rng([1, replica])
    sizes = compare.lengths(random, ROWS)
    features = [random.normal(size=[n, FEATURES]).astype("float32") for n in sizes]
    return features, [random.integers(0, CLASSES, size=n) for n in sizes]


# With distpad: pad on the host, pad to the global maximum in the step, and divide the loss by the global count.


def pad(features: list, labels: list) -> compare.Batch:
    padded = distpad.pad(labels)
    return {"x": distpad.pad(features).values, "y": padded.values, "lengths": padded.lengths}


def step(model: compare.Linear, batch: compare.Batch) -> tuple:
    # One collective for both. Gradients do not need it: their shape is the shape of the weights, for any label shape.
    # Steps that gather predictions or labels, or compile for one shape, need it.
    x, y = distpad.pad_to_global_max((batch["x"], batch["y"])).values
    with tf.GradientTape() as tape:
        loss = loss_fn(y, model(x), lengths=batch["lengths"])
    return loss, distpad.gradient(tape, loss, model.variables)


# The plain Keras way: padding counts like valid positions, in the sum and in the denominator.


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
