"""Sequences of images of different sizes, with mean squared error.

    python examples/labels/images.py --replicas 4
    horovodrun -np 2 python examples/labels/images.py
    launch/multiworker.sh -np 2 -- python examples/labels/images.py

Three axes are ragged: each sequence has its own number of images, and each image its own height and width. One call
of distpad.pad pads them all, and its mask [batch, length, height, width] is true on real pixels. That is the mask to
give to the loss: lengths alone would know padded images, but not the padded pixels around small ones.
(A linear model at each pixel is what can be compared exactly; real convolutions also see the padding at the border.)
"""

from __future__ import annotations

import sys

import compare
import numpy as np
import tensorflow as tf

import distpad

ROWS, CHANNELS = 4, 3  # rows of each replica

per_pixel = tf.keras.losses.MeanSquaredError(reduction="none")  # the mean over the channels: [batch, length, h, w]
loss_fn = distpad.DistributedLoss(per_pixel)


def sequences(replica: int) -> tuple[list, list]:
    """Lists of images [h, w, CHANNELS] and, as labels, of images [h, w, 1]; every replica has its own."""
    random = np.random.default_rng([4, replica])
    sizes = [random.integers(3, 12, size=[n, 2]) for n in random.integers(1, 6, size=ROWS)]
    features = [[random.normal(size=[h, w, CHANNELS]).astype("float32") for h, w in each] for each in sizes]
    return features, [[random.normal(size=[h, w, 1]).astype("float32") for h, w in each] for each in sizes]


# With distpad: pad all axes on the host, make the replicas' shapes alike, let the loss divide by all pixels there are.


def pad(features: list, labels: list) -> compare.Batch:
    # ragged_axes: also where all images of a batch happen to be as high, the mask has the axes of the other batches
    padded = distpad.pad(labels, ragged_axes=(0, 1, 2))
    return {"x": distpad.pad(features, ragged_axes=(0, 1, 2)).values, "y": padded.values, "mask": padded.mask}


def step(model: compare.Linear, batch: compare.Batch) -> tuple:
    # A call pads one axis, so there is one for length, height and width each; the mask travels along and is padded
    # with False. Without this loop all figures stay the same: gradients have the shape of the weights on all replicas,
    # whatever the images' shape. It is for what gathers images, or compiles for one shape.
    images = (batch["x"], batch["y"], batch["mask"])
    for axis in (1, 2, 3):
        images = distpad.pad_to_global_max(images, axis=axis).values
    x, y, mask = images
    with tf.GradientTape() as tape:
        loss = loss_fn(y, model(x), mask=mask)
    return loss, distpad.gradient(tape, loss, model.variables)


# The plain Keras way. pad_sequences refuses images of different sizes (ValueError), so that everybody writes this:


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


# Masked by hand: right on one device. On several, a pixel weighs more where its replica has fewer.


def own_mean(model: compare.Linear, batch: compare.Batch) -> tf.Tensor:
    losses = per_pixel(batch["y"], model(batch["x"]))
    mask = tf.cast(batch["mask"], losses.dtype)
    return tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)


def by_hand(labels: np.ndarray, predictions: np.ndarray) -> tuple[float, np.ndarray]:
    """One image's loss and its derivative by the predictions, in NumPy."""
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
