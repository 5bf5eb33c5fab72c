"""BatchNormalization: outputs, gradients and moving averages are those of one device with the valid positions alone."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
from replica_world import alone, collectives_of

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

TIME, CHANNELS, EPSILON, MOMENTUM = 6, 3, 1e-3, 0.9
GAMMA, BETA = np.array([0.5, 2.0, -1.5]), np.array([0.1, -0.3, 7.0])


def data_of(replica, dtype="float64", garbage=np.nan, empty=None):
    """Rows of a replica: other numbers of them, far from 0, and garbage at invalid positions. One replica has none."""
    random = np.random.default_rng(replica)
    rows = 2 + replica % 2
    lengths = random.integers(0 if replica else 1, TIME + 1, rows)
    if empty == "all" or (empty == "one" and replica == 0):
        lengths[:] = 0
    x = 5 + 2 * random.normal(size=[rows, TIME, CHANNELS])
    x[np.arange(TIME) >= lengths[:, np.newaxis]] = garbage
    return {"x": x.astype(dtype), "lengths": lengths.astype("int32")}


def layer_in(world, dtype="float64", **options):
    with world.scope():
        layer = distpad.layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON, dtype=dtype, **options)
        layer.build((None, TIME, CHANNELS))
    layer.set_weights([GAMMA, BETA, np.arange(CHANNELS), np.arange(1, 1 + CHANNELS)])
    return layer


def weights(shape, dtype):
    """Different for all positions, and of other sums in each row."""
    return tf.reshape(tf.cast(tf.range(tf.reduce_prod(shape)) % 7, dtype), shape) / 3


def step_of(world, layer, **call):
    """A step that differentiates a function of the outputs, invalid ones too, as the engine's training does."""
    scale = world.num_replicas if world.backend.gradient_reduction == "mean" else 1

    def step(given):
        x = given["x"]
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = layer(x, training=True, **(call or {"lengths": given["lengths"]}))
            loss = scale * tf.reduce_sum(tf.cast(weights(tf.shape(y), y.dtype) * tf.sin(y), tf.float64))
        gradients = distpad.gradient(tape, loss, [layer.gamma, layer.beta], backend=world.backend)
        return y, tape.gradient(loss, x) / scale, world.reduce(gradients)

    return step


def of_one_device(every):
    """Outputs, gradients by x, gamma and beta, and moving averages, from the valid positions of all replicas."""
    valid = [np.arange(TIME) < given["lengths"][:, np.newaxis] for given in every]
    x = tf.constant(np.concatenate([given["x"][mask] for given, mask in zip(every, valid)]), tf.float64)
    factors = [weights(given["x"].shape, tf.float64).numpy() for given in every]
    w = np.concatenate([factor[mask] for factor, mask in zip(factors, valid)])
    gamma, beta = tf.constant(GAMMA), tf.constant(BETA)
    with tf.GradientTape() as tape:
        tape.watch([x, gamma, beta])
        mean = tf.reduce_sum(x, 0) / len(x)
        variance = tf.reduce_sum((x - mean) ** 2, 0) / len(x)
        y = gamma * (x - mean) / tf.sqrt(variance + EPSILON) + beta
        loss = tf.reduce_sum(w * tf.sin(y))
    d_x, *gradients = tape.gradient(loss, [x, gamma, beta])
    moved = [MOMENTUM * old + (1 - MOMENTUM) * new for old, new in ((np.arange(3), mean), (np.arange(1, 4), variance))]

    def by_replica(flat):
        parts = np.split(flat.numpy(), np.cumsum([mask.sum() for mask in valid])[:-1])
        whole = [np.zeros(given["x"].shape) for given in every]
        for full, mask, part in zip(whole, valid, parts):
            full[mask] = part
        return whole

    return by_replica(y), by_replica(d_x), gradients, moved


def error(found, expected):
    return np.max(np.abs(np.asarray(found, np.float64) - expected)) / np.max(np.abs(expected))


def check(world, layer, results, every, limit):
    outputs, d_xs, gradients, moved = of_one_device(every)
    for replica, (y, d_x, own) in results.items():
        assert np.isfinite(y).all() and np.isfinite(d_x).all()
        mask = np.arange(TIME) < every[replica]["lengths"][:, np.newaxis]
        assert not np.any(y[~mask]) and not np.any(d_x[~mask])
        if mask.any():
            assert error(y, outputs[replica]) < limit and error(d_x, d_xs[replica]) < limit
        assert all(error(*pair) < limit for pair in zip(own, gradients))
    for moving, expected in zip((layer.moving_mean, layer.moving_variance), moved):
        of_replicas = [tf.convert_to_tensor(each) for each in world.backend.local_results(held(moving))]
        assert len(of_replicas) == world.backend.replicas_here
        assert all(np.array_equal(of_replicas[0], other) for other in of_replicas)
        assert error(of_replicas[0], expected) < limit


def held(variable):
    return variable if isinstance(variable, tf.Variable) else variable.value


@pytest.mark.parametrize(
    ("graph", "dtype", "limit", "empty"),
    [
        (True, "float64", 1e-10, None),
        (True, "float32", 1e-5, "one"),
        pytest.param(False, "float64", 1e-10, "one", marks=pytest.mark.worlds("mirrored:2", "horovod:2")),
        pytest.param(False, "float32", 1e-5, None, marks=pytest.mark.wide),
        pytest.param(True, "float64", 1e-10, "one", marks=pytest.mark.wide),
    ],
)
def test_a_training_step_is_that_of_one_device(world, graph, dtype, limit, empty):
    if empty and world.num_replicas == 1:
        pytest.skip("one replica is never the empty one of several")
    every = [data_of(r, dtype, empty=empty) for r in range(world.num_replicas)]
    layer = layer_in(world, dtype)
    results = world.run(step_of(world, layer), every.__getitem__, graph=graph)
    check(world, layer, results, every, limit)


@pytest.mark.worlds("mirrored:2", "horovod:2")
def test_what_stands_at_invalid_positions_changes_no_bit(world):
    found = []
    for garbage in (0.0, np.nan, 1e30):
        every = [data_of(r, "float32", garbage) for r in range(world.num_replicas)]
        layer = layer_in(world, "float32")
        found.append((world.run(step_of(world, layer), every.__getitem__, graph=False), layer.get_weights()))
    for other in found[1:]:
        tf.nest.map_structure(np.testing.assert_array_equal, other, found[0])


def test_without_valid_positions_the_output_is_beta_and_averages_stay(world):
    every = [data_of(r, empty="all") for r in range(world.num_replicas)]
    layer = layer_in(world)
    for y, d_x, gradients in world.run(step_of(world, layer), every.__getitem__).values():
        np.testing.assert_array_equal(y, np.broadcast_to(BETA, y.shape))
        assert not any(np.any(gradient) for gradient in (d_x, *gradients))
    np.testing.assert_array_equal(layer.moving_mean, np.arange(CHANNELS))
    np.testing.assert_array_equal(layer.moving_variance, np.arange(1, 1 + CHANNELS))


@pytest.mark.parametrize(
    "dtype", ["mixed_float16", *(pytest.param(each, marks=pytest.mark.wide) for each in ("mixed_bfloat16", "float16"))]
)
@pytest.mark.worlds("mirrored:2", "horovod:2")
def test_moments_of_half_precision_are_of_float32(world, dtype):
    """300 squared overflows float16; a sum of float16 stands still at 2048. The values are exact in all dtypes."""
    values = (300 + 2 * np.random.default_rng(0).integers(-4, 5, [world.num_replicas, 64, TIME, CHANNELS])).astype(
        "float16"
    )
    layer = layer_in(world, dtype)
    step = lambda given: layer(given, training=True)
    results = world.run(step, values.__getitem__)
    flat = values.reshape(-1, CHANNELS).astype("float64")
    expected = GAMMA * (values - flat.mean(0)) / np.sqrt(flat.var(0) + EPSILON) + BETA
    digits = 2**-7 if "bfloat" in dtype else 2**-10
    for replica, y in results.items():
        assert y.dtype == layer.compute_dtype
        np.testing.assert_allclose(np.asarray(y, np.float64), expected[replica], rtol=2 * digits, atol=3 * digits)
    np.testing.assert_allclose(
        layer.get_weights()[2], 0.9 * np.arange(3) + 0.1 * flat.mean(0), rtol=1e-3 if dtype == "float16" else 1e-6
    )


def test_one_all_reduce_in_each_direction(world):
    forward = lambda given: layer(given["x"], training=True, lengths=given["lengths"])
    layer, several = layer_in(world), world.num_replicas > 1
    assert len(collectives_of(world, forward, data_of)) == several * world.backend.replicas_here

    def both(given):
        with tf.GradientTape() as tape:
            tape.watch(given["x"])
            y = forward(given)
        return tape.gradient(y, given["x"])

    assert len(collectives_of(world, both, data_of)) == 2 * several * world.backend.replicas_here


@pytest.mark.worlds("mirrored:2", "horovod:2")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"lengths": [TIME + 1, 1, 1]}, "lengths hold a value above the size of axis 1"),
        ({"lengths": [-1, 1, 1]}, "lengths hold a value below 0"),
        ({"mask": np.ones([3, TIME - 1], bool)}, "mask has shape"),
        ({"mask": np.ones([3, TIME])}, "mask is of shape .* and dtype float64, expected bool"),
        ({"lengths": [0.5, 1, 1]}, "lengths have dtype"),
    ],
)
def test_an_error_on_one_replica_reaches_all(world, call, message):
    layer = layer_in(world)
    x = np.ones([3, TIME, CHANNELS])

    def step(replica):
        wrong = int(tf.get_static_value(replica)) == world.num_replicas - 1
        return layer(x, training=True, **(call if wrong else {"lengths": [1, 1, 1]}))

    with pytest.raises((ValueError, TypeError), match=message):
        world.run(step, lambda r: np.int32(r), graph=False)


# -- one device -------------------------------------------------------------------------------------------------------


@pytest.mark.worlds("mirrored:2")
@pytest.mark.parametrize(
    ("shape", "axis"), [([4, 5, 3], -1), ([4, 3, 5], 1), ([4, 5, 6, 3], -1), ([8, 3], -1), ([4, 3, 5, 6], 1)]
)
@alone
def test_without_a_mask_it_is_keras_layer(shape, axis):
    """The same outputs, gradients and moving averages; in inference too; and weights that load into one another."""
    x = tf.constant(np.random.default_rng(0).normal(3, 2, shape))
    results = []
    for kind in (tf.keras.layers.BatchNormalization, distpad.layers.BatchNormalization):
        layer = kind(axis=axis, momentum=0.7, dtype="float64")
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(tf.sin(y))
        results.append(
            [y, *tape.gradient(loss, [x, *map(held, layer.trainable_weights)]), *layer.get_weights(), layer(x)]
        )
    for found, expected in zip(*results):
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=2e-7)  # Keras 2 rounds 1 - momentum to float32


@pytest.mark.worlds("mirrored:2")
@alone
def test_a_keras_mask_and_saving(tmp_path):
    def model_of(kind):
        inputs = tf.keras.Input([None, 2])
        hidden = tf.keras.layers.Masking(-1.0)(inputs)
        return tf.keras.Model(inputs, kind(momentum=0.5, scale=False, name="norm")(hidden))

    x = np.array([[[1.0, 2.0], [3.0, 6.0], [-1.0, -1.0]]], np.float32)
    model = model_of(distpad.layers.BatchNormalization)
    np.testing.assert_allclose(model(x, training=True), [[[-1, -1], [1, 1], [0, 0]]], atol=2e-3)
    np.testing.assert_allclose(model.get_weights()[1:], [[1.0, 2.0], [1.0, 2.5]])
    model.save(tmp_path / "model.keras")
    loaded = tf.keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.get_layer("norm"), distpad.layers.BatchNormalization)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    model.save_weights(tmp_path / "model.weights.h5")
    theirs = model_of(tf.keras.layers.BatchNormalization)
    theirs.load_weights(tmp_path / "model.weights.h5")
    for own, other in zip(model.get_weights(), theirs.get_weights()):
        np.testing.assert_array_equal(own, other)


@pytest.mark.worlds("mirrored:2")
@alone
def test_frozen_and_refused():
    layer = distpad.layers.BatchNormalization()
    layer.build((None, 2))
    layer.trainable = False
    np.testing.assert_allclose(layer(np.full([3, 2], 7.0, np.float32), training=True), 7 / np.sqrt(1.001), rtol=1e-6)
    with pytest.raises(ValueError, match="renorm is True"):
        distpad.layers.BatchNormalization(renorm=True)
    with pytest.raises(ValueError, match="lengths is given for inputs of rank 2"):
        distpad.layers.BatchNormalization()(np.ones([2, 2], np.float32), lengths=[1, 1])
    with pytest.raises(ValueError, match="lengths"):  # in inference too
        distpad.layers.BatchNormalization()(np.ones([2, 2, 2], np.float32), lengths=[3, 1])
