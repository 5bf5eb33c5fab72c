"""Keras masks that a layer drops: DistributedLoss, CTC and BatchNormalization warn once, and name the layers.

Each model is traced, not trained. tests/nightly runs this file with Keras 3.16 too, which drops masks in more layers.
"""

from __future__ import annotations

import re
import warnings

import pytest
import tensorflow as tf

import distpad
from distpad import versions
from distpad.backends import keras_masks
from distpad.losses.counted import CountedWeights

layers = tf.keras.layers
WIDE = pytest.mark.wide
WORDS = tf.constant([[1, 2, 0], [3, 0, 0]])


class OwnMask(layers.Layer):
    """A layer of one's own that makes a mask, and that has a scope inside its own."""

    def call(self, inputs):
        with tf.name_scope("inside"):
            return tf.one_hot(inputs, 4)

    def compute_mask(self, inputs, mask=None):
        return tf.not_equal(inputs, 0)


class Subclassed(tf.keras.Model):
    def __init__(self, *parts):
        super().__init__()
        self.parts = parts

    def call(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return inputs


def model_of(style, *parts):
    parts = (*parts, layers.Dense(3, name="last"))
    if style == "subclassed":
        return Subclassed(*parts)
    inputs = tf.keras.Input([None], dtype="int32")
    if style == "sequential":
        return tf.keras.Sequential([inputs, *parts])
    outputs = inputs
    for part in parts:
        outputs = part(outputs)
    return tf.keras.Model(inputs, outputs)


def embedding(mask_zero=True):
    return layers.Embedding(9, 4, mask_zero=mask_zero, name="words")


def masking():
    return tf.keras.Sequential([layers.Embedding(9, 4, name="plain"), layers.Masking(name="masking_7")], name="front")


def warned(function, times=1):
    """The warnings of distpad while a function of words is traced so many times."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            tf.function(function).get_concrete_function(WORDS)
    names = ("DistributedLoss", "CTC", "BatchNormalization")
    return [str(each.message) for each in caught if str(each.message).startswith(names)]


def of_positions(model, times=1, **options):
    loss_fn = distpad.DistributedLoss(lambda _, y_pred: y_pred)
    return warned(lambda words: loss_fn(tf.zeros([2, 3]), model(words), **options), times)


DROPS = {  # the layers, the one that makes the mask, and the last one that has it
    "sequential": (lambda: [embedding(), layers.Conv1D(4, 1)], "words", "it"),
    "functional": (lambda: [masking(), layers.MaxPooling1D(1)], "front/masking_7", "it"),
    "subclassed": (
        lambda: [OwnMask(name="own"), layers.Activation("relu", name="relu_5"), layers.Lambda(lambda x: x * 2)],
        "own",
        "layer '[^']*/relu_5'",
    ),
}


@pytest.mark.parametrize("style", DROPS)
def test_a_dropped_mask_is_told_once(style):
    parts, maker, last = DROPS[style]
    (told,) = of_positions(model_of(style, *parts()), times=2)
    assert re.search(f"no mask was given.*'[^']*/{maker}' made a Keras mask, which was dropped after {last}[.]", told)
    assert "the weights of for_keras" in told and "lengths=" in told


@WIDE
@pytest.mark.parametrize("layer", [layers.Bidirectional, lambda layer: layer, layers.TimeDistributed])
def test_recurrent_layers_drop_it_from_keras_3_16_on(layer):
    inner = layers.Dense(4) if layer is layers.TimeDistributed else layers.GRU(4, return_sequences=True)
    told = of_positions(model_of("functional", embedding(), layer(inner)))
    is_old = (versions.KERAS, versions.KERAS_MINOR) < (3, 16)
    assert [re.search(r"'[^']*/words' made.* after it\.", each) is not None for each in told] == [True] * (not is_old)


@pytest.mark.parametrize(
    "source",
    [*(pytest.param(each, marks=WIDE) for each in ("lengths", "weights")), "rows' weights", "no mask", "rank 1"],
)
def test_what_tells_the_positions_spares_the_warning(source):
    model = model_of("sequential", embedding(source != "no mask"), layers.Conv1D(4, 1))
    if source == "lengths":
        assert not of_positions(model, lengths=tf.constant([2, 1]))
    elif source == "weights":
        assert not of_positions(model, sample_weight=tf.ones([2, 3]))
    elif source == "rows' weights":  # Keras 2's fit gives them a second axis
        assert len(of_positions(model, sample_weight=tf.ones([2, 1]))) == 1
    elif source == "no mask":
        (told,) = of_positions(model)
        assert "made a Keras mask" not in told
    else:  # each row is one position
        model = model_of("sequential", embedding(), layers.GlobalAveragePooling1D())
        assert not warned(lambda words: distpad.DistributedLoss("mse")(tf.zeros([2, 3]), model(words)))


def test_eager_tensors_do_not_know_their_layers():
    model = model_of("sequential", embedding(), layers.Conv1D(4, 1))
    with pytest.warns(UserWarning, match="no mask was given") as caught:
        distpad.DistributedLoss("mse")(tf.zeros([2, 3, 3]), model(WORDS))
    assert not [each for each in caught if "made a Keras mask" in str(each.message)]


@pytest.mark.parametrize(
    ("mask_zero", "given", "count"),
    [(True, {}, 1), (True, {"lengths": tf.constant([4, 2])}, 0), pytest.param(False, {}, 0, marks=WIDE)],
)
def test_one_value_a_sequence(mask_zero, given, count):
    """Padded labels without lengths."""
    labels = tf.constant([[1, 2, 3, 1], [1, 2, 0, 0]])
    loss = lambda _, y_pred: tf.reduce_sum(y_pred, [1, 2])
    loss_fn = distpad.DistributedLoss(loss, per="sequence", average="sequence_sum")
    model = model_of("sequential", embedding(mask_zero), layers.Conv1D(4, 1))
    told = warned(lambda words: loss_fn(labels, model(words), **given))
    assert len(told) == count and all("/words' made a Keras mask, which was dropped after it" in each for each in told)


@pytest.mark.parametrize(("drops", "frames_per_step", "count"), [(True, None, 1), (True, 1, 0), (False, None, 0)])
def test_frames_of_ctc(drops, frames_per_step, count):
    """In fit, CTC takes a row's frames from the Keras mask: without it, all frames count."""
    counts, lengths = tf.ones([2, 5], tf.float64), {"x": tf.constant([2, 1])}
    weights = CountedWeights(tf.ones([2, 2]), counts, lengths, {}, 1, tf.float32, "x", "x")
    ctc = distpad.CTC(blank_index=0, frames_per_step=frames_per_step)
    model = model_of("sequential", embedding(), *[layers.Conv1D(4, 1)] * drops)
    told = warned(lambda words: ctc.labels_in_fit(words, model(words), weights)[2])
    assert len(told) == count and all(re.search(r"CTC: all frames.*/words'.*frames_per_step=", each) for each in told)


@pytest.mark.parametrize("drops", [True, pytest.param(False, marks=WIDE)])
def test_batch_normalization(drops):
    """Its moments are of the valid positions, which the Keras mask tells."""
    model = model_of("sequential", embedding(), *[layers.Conv1D(4, 1)] * drops)
    normal = distpad.layers.BatchNormalization(name="normal")
    told = warned(lambda words: normal(model(words), training=True))
    assert len(told) == drops and all(re.search("no mask reached layer 'normal'.*/words' made", e) for e in told)


def test_a_deep_network_is_searched_once(monkeypatch):
    """Each layer looks for a dropped mask where no layer before it has looked."""
    seen = []
    monkeypatch.setattr(keras_masks, "of", lambda tensor: seen.append(tensor.name))

    def search(words):
        for owner in map(str, range(3)):
            words = tf.sin(tf.cast(words, tf.float32))
            keras_masks.warn_unmasked(owner, words, "", "")
        return words

    warned(search)
    assert len(seen) == len(set(seen)) > 3


def test_one_position_a_row_has_no_padding():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distpad.DistributedLoss("mse")(tf.ones([2, 1, 3]), tf.zeros([2, 1, 3]))
