"""Keras's fit, evaluate and predict on for_keras where labels are one a row: filler rows count nowhere."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import test_for_keras as feeding
from test_for_keras import collected  # noqa: F401 (what fit leaves is collected here too)

import distpad
import oracle
from keras_world import fit_optimizer

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")
RATE = 0.5


def texts(count=13):
    random = np.random.default_rng(4)
    lengths = random.integers(1, 6, count)
    return [
        {"x": random.normal(size=[n, oracle.FEATURES]).astype(np.float32), "label": np.int64(i % oracle.CLASSES)}
        for i, n in enumerate(lengths)
    ]


def classifier(world):
    """The sum of a text's features, which no padding changes, and a linear layer."""
    with world.scope():
        inputs = tf.keras.Input([None, oracle.FEATURES])
        dense = tf.keras.layers.Dense(oracle.CLASSES)
        outputs = dense(tf.keras.layers.Lambda(lambda x: tf.reduce_sum(x, axis=1))(inputs))
        model = tf.keras.Model(inputs, outputs)
        dense.set_weights(oracle.weights())
        entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        loss = distpad.DistributedLoss(lambda t, p: entropy(t, p)[:, tf.newaxis])
        model.compile(loss=loss, optimizer=fit_optimizer(world, tf.keras.optimizers.SGD(RATE)))
    return model


def batches_of(world, data, size, **options):
    sampler = distpad.LengthSampler([len(e["x"]) for e in data], global_batch_size=size, seed=2, **options)
    padding = {"x": distpad.Pad(value=0.0)}
    return sampler, distpad.PaddedBatches((data, sampler), padding=padding, tokens="x", backend=world.backend)


def logits_of(data, kernel, bias):
    return np.stack([e["x"].astype(np.float64).sum(axis=0) @ kernel + bias for e in data])


def test_one_label_a_text_trains_as_one_device_does(world):
    """The last step has filler rows, with labels of real ones."""
    assert world.backend.num_replicas == world.num_replicas
    data = texts()
    sampler, batches = batches_of(world, data, 8)
    model, steps = classifier(world), len(sampler.plan(0))
    feeding.fit(world, model, feeding.fed_by(world, batches, steps, x="x", y="label"))
    kernel, bias = oracle.weights()
    for step in sampler.plan(0):
        rows = [{"x": data[i]["x"].sum(axis=0, keepdims=True), "y": [data[i]["label"]], "w": [1]} for i in step]
        _, d_kernel, d_bias = oracle.cross_entropy(rows, kernel, bias, "token", False)
        kernel, bias = kernel - RATE * d_kernel, bias - RATE * d_bias
    for found, wanted, start in zip(model.get_weights(), (kernel, bias), oracle.weights()):
        assert oracle.relative_error(found - start, wanted - start) <= 1e-5


def test_predict_gets_real_rows_alone_in_order(world):
    data = texts()
    sampler, batches = batches_of(world, data, 4, shuffle=False)
    if world.kind == "multiworker":
        with pytest.raises(ValueError, match=r"for_keras: y is None with 2 workers .* Let each worker predict"):
            batches.for_keras(x="x", y=None)
        return
    predicted = classifier(world).predict(batches.for_keras(x="x", y=None), verbose=0)
    shard = sampler.shard(world.backend.worker_index, world.backend.num_workers)
    mine = [i for step in shard for i in sorted(step) if i >= 0]
    assert mine == sorted(mine) and (world.backend.num_workers > 1 or len(mine) == len(data))
    wanted = logits_of([data[i] for i in mine], *oracle.weights())
    assert predicted.shape == wanted.shape and oracle.relative_error(predicted, wanted) <= 1e-5


def test_predict_of_what_holds_filler_rows_is_refused(world):
    if world.kind == "multiworker":
        pytest.skip("Keras's predict meets the other worker's in collectives of its own")
    _, batches = batches_of(world, texts(), 4)
    model, dataset = classifier(world), batches.for_keras(x="x", y="label")
    with pytest.raises(tf.errors.OpError, match=r"for_keras: y is given for predict, expected None.*y=None"):
        model.predict(dataset, verbose=0)
    with pytest.raises(tf.errors.OpError, match=r"for_keras: y is given for predict, expected None.*y=None"):
        model.predict(dataset.map(lambda x, y, weights: x), verbose=0)
    with world.scope():
        assert np.isfinite(model.evaluate(batches_of(world, texts(), 4)[1].for_keras(x="x", y="label"), verbose=0))
