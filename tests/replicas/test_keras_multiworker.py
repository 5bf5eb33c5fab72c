"""fit of Keras 3 under MultiWorkerMirroredStrategy: what fails there with Keras alone, step by step (keras#20585).

When one of these fails, Keras has mended it: README.md and keras_world.py then say too much."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from keras_world import KERAS, around_model, model_class, needs_help, steps_dataset

X = np.arange(16, dtype="float32").reshape(8, 2)


@pytest.fixture(autouse=True)
def _concerned(world):
    if world.kind != "multiworker":
        pytest.skip("MultiWorkerMirroredStrategy's matter")


def fit(world, scope, kind):
    with world.scope():
        inputs = tf.keras.Input([2])
        outputs = tf.keras.layers.Dense(1, kernel_initializer="ones")(inputs)
    with scope:
        model = kind(inputs, outputs)
    with world.scope():
        model.compile(loss="mse", optimizer=tf.keras.optimizers.SGD(0.001))
        data = steps_dataset(world, [(X, X.sum(1) + 1)])
        history = model.fit(data, epochs=2, verbose=0).history["loss"]
        return history, model.evaluate(data, verbose=0)


@pytest.mark.skipif(KERAS < 3, reason="works in Keras 2")
def test_a_model_made_in_the_scope_fails_at_its_first_batch(world):
    with pytest.raises(ValueError, match="PerReplica"):
        fit(world, world.scope(), tf.keras.Model)


@pytest.mark.skipif(KERAS < 3, reason="works in Keras 2")
def test_scalars_of_a_step_cannot_be_reduced(world):
    assert needs_help(world)
    with pytest.raises(ValueError, match="reduction dimension 0"):
        fit(world, around_model(world), tf.keras.Model)


def test_the_way_that_works(world):
    history, later = fit(world, around_model(world), model_class(world))
    assert history[0] == pytest.approx(1.0, rel=1e-6) and later < history[1] < history[0]
