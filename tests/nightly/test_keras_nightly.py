"""Keras 3.16, which drops masks in recurrent layers: fit with for_keras is exact, and warns without its weights."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tensorflow as tf

import distpad

layers = tf.keras.layers
RATE, FEATURES, CLASSES = 0.3, 3, 5


@pytest.fixture(scope="module", autouse=True)
def nightly():
    """tests/nightly/install.sh prints the folder that stands first on PYTHONPATH here."""
    version = tuple(map(int, tf.keras.__version__.split(".")[:2]))
    assert version >= (3, 16), "these tests need Keras 3.16: tests/run.sh --suite nightly"


def examples():
    """One step of four rows whose lengths differ; a text has at most half as many characters as frames."""
    random = np.random.default_rng(3)
    found = []
    for n in (8, 3, 5, 2):
        x = random.normal(size=[n, FEATURES]).astype("float32")
        y = random.normal(size=[n, CLASSES]).astype("float32")
        found.append({"x": x, "y": y, "text": random.integers(1, CLASSES, n // 2)})
    return found


def fit(model, loss, y, weights=True):
    """The history and the warnings of distpad in one step of gradient descent."""
    padding = {"x": distpad.Pad(), y: distpad.Pad()}
    rows = [{name: row[name] for name in padding} for row in examples()]
    data = distpad.PaddedBatches(rows, batch_size=4, padding=padding, tokens=y).for_keras(x="x", y=y)
    model.compile(loss=loss, optimizer=tf.keras.optimizers.SGD(RATE))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = model.fit(data if weights else data.map(lambda x, y, _: (x, y)), verbose=0)
    warned = [
        text for text in map(str, (each.message for each in caught)) if text.startswith(("DistributedLoss", "CTC"))
    ]
    return history.history["loss"][0], warned, data


def model_of(*front):
    tf.keras.utils.set_random_seed(2)
    recurrent = layers.GRU(4, return_sequences=True, name="recurrent")
    return tf.keras.Sequential([tf.keras.Input([None, FEATURES]), *front, recurrent, layers.Dense(CLASSES)])


class Subclassed(tf.keras.Model):
    def __init__(self, layers):
        super().__init__()
        self.parts = layers

    def call(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return inputs


def check_step(before, gradients, model):
    for old, gradient, new in zip(before, gradients, model.trainable_variables):
        np.testing.assert_allclose(new, old - RATE * gradient.numpy(), atol=2e-6)


def test_masking_gru_dense():
    """With the weights of for_keras, history and weights are those of the rows without padding, one at a time."""
    model, twin = (model_of(layers.Masking(name="masked")) for _ in range(2))
    start = model.get_weights()
    with tf.GradientTape() as tape:
        losses = [tf.square(twin(row["x"][None])[0] - row["y"]) for row in examples()]
        wanted = tf.reduce_mean(tf.concat(losses, 0))
    value, warned, _ = fit(model, distpad.DistributedLoss("mse"), "y")
    assert value == pytest.approx(float(wanted), rel=1e-5) and not warned
    check_step(start, tape.gradient(wanted, twin.trainable_variables), model)

    subclassed = Subclassed(model.layers)
    model.set_weights(start)
    value, warned, _ = fit(subclassed, distpad.DistributedLoss("mse"), "y", weights=False)
    assert abs(value / float(wanted) - 1) > 0.02  # padding counts
    (text,) = warned
    assert "no mask was given" in text and "/masked' made a Keras mask, which was dropped after it" in text


def test_ctc_and_batch_normalization(tmp_path):
    """CTC with frames_per_step: a row's own frames count. BatchNormalization stands where the mask is still there."""
    front = lambda: (layers.Masking(name="masked"), distpad.layers.BatchNormalization(momentum=0.0))
    model, twin = (model_of(*front()) for _ in range(2))
    ctc = distpad.CTC(blank_index=0, frames_per_step=1)
    value, warned, data = fit(model, distpad.DistributedLoss(ctc, per="sequence", average="sequence_sum"), "text")
    frames = np.concatenate([row["x"] for row in examples()])
    moments = model.layers[1].moving_mean, model.layers[1].moving_variance
    np.testing.assert_allclose(moments[0], frames.mean(0), atol=1e-6)
    np.testing.assert_allclose(moments[1], frames.var(0), rtol=1e-5)
    for moving, moment in zip((twin.layers[1].moving_mean, twin.layers[1].moving_variance), moments):
        moving.assign(moment)  # by which one row is normalized as the batch is
    losses = []
    for row in examples():
        logits = tf.transpose(twin(row["x"][None]), [1, 0, 2])
        labels = row["text"][None].astype("int32")
        losses.append(tf.nn.ctc_loss(labels, logits, [labels.size], [len(row["x"])], blank_index=0)[0])
    assert value == pytest.approx(float(tf.add_n(losses) / 4), rel=1e-5) and not warned

    x, y, weights = next(iter(data))
    silent = distpad.CTC(blank_index=0)
    trace = tf.function(lambda x: silent.labels_in_fit(y, model(x), weights)[2]).get_concrete_function
    with pytest.warns(UserWarning, match="CTC: all frames.*/masked' made a Keras mask.*Write frames_per_step="):
        trace(x)

    model.save(tmp_path / "model.keras")
    loaded = tf.keras.models.load_model(tmp_path / "model.keras")
    assert loaded.loss.loss.get_config() == ctc.get_config() and loaded.loss.per == "sequence"
    for one, other in zip(loaded.get_weights(), model.get_weights()):
        np.testing.assert_array_equal(one, other)
