"""Dropout: what is dropped of an example depends on seed, step, example and position, not on the replicas."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
from distpad.layers.dropout import random_bits
from replica_world import alone

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

TIME, CHANNELS, RATE = 5, 4, 0.4
ROWS = 6  # over all replicas
INDICES = np.array([7, 2, 2**40 + 1, 5, -1, 0])


def bits_of(seed, step, index, shape, shared=()):
    """One example's numbers, in Python's integers."""

    def mixed(x):
        x = (x + 0x9E3779B9) & 0xFFFFFFFF
        x = ((x ^ x >> 16) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ x >> 15) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ x >> 16

    key = 0
    for number in (seed, step, index):
        for part in (number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF):
            key = mixed(key ^ part)
    found = np.zeros(shape, np.int64)
    for position in np.ndindex(*shape):
        at = key
        for axis, number in enumerate(position, 1):
            at = mixed(at ^ (0 if axis in shared else number))
        found[position] = at
    return found


def layer_in(world, kind=None, **options):
    with world.scope():
        layer = (kind or distpad.layers.Dropout)(RATE, seed=11, **options)
        layer.build((None, TIME, CHANNELS))
    return layer


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    ("kind", "shared"),
    [("Dropout", ()), pytest.param("SpatialDropout1D", (1,), marks=pytest.mark.worlds("mirrored:2"))],
)
def test_an_example_is_dropped_alike_on_any_number_of_replicas(world, graph, kind, shared):
    """Replicas have other numbers of rows, and each step drops others."""
    layer = layer_in(world, getattr(distpad.layers, kind))
    parts = np.array_split(np.arange(ROWS), world.num_replicas)
    x = np.random.default_rng(0).normal(size=[ROWS, TIME, CHANNELS]).astype("float32")
    step = lambda given: layer(given["x"], training=True, indices=given["indices"])
    for number in range(3):
        results = world.run(step, lambda r: {"x": x[parts[r]], "indices": INDICES[parts[r]]}, graph=graph)
        for replica, y in results.items():
            kept = np.array(
                [bits_of(11, number, int(INDICES[i]), [TIME, CHANNELS], shared) >= RATE * 2**32 for i in parts[replica]]
            )
            np.testing.assert_allclose(y, np.where(kept, x[parts[replica]] / (1 - RATE), 0), rtol=1e-6)
    assert all(int(step) == 3 for step in layer.get_weights())


@pytest.mark.worlds("mirrored:2")
@alone
def test_numbers_are_uniform_and_independent():
    """Of many rows, steps and positions: frequencies, and correlations of neighbours, within 5 standard errors."""
    like = tf.zeros([64, 64, 16])
    unit = np.array([random_bits(1, step, tf.range(64), like).numpy() / 2**32 for step in range(8)])
    deviation = 1 / np.sqrt(unit.size)
    assert abs(unit.mean() - 0.5) < 5 * deviation / np.sqrt(12)
    frequencies, _ = np.histogram(unit, 16, (0, 1))
    assert np.sum((frequencies - unit.size / 16) ** 2) / (unit.size / 16) < 15 + 5 * np.sqrt(30)
    for axis in range(4):
        one, other = np.moveaxis(unit, axis, 0)[:-1], np.moveaxis(unit, axis, 0)[1:]
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(one.size)


@pytest.mark.worlds("mirrored:2")
@alone
def test_saved_models_continue_where_they_stopped(tmp_path):
    def model_of():
        inputs, ids = tf.keras.Input([8]), tf.keras.Input([], dtype="int64")
        return tf.keras.Model([inputs, ids], distpad.layers.Dropout(RATE, name="drop")(inputs, indices=ids))

    model, batch = model_of(), [np.ones([3, 8], np.float32), np.array([4, 9, 1])]
    steps = [model(batch, training=True).numpy() for _ in range(2)]
    assert not np.array_equal(*steps)
    model.save(tmp_path / "model.keras")
    loaded = tf.keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(batch, training=True), model(batch, training=True))
    np.testing.assert_array_equal(loaded.predict(batch, verbose=0), batch[0])


@pytest.mark.worlds("mirrored:2")
@alone
def test_a_drop_in_and_its_errors():
    x = tf.ones([2, 3])
    layer = distpad.layers.Dropout(0.5, seed=0)
    assert layer(x) is not None and np.array_equal(layer(x), x) and not np.array_equal(layer(x, training=True), x)
    half = distpad.layers.Dropout(0.5, seed=0, dtype="mixed_float16")(x, training=True)
    assert half.dtype == tf.float16 and set(np.unique(half)) <= {0.0, 2.0}
    np.testing.assert_array_equal(distpad.layers.Dropout(0.0)(x, training=True), x)
    assert not np.any(distpad.layers.Dropout(1 - 1e-13)(x, training=True))  # not rounded to a number above 32 bits
    for rate, kind in ((1.0, ValueError), (-0.1, ValueError), ("a", TypeError)):
        with pytest.raises(kind, match="rate is"):
            distpad.layers.Dropout(rate)
    with pytest.raises(ValueError, match="indices is of shape"):
        layer(x, training=True, indices=[[1], [2]])
    with pytest.raises(ValueError, match="indices is of 3 rows, expected the 2"):
        layer(x, training=True, indices=[1, 2, 3])
