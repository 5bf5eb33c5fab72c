"""DistributedOptimizer in fit: clipping, loss scaling and sparse gradients as on one device; and Keras without it."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle
from keras_world import KERAS, fit_optimizer, steps_dataset

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

ROWS, STEPS, RATE = 8, 3, 0.5
LIMITS = {"clipnorm": 0.05, "global_clipnorm": 0.07, "clipvalue": 0.02}  # below the norms of the gradients


def batches():
    """Return few valid positions in the first rows and many in the last, with gradients of other directions."""
    for step in range(STEPS):
        random = np.random.default_rng([17, step])
        yield [
            {
                "x": random.normal(size=[n, oracle.FEATURES]) + (3 if i < 4 else -3),
                "y": random.integers(0, oracle.CLASSES, n),
                "w": np.ones(n),
            }
            for i, n in enumerate([1, 0, 2, 1, 4, 5, 3, 5])
        ]


def fitted(world, optimizer, **compiled):
    """Return the trained layer's weights and the history; eager by default, in a third of the time."""
    steps = []
    for rows in batches():
        padded = oracle.padded(rows, "float32", beyond=0)
        steps.append((padded["x"], padded["y"]))
    with world.scope():
        inputs = tf.keras.Input([None, oracle.FEATURES])
        outputs = tf.keras.layers.Dense(oracle.CLASSES)(inputs)
        model = tf.keras.Model(inputs, outputs)
        model.set_weights(oracle.weights())
        entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        loss = distpad.DistributedLoss(entropy, padding_value=-99)
        model.compile(loss=loss, optimizer=optimizer(), **(compiled or {"run_eagerly": True}))
        history = model.fit(steps_dataset(world, steps), verbose=0, shuffle=False)
    return model.get_weights(), history.history["loss"][0]


def clipped(gradients, name):
    limit = LIMITS.get(name)
    if name == "clipvalue":
        return [np.clip(g, -limit, limit) for g in gradients]
    if name == "global_clipnorm":
        norms = [np.sqrt(sum((g**2).sum() for g in gradients))] * len(gradients)
    else:
        norms = [np.sqrt((g**2).sum()) for g in gradients]
    if name is None:
        return gradients
    assert all(norm > limit for norm in norms), "clipping does something"
    return [g * limit / norm for g, norm in zip(gradients, norms)]


def expected(clip):
    weights = list(oracle.weights())
    values = []
    for rows in batches():
        value, *gradients = oracle.cross_entropy(rows, *weights, "token", False)
        weights = [w - RATE * g for w, g in zip(weights, clipped(gradients, clip))]
        values.append(value)
    return weights, np.mean(values)


def error_of(found, wanted):
    return max(
        oracle.relative_error(f - start, w - start) for f, w, start in zip(found, wanted, oracle.weights(), strict=True)
    )


# -- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "eager"),
    [
        (None, True),
        *[pytest.param(clip, True, marks=pytest.mark.worlds("mirrored:2")) for clip in LIMITS],
        ("global_clipnorm", False),
    ],
)
def test_clips_the_global_gradient(world, clip, eager):
    limits = {clip: LIMITS[clip]} if clip else {}
    optimizer = lambda: distpad.DistributedOptimizer(tf.keras.optimizers.SGD(RATE, **limits))
    found, loss = fitted(world, optimizer, run_eagerly=eager)
    wanted, value = expected(clip)
    assert oracle.relative_error(loss, value) <= 1e-5
    assert error_of(found, wanted) <= 1e-5


@pytest.mark.parametrize(
    "clip", ["clipnorm", *[pytest.param(name, marks=pytest.mark.wide) for name in LIMITS if name != "clipnorm"]]
)
def test_keras_alone_clips_each_local_gradient(world, clip):
    """Keras 3 needs DistributedOptimizer, Keras 2 does not."""
    if world.strategy is None:
        pytest.skip("a strategy's matter")
    found, _ = fitted(world, lambda: tf.keras.optimizers.SGD(RATE, **{clip: LIMITS[clip]}))
    error = error_of(found, expected(clip)[0])
    assert error > 0.05 if KERAS >= 3 and world.num_replicas > 1 else error <= 1e-5


# -- loss scaling -----------------------------------------------------------------------------------------------------

SCALE = 2.0**15


def loss_scale_optimizer(optimizer):
    if KERAS >= 3:
        return tf.keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=SCALE)
    return tf.keras.mixed_precision.LossScaleOptimizer(optimizer, initial_scale=SCALE)


def fit_with_an_overflow(world, make, **compiled):
    """Train three steps of y = w·x; in the second, the scaled gradient of the last row overflows float32."""
    x = np.arange(STEPS * ROWS, dtype="float32").reshape([STEPS, ROWS, 1, 1])
    x[1, -1] = 1e35
    with world.scope():
        inputs = tf.keras.Input([1, 1])
        dense = tf.keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        outputs = dense(inputs)
        model = tf.keras.Model(inputs, outputs)
        optimizer = make(tf.keras.optimizers.SGD(0.01))
        model.compile(
            loss=distpad.DistributedLoss(lambda t, p: p[..., 0]), optimizer=optimizer, run_eagerly=True, **compiled
        )
        model.fit(steps_dataset(world, [(step, step[..., 0]) for step in x]), verbose=0, shuffle=False)
    return dense.get_weights()[0].item(), 1 - 0.01 * (x[0].mean() + x[2].mean()), optimizer


def test_an_overflow_on_one_replica_skips_the_step_on_all(world):
    off = {"auto_scale_loss": False} if KERAS >= 3 else {}
    found, wanted, optimizer = fit_with_an_overflow(
        world, lambda sgd: distpad.DistributedOptimizer(loss_scale_optimizer(sgd)), **off
    )
    assert found == pytest.approx(wanted, rel=1e-5)
    scaler = optimizer.inner_optimizer
    scale = scaler.dynamic_scale.numpy() if KERAS >= 3 else optimizer.loss_scale.numpy()
    assert scale == SCALE / 2


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_an_infinity_of_one_replica_is_seen_by_all(world, wrong):
    """Finite gradients, dense and sparse, equal those of one device after the engine's reduction."""

    def step(x):
        sparse = tf.IndexedSlices(tf.ones([1, 2]) * x[1], tf.cast(x[1:], tf.int64), tf.constant([9, 2], tf.int64))
        wrong, dense, sparse = world.backend.reduced_gradients([x[:1], x[1:], sparse])
        return wrong, *world.reduce([dense, tf.convert_to_tensor(sparse)])

    replicas = world.num_replicas
    given = lambda r: np.float32([wrong if r == replicas - 1 else 1.0, r + 1.0])
    scale = 1 if world.backend.gradient_reduction == "sum" else replicas
    table = np.zeros([9, 2])
    table[1 : replicas + 1] = np.arange(1, replicas + 1)[:, None] / scale
    for seen, dense, sparse in world.run(step, given, graph=False).values():
        assert not np.isfinite(seen).any()
        assert oracle.relative_error(dense, np.array([sum(range(replicas + 1)) / scale])) <= 1e-6
        assert oracle.relative_error(sparse, table) <= 1e-6


def test_keras_alone_misses_an_overflow_on_another_replica(world):
    if world.strategy is None:
        pytest.skip("a strategy's matter")
    if world.kind == "multiworker" and KERAS >= 3:
        pytest.skip("there the worker that overflowed skips the step alone, and the others wait for it in vain")
    found, wanted, _ = fit_with_an_overflow(world, loss_scale_optimizer)
    if KERAS >= 3 and world.num_replicas > 1:
        assert not np.isfinite(found)
    else:
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.skipif(KERAS < 3, reason="Keras 2 has it outside")
def test_loss_scaling_around_it_is_refused():
    with pytest.raises(
        ValueError, match=r"DistributedOptimizer: a LossScaleOptimizer is put around it.*auto_scale_loss"
    ):
        loss_scale_optimizer(distpad.DistributedOptimizer(tf.keras.optimizers.SGD()))
    inputs = tf.keras.Input([1])
    model = tf.keras.Model(inputs, tf.keras.layers.Dense(1)(inputs))
    model.dtype_policy = tf.keras.mixed_precision.Policy("mixed_float16")
    with pytest.raises(ValueError, match="a LossScaleOptimizer is put around it"):
        model.compile(loss="mse", optimizer=distpad.DistributedOptimizer(tf.keras.optimizers.SGD()))


# -- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(KERAS < 3, reason="Keras 2 has none")
def test_accumulation_is_refused(world):
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2, expected None.*GradientAccumulator"):
        distpad.DistributedOptimizer(tf.keras.optimizers.SGD(gradient_accumulation_steps=2))


@pytest.mark.skipif(KERAS < 3, reason="Keras 2 has none")
def test_keras_alone_cannot_accumulate_on_several_replicas(world):
    if world.strategy is None or world.num_replicas == 1:
        pytest.skip("several replicas of a strategy")
    with pytest.raises(RuntimeError, match="merge_call"):
        fitted(world, lambda: tf.keras.optimizers.SGD(RATE, gradient_accumulation_steps=3), run_eagerly=False)


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_sparse_gradients(world):
    """An embedding whose rows occur on several replicas."""
    ids = np.array([[1, 1], [2, 0], [1, 3], [3, 3], [0, 1], [4, 1], [1, 1], [2, 2]])
    table = np.random.default_rng(2).normal(size=[6, 1]).astype("float32")
    with world.scope():
        embedding = tf.keras.layers.Embedding(6, 1)
        inputs = tf.keras.Input([2], dtype="int64")
        outputs = embedding(inputs)
        model = tf.keras.Model(inputs, outputs)
        model.set_weights([table])
        loss = distpad.DistributedLoss(lambda t, p: p[..., 0] ** 2)
        model.compile(
            loss=loss, optimizer=distpad.DistributedOptimizer(tf.keras.optimizers.SGD(RATE)), run_eagerly=True
        )
        model.fit(steps_dataset(world, [(ids, ids)]), verbose=0)
    gradient = np.zeros_like(table, np.float64)
    np.add.at(gradient, ids.ravel(), 2 * table[ids.ravel()].astype(np.float64) / ids.size)
    assert oracle.relative_error(model.get_weights()[0] - table, -RATE * gradient) <= 1e-5


def test_wrong_arguments():
    for wrong in ("sgd", tf.keras.optimizers.SGD):
        with pytest.raises(TypeError, match=r"DistributedOptimizer: optimizer is .*, expected a Keras optimiser"):
            distpad.DistributedOptimizer(wrong)


@pytest.mark.skipif(KERAS < 3, reason="Keras 2 has its own")
def test_it_has_the_attributes_of_the_optimizer(world):
    with world.scope():
        schedule = distpad.DistributedOptimizer(
            tf.keras.optimizers.SGD(tf.keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.1))
        )
        made = distpad.DistributedOptimizer(tf.keras.optimizers.Adam(0.25, clipvalue=2.0), name="mine")
        variable = tf.Variable([1.0])
        made.build([variable])
    rate = lambda optimizer: np.asarray(tf.convert_to_tensor(optimizer.learning_rate)).item()
    assert rate(schedule) == 0.5 and rate(made) == 0.25
    made.learning_rate = 0.125
    assert rate(made.inner_optimizer) == 0.125
    assert len(made.variables) == len(made.inner_optimizer.variables) > 3
    again = distpad.DistributedOptimizer.from_config(made.get_config())
    assert again.get_config() == made.get_config() and again.inner_optimizer.clipvalue == 2.0
    with pytest.raises(TypeError, match="not distributed yet"):
        distpad.DistributedOptimizer(made)


# -- XLA --------------------------------------------------------------------------------------------------------------


@pytest.mark.worlds("mirrored:2")
@pytest.mark.skipif(KERAS < 3, reason="off by default in Keras 2")
def test_compilation_by_xla(world):
    """XLA works with one replica; with several, an error is raised."""
    make = lambda: fit_optimizer(world, tf.keras.optimizers.SGD(RATE))
    if world.num_replicas == 1:
        found, _ = fitted(world, make, jit_compile=True)
        assert error_of(found, expected(None)[0]) <= 1e-5
        return
    with pytest.raises((tf.errors.OpError, ValueError), match=r"XLA|compil|device CPU"):
        fitted(world, make, jit_compile=True)


@pytest.mark.skipif(KERAS < 3, reason="Horovod's own wrapper is right in Keras 2")
def test_horovods_own_wrapper_reduces_nothing_in_keras_3(world):
    if world.kind not in ("horovod", "mpirun"):
        pytest.skip("Horovod's matter")
    import horovod.tensorflow.keras as hvd

    with pytest.raises(ValueError, match=r"fit: the weights differ between the ranks .*each rank trains alone"):
        fitted(world, lambda: hvd.DistributedOptimizer(tf.keras.optimizers.SGD(RATE)))


@pytest.mark.worlds("horovod:2")
def test_sums_are_not_summed_again(world):
    """An average of averages changes nothing; a second sum would be as many times too large as there are ranks."""
    if world.kind not in ("horovod", "mpirun"):
        pytest.skip("Horovod's matter")
    backend, variable = distpad.backends.HorovodBackend(op="sum"), tf.Variable([1.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(variable)
    gradients = distpad.gradient(tape, loss, [variable], backend=backend)
    optimizer = distpad.DistributedOptimizer(tf.keras.optimizers.SGD(1.0), backend=backend)
    with pytest.raises(ValueError, match=r"gradients is already summed over the ranks"):
        optimizer.apply_gradients(zip(gradients, [variable]))
    tf.keras.optimizers.SGD(1.0).apply_gradients(zip(gradients, [variable]))
    assert variable.numpy() == 1 - world.num_replicas
