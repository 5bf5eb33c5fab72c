"""fit of Keras 3 under MultiWorkerMirroredStrategy: what fails there with Keras alone (keras#20585), and what distpad
makes of it. When one of the failures is gone, Keras has mended it: distpad/backends/keras_fit.py then does too much."""

from __future__ import annotations

import contextlib
import sys

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle
from keras_world import KERAS, steps_dataset

WORLDS = ("multiworker:2",)
RANDOM = np.random.default_rng(4)
X, Y = RANDOM.normal(size=[2, 8, 3, 2]).astype("float32"), RANDOM.normal(size=[2, 8, 3, 1]).astype("float32")
WEIGHTS = np.where(np.arange(3) < RANDOM.integers(0, 4, [2, 8, 1]), 1.0, 0.0).astype("float32")
RATE = 0.1


@pytest.fixture(autouse=True)
def _concerned(world):
    if world.kind != "multiworker" or KERAS < 3:
        pytest.skip("MultiWorkerMirroredStrategy's matter, and Keras 3's")


def functional():
    inputs = tf.keras.Input([3, 2])
    return tf.keras.Model(inputs, tf.keras.layers.Dense(1)(inputs))


class Subclassed(tf.keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = tf.keras.layers.Dense(1)

    def call(self, inputs):
        return self.dense(inputs)


def loaded(folder):
    functional().save(folder / "model.keras")
    return tf.keras.models.load_model(folder / "model.keras")


KINDS = {
    "functional": lambda _: functional(),
    "sequential": lambda _: tf.keras.Sequential([tf.keras.layers.Dense(1)]),  # unbuilt, as a subclassed model
    "subclassed": lambda _: Subclassed(),
    "cloned": lambda _: tf.keras.models.clone_model(functional()),
    "loaded": loaded,
}


def compiled(model, **options):
    model.compile(
        loss=distpad.DistributedLoss("mse"),
        optimizer=tf.keras.optimizers.SGD(RATE, momentum=0.5),
        weighted_metrics=[tf.keras.metrics.MeanSquaredError(name="mse"), distpad.metrics.MaskedMean(name="mean")],
        **options,
    )
    return model


def one_device(kernel, bias, epochs):
    """Train y = kernel x + bias with momentum, in float64; return the weights and each epoch's mean of step losses."""
    speed, history = [0, 0], []
    for _ in range(epochs):
        losses = []
        for x, y, w in zip(X.astype(np.float64), Y, WEIGHTS):
            error = (x @ kernel + bias - y) * w[..., None]
            losses.append((error**2).sum() / w.sum())
            gradients = [np.einsum("blf,blo->fo", x, error), error.sum((0, 1))]
            speed = [0.5 * v - RATE * 2 * g / w.sum() for v, g in zip(speed, gradients)]
            kernel, bias = kernel + speed[0], bias + speed[1]
        history.append(np.mean(losses))
    return [kernel, bias], history


def evaluated(kernel, bias):
    """Return the mean of the steps' means, which is the loss, and the mean over all positions, Keras's metric."""
    sums = [(((x @ kernel + bias - y) ** 2)[..., 0] * w).sum() for x, y, w in zip(X.astype(np.float64), Y, WEIGHTS)]
    return np.mean(sums / WEIGHTS.sum((1, 2))), np.sum(sums) / WEIGHTS.sum()


def equal_on_all_workers(world, values):
    """The bytes are compared: a callback that decides by a value must decide alike on all workers."""
    mine = np.array(values, np.float64)
    for theirs in world.backend.host_all_gather(mine):
        np.testing.assert_array_equal(theirs, mine)


@pytest.mark.parametrize("kind", ["functional", *[pytest.param(k, marks=pytest.mark.wide) for k in [*KINDS][1:]]])
def test_any_model_trains_as_on_one_device(world, kind, tmp_path):
    """fit, evaluate and predict are called outside the scope; a callback on each worker ends fit after two epochs.

    Each worker draws initial weights, of which those of the first count."""
    with world.scope():
        model = compiled(KINDS[kind](tmp_path))
    start, data = [], steps_dataset(world, list(zip(X, Y, WEIGHTS)))
    callbacks = [
        tf.keras.callbacks.LambdaCallback(on_train_begin=lambda _: start.extend(model.get_weights())),
        tf.keras.callbacks.EarlyStopping("val_mean", mode="max", min_delta=100.0),
    ]
    history = model.fit(data, epochs=9, validation_data=data, verbose=0, callbacks=callbacks).history
    weights, losses = one_device(*start, epochs=2)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-5)
    for found, wanted, before in zip(model.get_weights(), weights, start):
        assert oracle.relative_error(found - before, wanted - before) <= 1e-5
    later = model.evaluate(data, verbose=0, return_dict=True)
    np.testing.assert_allclose([later["loss"], later["mse"]], evaluated(*weights), rtol=1e-5)
    np.testing.assert_allclose([history[f"val_{name}"][-1] for name in later], [*later.values()], rtol=1e-6)
    equal_on_all_workers(world, [*later.values(), *np.concatenate([*history.values(), *map(np.ravel, start)])])
    found = model.predict(X[0, :7], batch_size=4, verbose=0)  # the second step has one row for one of the workers
    np.testing.assert_allclose(found, X[0, :7] @ weights[0] + weights[1], rtol=1e-4, atol=1e-5)


def test_what_a_train_step_returns_is_averaged(world):
    class Own(tf.keras.Model):
        def train_step(self, data):
            place = tf.distribute.get_replica_context().replica_id_in_sync_group
            return {"place": place, "vector": tf.cast([place, 3], tf.float32), "double": tf.constant(7.0, tf.float64)}

    inputs = tf.keras.Input([3, 2])
    with world.scope():
        model = compiled(Own(inputs, tf.keras.layers.Dense(1)(inputs)))
    seen = []
    see = tf.keras.callbacks.LambdaCallback(on_train_batch_end=lambda _, logs: seen.append(logs))
    model.fit(steps_dataset(world, list(zip(X, Y))), verbose=0, callbacks=[see])
    assert len(seen) == 2
    for logs in seen:
        assert (int(logs["place"]), float(logs["double"])) == (0, 7.0)
        np.testing.assert_array_equal(logs["vector"], [0.5, 3.0])


def test_several_steps_at_once_are_refused(world):
    with world.scope():
        model = compiled(functional(), steps_per_execution=2)
    for call in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=r"fit: steps_per_execution is 2, expected 1 with several replicas.*Write"):
            call(X[0], Y[0], verbose=0)


def test_variables_of_one_worker_alone_are_refused(world):
    """A call outside the scope builds the model there."""
    with world.scope():
        model = compiled(Subclassed())
    model(X[0])
    for scope in (contextlib.nullcontext(), world.scope()):
        with scope, pytest.raises(ValueError, match=r"fit: the model has 2 variables, such as .*kernel, made outside"):
            model.fit(X[0], Y[0], verbose=0)


def test_keras_alone_fails(world, monkeypatch):
    """Where this test fails, Keras has mended its fit: remove distpad/backends/keras_fit.py."""
    trainer = next(each for each in tf.keras.Model.__mro__ if "_maybe_symbolic_build" in vars(each))
    module = sys.modules[trainer.__module__]
    with world.scope():
        model = functional()
        model.compile(loss="mse", optimizer="sgd", run_eagerly=True)
    for owner, name, error in [
        (trainer, "_maybe_symbolic_build", "PerReplica"),
        (module, "reduce_per_replica", "reduction dimension 0"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, getattr(owner, name).__wrapped__)
            with pytest.raises(ValueError, match=error):
                model.fit(steps_dataset(world, [(X[0], Y[0])]), verbose=0)
