"""What users certify: `distpad certify to_certify:right`, and what does not pass, or is refused."""

import numpy as np
import tensorflow as tf

import distpad


def each(y_true, y_pred):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y_true, y_pred)


def mean(y_true, y_pred, lengths):
    valid = tf.sequence_mask(lengths, tf.shape(y_pred)[1], y_pred.dtype)
    return tf.reduce_sum(each(y_true, y_pred) * valid) / tf.reduce_sum(valid)


def _arguments(loss):
    random = np.random.default_rng(1)
    batch = {"x": random.normal(size=[6, 4, 3]), "y": random.integers(0, 2, [6, 4]), "lengths": [4, 1, 2, 1, 4, 1]}
    model = tf.keras.Sequential([tf.keras.Input([None, 3]), tf.keras.layers.Dense(2)])
    return {"model": model, "loss": loss, "batch": batch}


def right():
    return _arguments(distpad.DistributedLoss(each))


def wrong():
    return _arguments(mean)


def refused():
    return _arguments(distpad.DistributedLoss(lambda t, p: tf.reduce_mean(each(t, p))))


def failing():
    return 1 / 0


def nothing():
    return {"modle": None}
