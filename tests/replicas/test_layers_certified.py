"""certify and fit on models with the layers of distpad: as one device, with training=True."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
from distpad import backends
from keras_world import fit_optimizer
from replica_world import alone

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")


@pytest.mark.wide
def test_certify_with_batch_normalization(world):
    """No layer is noted, so that the certificate is of a training step; Keras's own layer is noted."""
    with world.scope():
        inputs = tf.keras.Input([None, 3])
        hidden = tf.keras.layers.Dense(4, use_bias=False)(
            tf.keras.layers.Masking(0.0)(inputs)
        )  # a bias would cancel out
        hidden = distpad.layers.BatchNormalization(dtype="float32")(hidden)
        model = tf.keras.Model(inputs, tf.keras.layers.Dense(2)(hidden))
    random = np.random.default_rng(0)
    lengths = random.integers(1, 6, 8)
    x = random.normal(size=[8, 5, 3]).astype("float32") * (np.arange(5) < lengths[:, None])[..., None].astype("float32")
    batch = {"x": x, "y": random.normal(size=[8, 5, 2]).astype("float32"), "lengths": lengths.astype("int32")}
    certificate = distpad.certify(
        model, distpad.DistributedLoss("mse", backend=world.backend), batch=batch, cases=4, backend=world.backend
    )
    assert certificate.passed, str(certificate)
    assert not any("rows depend on each other" in note or "training=False" in note for note in certificate.notes)
    assert any("accumulation is not compared" in note for note in certificate.notes)
    assert certificate.max_relative_error < 1e-5


@pytest.mark.wide
@pytest.mark.parametrize("indexed", [True, False])
def test_certify_with_dropout(world, indexed):
    """Keyed by example, dropout is no different on several replicas; keyed by row, the certificate says so."""
    with world.scope():
        inputs = x, indices = tf.keras.Input([None, 3]), tf.keras.Input([], dtype="int64")
        keys = {"indices": indices} if indexed else {}
        hidden = distpad.layers.Dropout(0.5, seed=5)(tf.keras.layers.Dense(4)(x), **keys)
        hidden = distpad.layers.SpatialDropout1D(0.5, seed=6)(hidden, **keys)
        model = tf.keras.Model(inputs, tf.keras.layers.Dense(2)(hidden))
    random = np.random.default_rng(0)
    features = random.normal(size=[8, 5, 3]).astype("float32"), np.arange(8)
    batch = {"x": features, "y": random.normal(size=[8, 5, 2]).astype("float32"), "lengths": random.integers(1, 6, 8)}
    certificate = distpad.certify(
        model, distpad.DistributedLoss("mse", backend=world.backend), batch=batch, cases=4, backend=world.backend
    )
    assert certificate.passed == (indexed or world.num_replicas == 1), str(certificate)
    assert not any("training=False" in note for note in certificate.notes)
    assert any("accumulation is not compared" in note for note in certificate.notes)
    assert all(backends.tensorflow_variable(v, "test").numpy() == 0 for v in model.non_trainable_variables)


TIME = 4
RATE = 0.2


def data_of(count):
    random = np.random.default_rng(3)
    return [
        {"x": random.normal(1, 2, [n, 3]).astype("float32"), "y": random.normal(size=[n, 2]).astype("float32")}
        for n in random.integers(1, TIME + 1, count)
    ]


def layers_of():
    """Inputs and outputs of a model with batch normalisation and dropout."""
    dense = lambda units, seed, **options: tf.keras.layers.Dense(
        units, kernel_initializer=tf.keras.initializers.GlorotUniform(seed), **options
    )
    inputs = x, lengths, indices = (
        tf.keras.Input([None, 3]),
        tf.keras.Input([], dtype="int32"),
        tf.keras.Input([], dtype="int64"),
    )
    hidden = distpad.layers.BatchNormalization(momentum=0.5)(dense(4, 1, activation="tanh")(x), lengths=lengths)
    hidden = distpad.layers.Dropout(0.5, seed=5)(hidden, indices=indices)
    return inputs, dense(2, 2)(hidden)


def trained(world, batches, steps):
    """The weights after an epoch of fit."""
    with world.scope():
        inputs, outputs = layers_of()
        model = tf.keras.Model(inputs, outputs)
        optimizer = fit_optimizer(world, tf.keras.optimizers.SGD(RATE))
        model.compile(optimizer, distpad.DistributedLoss("mse"))
    names = ("x", distpad.Lengths("x"), distpad.Indices())
    repeat = world.kind == "multiworker"
    data = batches.for_keras(x=names, y="y", repeat=repeat)
    with world.scope():
        model.fit(data, verbose=0, **({"steps_per_epoch": steps} if repeat else {}))
    return model.get_weights()


@alone
def of_one_device(results, data, plan):
    """The weights after the same steps, each with all its examples in one batch."""
    model = tf.keras.Model(*layers_of())
    optimizer, loss_fn = tf.keras.optimizers.SGD(RATE), distpad.DistributedLoss("mse")
    for step in plan:
        x, y = (distpad.pad([data[i][name] for i in step]) for name in ("x", "y"))
        with tf.GradientTape() as tape:
            outputs = model((x.values, x.lengths, step), training=True)
            loss = loss_fn(y.values, outputs, lengths=y.lengths)
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, [*map(held, variables)]), variables))
    results += model.get_weights()


def held(variable):
    return variable if isinstance(variable, tf.Variable) else variable.value


@pytest.mark.worlds("mirrored:2", "horovod:2")
def test_fit_with_batch_normalization_and_dropout(world):
    """The weights after an epoch, whose last step is uneven, are those of one device."""
    assert world.num_replicas == world.backend.num_replicas
    data = data_of(19)
    sampler = distpad.LengthSampler([len(each["x"]) for each in data], global_batch_size=8, seed=1)
    padding = {"x": distpad.Pad(), "y": distpad.Pad()}
    make = lambda backend: distpad.PaddedBatches(
        (data, sampler), padding=padding, tokens="y", buckets=None, backend=backend
    )
    found = trained(world, make(world.backend), 3)
    wanted: list = []
    of_one_device(results=wanted, data=data, plan=sampler.plan(0))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-6)
