"""Sequences of images of different sizes, with mean squared error.

    python examples/labels/images.py --replicas 4
    horovodrun -np 2 python examples/labels/images.py
    launch/multiworker.sh -np 2 -- python examples/labels/images.py

Three axes are ragged: each sequence has its own number of images, and each image its own height and width. One call
of distpad.pad pads all three axes. Its mask [batch, length, height, width] is true on real pixels. Pass this mask to
the loss: lengths alone mark padded images, but not the padded pixels around small images.
(The model is linear at each pixel, so the comparison is exact. Convolutions also see the padding at the border.)
"""

from __future__ import annotations

import sys

import compare
import numpy as np
import tensorflow as tf

import distpad

ROWS, CHANNELS = 4, 3  # rows of each replica

per_pixel = tf.keras.losses.MeanSquaredError(reduction="none")  # mean over the channels: [batch, length, h, w]
loss_fn = distpad.DistributedLoss(per_pixel)


def sequences(replica: int) -> tuple[list, list]:
    """Return lists of images [h, w, CHANNELS], and lists of label images [h, w, 1]. Replicas have distinct data."""
    random = np.random.default_rng([4, replica])
    sizes = [random.integers(3, 12, size=[n, 2]) for n in random.integers(1, 6, size=ROWS)]
    features = [[random.normal(size=[h, w, CHANNELS]).astype("float32") for h, w in each] for each in sizes]
    return features, [[random.normal(size=[h, w, 1]).astype("float32") for h, w in each] for each in sizes]


# With distpad: pad all axes on the host, pad to one shape on all replicas, and divide by the global pixel count.


def pad(features: list, labels: list) -> compare.Batch:
    # ragged_axes keeps the axes of the mask the same in all batches, also if all images of a batch have one height
    padded = distpad.pad(labels, ragged_axes=(0, 1, 2))
    return {"x": distpad.pad(features, ragged_axes=(0, 1, 2)).values, "y": padded.values, "mask": padded.mask}


def step(model: compare.Linear, batch: compare.Batch) -> tuple:
    # Each call pads one axis: length, height or width. It also pads the mask, with False. The gradients do not need
    # this loop: their shape is the shape of the weights, for images of any shape. Steps that gather images, or compile
    # for one shape, need the loop.
    images = (batch["x"], batch["y"], batch["mask"])
    for axis in (1, 2, 3):
        images = distpad.pad_to_global_max(images, axis=axis).values
    x, y, mask = images
    with tf.GradientTape() as tape:
        loss = loss_fn(y, model(x), mask=mask)
    return loss, distpad.gradient(tape, loss, model.variables)


# The plain Keras way. pad_sequences rejects images of different sizes (ValueError), so this function pads by hand.


def keras_pad(features: list, labels: list) -> compare.Batch:
    frames = [image for sequence in labels for image in sequence]
    height, width = (max(image.shape[axis] for image in frames) for axis in (0, 1))
    batch = {}
    for name, images, channels in (("x", features, CHANNELS), ("y", labels, 1)):
        batch[name] = np.zeros([len(images), max(map(len, images)), height, width, channels], "float32")
        for row, sequence in zip(batch[name], images):
            for place, image in zip(row, sequence):
                place[: image.shape[0], : image.shape[1]] = image
    return batch


def keras_mean(model: compare.Linear, batch: compare.Batch) -> tf.Tensor:
    return tf.reduce_mean(per_pixel(batch["y"], model(batch["x"])))


# Masked by hand: correct on one device. On several, pixels of a replica with fewer pixels weigh more.


def own_mean(model: compare.Linear, batch: compare.Batch) -> tf.Tensor:
    losses = per_pixel(batch["y"], model(batch["x"]))
    mask = tf.cast(batch["mask"], losses.dtype)
    return tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)


def by_hand(labels: np.ndarray, predictions: np.ndarray) -> tuple[float, np.ndarray]:
    """Compute the loss of one image and its derivative by the predictions, in NumPy."""
    difference = predictions - labels.reshape(-1, 1)
    return (difference**2).sum(), 2 * difference


KIND = compare.Kind(
    "Sequences of images of different sizes, mean squared error",
    CHANNELS,
    1,
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
