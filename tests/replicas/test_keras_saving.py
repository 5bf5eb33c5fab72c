"""A saved model keeps the loss, with all that it was made with, and trains on as if it had never been saved."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle
from keras_world import KERAS, fit_optimizer, steps_dataset

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

RANDOM = np.random.default_rng(8)
X = RANDOM.normal(size=[8, 4, oracle.FEATURES]).astype("float32")
Y = np.where(np.arange(4) < [[4], [1], [0], [2], [3], [1], [1], [2]], RANDOM.integers(0, oracle.CLASSES, [8, 4]), -99)
FORMATS = [(".keras", "callable"), pytest.param(".keras", "keras", marks=pytest.mark.wide)]
if KERAS < 3:  # whose default is a folder, and whose HDF5 finds no functions; most formats under Horovod alone
    formats = [("", "keras"), ("", "callable"), (".h5", "keras")]
    FORMATS += [pytest.param(*each, marks=pytest.mark.worlds("horovod:2")) for each in formats]


@tf.keras.utils.register_keras_serializable("distpad_tests")
def brier(y_true, y_pred):
    wanted = tf.one_hot(tf.cast(y_true, tf.int32), oracle.CLASSES)
    return tf.reduce_sum((tf.nn.softmax(y_pred) - wanted) ** 2, -1)


def inner_loss(kind):
    if kind == "callable":
        return brier
    return tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")


@pytest.mark.worlds("mirrored:2")
@pytest.mark.parametrize(("suffix", "kind"), FORMATS)
def test_a_loaded_model_trains_on(world, tmp_path, suffix, kind):
    if suffix != ".keras" and world.strategy is not None:
        pytest.skip(
            "a matter of the file alone, and minutes of tracing for each replica: see the worlds without strategy"
        )
    options = {"average": "sequence_mean", "per": "position", "padding_value": -99, "name": "mine"}
    data = steps_dataset(world, [(X, Y)])

    def fitted(model):
        model.fit(data, epochs=2, verbose=0)
        return model

    with world.scope():
        inputs = tf.keras.Input([None, oracle.FEATURES])
        outputs = tf.keras.layers.Dense(oracle.CLASSES)(inputs)
        model = tf.keras.Model(inputs, outputs)
        model.set_weights(oracle.weights())
        momentum = 0.9 if suffix == ".keras" else 0.0  # the folder of Keras 2 loses it, with any loss
        optimizer = fit_optimizer(world, tf.keras.optimizers.SGD(0.5, momentum=momentum))
        model.compile(loss=distpad.DistributedLoss(inner_loss(kind), **options), optimizer=optimizer, run_eagerly=True)
    path = str(tmp_path / f"model{suffix}")
    fitted(model).save(path)
    # Horovod's optimiser in Keras 2 is a class of no module, of the name of the optimiser that it extends
    custom = {"SGD": type(model.optimizer)} if KERAS < 3 and world.kind in ("horovod", "mpirun") else None
    with world.scope():
        loaded = tf.keras.models.load_model(path, custom_objects=custom)
        if suffix != ".keras" and custom:
            loaded.compile(loss=loaded.loss, optimizer=fit_optimizer(world, loaded.optimizer), run_eagerly=True)
    assert isinstance(loaded.loss, distpad.DistributedLoss)
    config = loaded.loss.get_config()
    assert config == model.loss.get_config() and config.items() >= options.items()
    assert (loaded.loss.loss is brier) == (kind == "callable")
    assert loaded.evaluate(data, verbose=0) == model.evaluate(data, verbose=0)
    fitted(model), fitted(loaded)
    start = oracle.weights()
    for found, wanted, before in zip(loaded.get_weights(), model.get_weights(), start):
        assert oracle.relative_error(found - before, wanted - before) <= 1e-6
