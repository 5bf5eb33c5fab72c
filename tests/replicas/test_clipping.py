"""clip_by_global_norm: the norm is that of the global gradient; an infinity on one replica reaches all."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle
from replica_world import alone, collectives_of

WORLDS = ("local", "mirrored:1", "mirrored:2", "multiworker:2", "horovod:2")

TABLE = np.random.default_rng(1).normal(size=[6, 3])
KERAS_3 = hasattr(tf.keras.optimizers, "LossScaleOptimizer")


def ids_of(replica):
    """Return indices that repeat within a replica and between replicas, more of them on some replicas."""
    return np.array([[replica % 6, 1, 1, 4][: 3 + replica % 2]])


@pytest.fixture
def step(world):
    """Make a step that clips gradients, and returns the norm and the gradients after the optimiser's reduction."""
    with world.scope():
        variables = [tf.Variable(TABLE), tf.Variable(np.ones([3])), tf.Variable([1.0])]
    loss_fn = distpad.DistributedLoss(lambda t, p: tf.reduce_sum(p**2, -1), backend=world.backend)

    def step(ids, clip_norm):
        with tf.GradientTape() as tape:
            loss = loss_fn(ids, tf.nn.embedding_lookup(variables[0], ids) * variables[1])
        gradients = distpad.gradient(tape, loss, variables, backend=world.backend)
        clipped, norm = distpad.clip_by_global_norm(gradients, clip_norm, backend=world.backend)
        assert [type(gradient) for gradient in clipped] == [type(gradient) for gradient in gradients]
        assert isinstance(clipped[0], tf.IndexedSlices) and clipped[2] is None
        return norm, world.reduce([tf.convert_to_tensor(gradient) for gradient in clipped[:2]])

    return step


def of_one_device(world):
    every = np.concatenate([ids_of(r).ravel() for r in range(world.num_replicas)])
    d_table = np.zeros_like(TABLE)
    np.add.at(d_table, every, 2 * TABLE[every] / len(every))
    return [d_table, (2 * TABLE[every] ** 2).sum(0) / len(every)]


LIMITS = [0.999, 0.5, 1.001, 2.0, float("inf")]


@pytest.mark.parametrize(
    ("limit", "graph"),
    [
        pytest.param(0.999, False, marks=pytest.mark.core),
        (0.5, False),
        *[pytest.param(limit, False, marks=pytest.mark.wide) for limit in LIMITS[2:]],
        (0.999, True),
        *[pytest.param(limit, True, marks=pytest.mark.wide) for limit in LIMITS[1:]],
    ],
)
def test_clips_as_one_device_does(world, step, limit, graph):
    """Limits below and above the norm; 0.999 times the norm tells it from the norm of a local gradient."""
    gradients = of_one_device(world)
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
    expected = [gradient * min(1, limit) for gradient in gradients]
    assert step and expected
    for clip_norm in (limit * norm, tf.constant(limit * norm, tf.float64)):
        results = world.run(lambda ids, c=clip_norm: step(ids, c), ids_of, graph=graph)
        for found_norm, found in results.values():
            assert oracle.relative_error(found_norm, norm) <= 1e-12
            assert max(map(oracle.relative_error, found, expected)) <= 1e-12


@alone
def test_is_tensorflows_own_on_one_device(world):
    gradients = [tf.constant([3.0, -4.0]), tf.constant([[12.0]])]
    for limit in (1.0, 13.0, 20.0):
        found, norm = distpad.clip_by_global_norm(gradients, limit, backend="local")
        expected, expected_norm = tf.clip_by_global_norm(gradients, limit)
        assert float(norm) == float(expected_norm) == 13.0
        for one, other in zip(found, expected):
            np.testing.assert_allclose(one, other, rtol=1e-6)


@alone
def test_half_precision_is_squared_in_float32(world):
    clipped, norm = distpad.clip_by_global_norm([tf.constant([3000.0, 4000.0], tf.float16)], 500.0, backend="local")
    assert (norm.dtype, float(norm), clipped[0].dtype) == (tf.float32, 5000.0, tf.float16)
    assert clipped[0].numpy().tolist() == [300.0, 400.0]


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_a_gradient_that_is_not_finite_on_one_replica_is_nan_on_all(world, wrong):
    """One gradient is not finite: all gradients become NaN, as in tf.clip_by_global_norm."""

    def step(x):
        gradients = world.backend.reduce_gradients([x, tf.ones([2])])
        clipped, norm = distpad.clip_by_global_norm(gradients, 1.0, backend=world.backend)
        return norm, clipped

    last = world.num_replicas - 1
    for norm, clipped in world.run(step, lambda r: np.float32([wrong if r == last else 1.0]), graph=False).values():
        assert not np.isfinite(norm)
        assert all(np.isnan(gradient).all() for gradient in clipped)


def test_collectives_are_counted(world):
    """Strategies make the one all-reduce of an optimiser; engines that reduced already make none."""
    given = lambda r: np.ones([2], "float32")
    clip = lambda x: distpad.clip_by_global_norm([x, 2 * x], 1.0, backend=world.backend)
    expected = collectives_of(world, lambda x: world.reduce([1 * x, 2 * x]), given)
    assert bool(expected) == (world.strategy is not None and world.num_replicas > 1)
    assert collectives_of(world, clip, given) == expected


def loss_scaled(optimizer, scale):
    """Return a Keras LossScaleOptimizer, with functions that scale a loss, unscale gradients and read the scale."""
    if KERAS_3:
        scaler = tf.keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=scale)
        return scaler, scaler.scale_loss, lambda gradients: gradients, lambda: float(scaler.dynamic_scale.numpy())
    scaler = tf.keras.mixed_precision.LossScaleOptimizer(optimizer, initial_scale=scale)
    return scaler, scaler.get_scaled_loss, scaler.get_unscaled_gradients, lambda: float(scaler.loss_scale.numpy())


def test_a_step_that_overflowed_on_one_replica_is_skipped_on_all(world):
    """float16 with Keras's LossScaleOptimizer: only the last replica's gradient overflows."""
    with world.scope():
        w = tf.Variable([1.0, 2.0])
        optimizer, scale_loss, unscale, scale = loss_scaled(tf.keras.optimizers.SGD(0.5, momentum=0.9), 1024.0)
        optimizer.build([w])
    loss_fn = distpad.DistributedLoss(lambda t, p: p, backend=world.backend)

    def step(x):
        with tf.GradientTape() as tape:
            loss = loss_fn(x, x * tf.cast(w, tf.float16), denominator=1.0 * world.num_replicas)
            scaled = scale_loss(loss)
        gradients = unscale(distpad.gradient(tape, scaled, [w], backend=world.backend))
        gradients, norm = distpad.clip_by_global_norm(gradients, float("inf"), backend=world.backend)
        optimizer.apply_gradients(zip(gradients, [w]))
        return norm

    last = world.num_replicas - 1
    large = lambda r: np.full([1, 2], 1000.0 if r == last else 1.0, "float16")  # 1000 · 1024 overflows float16
    assert not any(np.isfinite(norm) for norm in world.run(step, large, graph=False).values())
    assert w.numpy().tolist() == [1.0, 2.0] and scale() == 512.0
    assert all(
        np.isfinite(norm) for norm in world.run(step, lambda r: np.ones([1, 2], "float16"), graph=False).values()
    )
    assert w.numpy().tolist() == [0.5, 1.5] and scale() == 512.0  # momentum has one step only


def test_clipping_under_a_loss_scale(world):
    """Keras 3 unscales when it applies gradients: until then the limit is multiplied by the scale."""
    with world.scope():
        w = tf.Variable([0.0, 0.0])
        optimizer, scale_loss, unscale, scale = loss_scaled(tf.keras.optimizers.SGD(1.0), 1024.0)
        optimizer.build([w])
    loss_fn = distpad.DistributedLoss(lambda t, p: p, backend=world.backend)
    limit = lambda: optimizer.dynamic_scale if KERAS_3 else 1.0

    def step(x):
        with tf.GradientTape() as tape:
            loss = loss_fn(x, x * w, denominator=1.0 * world.num_replicas)
            scaled = scale_loss(loss)
        gradients = unscale(distpad.gradient(tape, scaled, [w], backend=world.backend))
        gradients, norm = distpad.clip_by_global_norm(gradients, limit(), backend=world.backend)
        optimizer.apply_gradients(zip(gradients, [w]))
        return norm / limit()

    for norm in world.run(step, lambda r: np.float32([[3.0, 4.0]]), graph=False).values():
        assert norm == pytest.approx(5.0, rel=1e-5)
    np.testing.assert_allclose(w.numpy(), [-0.6, -0.8], rtol=1e-5)
    assert scale() == 1024.0


@alone
def test_wrong_arguments_are_refused():
    gradients = [tf.constant([1.0])]
    for wrong in (0, -1.0, float("nan"), tf.constant(0.0)):
        with pytest.raises(ValueError, match="clip_norm is expected to be above 0"):
            distpad.clip_by_global_norm(gradients, wrong, backend="local")
    with pytest.raises(TypeError, match=r"gradients is .*, expected a list of gradients"):
        distpad.clip_by_global_norm(tf.constant([1.0]), 1.0)
    clipped, norm = distpad.clip_by_global_norm([None], 1.0, backend="local")
    assert clipped == [None] and float(norm) == 0.0
