"""Metrics beside binary labels: one probability a position is no score of classes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tensorflow as tf

import distpad
from distpad import metrics
from replica_world import alone

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

LABELS = np.array([[1, 0, 1, 1], [0, 0, 1, 7]])
CHANCES = np.array([[0.9, 0.2, 0.4, 0.6], [0.1, 0.7, 0.8, 9.0]])  # the last position is padding
LENGTHS = np.array([4, 3])
OPTIONS = {"TokenAccuracy": 5 / 7, "SequenceAccuracy": 0.0}


def value(world, make, labels, predictions):
    with world.scope():
        metric = make(backend=world.backend)

    def step(given):
        metric.update_state(given["y"], given["p"], lengths=given["n"])
        return metric.result()

    given = {"y": labels, "p": predictions, "n": LENGTHS}
    return next(iter(world.run(step, lambda _: given, graph=False).values()))


@pytest.mark.parametrize("name", OPTIONS)
def test_probabilities_of_positions(world, name):
    for labels, chances in (
        (LABELS, CHANCES),
        (LABELS, CHANCES[..., None]),
        (LABELS[..., None], CHANCES[..., None].astype("float32")),
    ):
        assert value(world, getattr(metrics, name), labels, chances) == pytest.approx(OPTIONS[name])


def test_whole_sequences_that_are_right(world):
    chances = np.where(LABELS == 1, 0.75, 0.25)
    chances[0, 0] = 0.5  # not above the threshold
    assert value(world, metrics.SequenceAccuracy, LABELS, chances) == 0.5


def test_logits_want_a_threshold(world):
    logits = np.log(CHANCES.clip(0, 0.99)) - np.log(1 - CHANCES.clip(0, 0.99))
    for name, wanted in OPTIONS.items():
        kind = getattr(metrics, name)
        with pytest.raises(ValueError, match=r"outside 0 to 1.*Write threshold=0\.0 for logits"):
            value(world, kind, LABELS, logits)
        assert value(world, functools.partial(kind, threshold=0.0), LABELS, logits) == pytest.approx(wanted)


def test_rows_that_have_one_label():
    metric = metrics.TokenAccuracy(backend="local")
    metric.update_state(np.array([1, 0, 1, 1]), np.array([[0.9], [0.2], [0.4], [0.6]]))
    assert float(metric.result()) == 0.75


def test_rows_whose_labels_have_an_axis_of_one():
    """As Keras 2's fit gives labels ``[batch]``: beside scores they are ids, not binary labels."""
    metric = metrics.TokenAccuracy(backend="local")
    metric.update_state([[0], [1], [1]], [[2.5, 0.1], [-1.0, 0.5], [3.0, 0.2]])
    assert float(metric.result()) == pytest.approx(2 / 3)


def test_ids_stay_ids():
    metric = metrics.TokenAccuracy(backend="local")
    metric.update_state(LABELS, np.array([[1, 0, 1, 1], [0, 0, 0, 0]]), lengths=LENGTHS)
    assert float(metric.result()) == pytest.approx(6 / 7)


@pytest.mark.parametrize("name", ["CharacterErrorRate", "WordErrorRate", "Perplexity"])
@pytest.mark.parametrize("predictions", [CHANCES, CHANCES[..., None]])
def test_others_refuse_them(name, predictions):
    metric = getattr(metrics, name)(backend="local")
    with pytest.raises(
        ValueError, match=rf"{name}: the shape of y_pred is .* expected scores \[batch, length, classes\]"
    ):
        metric.update_state(LABELS % 2, predictions, lengths=LENGTHS)


def test_in_fit_as_kerass_binary_accuracy():
    inputs = tf.keras.Input([4])
    model = tf.keras.Model(inputs, tf.keras.layers.Activation("sigmoid")(inputs))
    own = metrics.TokenAccuracy(backend="local", name="own")
    model.compile(loss="mse", metrics=[own, tf.keras.metrics.BinaryAccuracy(name="keras")])
    x = np.random.default_rng(3).normal(size=[8, 4]).astype("float32")
    found = model.evaluate(x, (x > 0.3).astype("int32"), verbose=0, return_dict=True)
    assert found["own"] == pytest.approx(found["keras"]) and 0 < found["own"] < 1


@alone
def test_the_threshold_is_saved(world):
    config = metrics.TokenAccuracy(threshold=0.25, backend="local").get_config()
    assert metrics.TokenAccuracy.from_config(config).threshold == 0.25
    with pytest.raises(TypeError, match="TokenAccuracy: threshold is 'half', expected a number"):
        metrics.TokenAccuracy(threshold="half")
    assert distpad.metrics is metrics


@pytest.mark.parametrize("kind", [distpad.metrics.TokenAccuracy, distpad.metrics.SequenceAccuracy])
def test_several_labels_a_position_are_no_class(world, kind):
    """The largest of several is one of them, whichever comes first."""
    with world.scope():
        metric = kind(backend=world.backend)
    scores, lengths = tf.constant([[[0.9, 0.1, 0.2], [0.3, 0.4, 0.8]]]), [1]
    labels = {n: tf.constant([[n, [5, 5, 0]]]) for n in ((1, 0, 0), (1, 0, 1))}  # what is no position says nothing

    def update(several):
        metric.update_state(labels[(1, 0, int(several))], scores, lengths=lengths)
        return tf.constant(0)

    world.run(lambda r: update(False), np.int64, graph=False)
    assert float(metric.result()) == 1
    with pytest.raises(ValueError, match="y_true holds vectors with several largest components"):
        world.run(lambda r: update(True), np.int64, graph=False)
