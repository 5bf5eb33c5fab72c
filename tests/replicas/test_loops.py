"""What custom loops need: SGD steps, sparse gradients, broadcast, regularisation, the backend's own sums."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle


def test_three_sgd_steps_of_a_keras_model(world):
    """The weights after three steps of Keras's own SGD, against NumPy's on the concatenated batches."""
    rate = 0.5
    kernel, bias = oracle.weights()
    with world.scope():
        model = tf.keras.Sequential([tf.keras.Input([None, oracle.FEATURES]), tf.keras.layers.Dense(oracle.CLASSES)])
        model.set_weights([kernel, bias])
        optimizer = tf.keras.optimizers.SGD(rate)
        if hasattr(optimizer, "build"):
            optimizer.build(model.trainable_variables)
    loss_fn = distpad.DistributedLoss(
        tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none"), backend=world.backend
    )
    distpad.broadcast_variables(model.variables, backend=world.backend)

    def step(batch):
        with tf.GradientTape() as tape:
            loss = loss_fn(batch["y"], model(batch["x"], training=True), lengths=batch["lengths"])
        gradients = distpad.gradient(tape, loss, model.trainable_variables, backend=world.backend)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss

    for k in range(3):
        rows = [row for r in range(world.num_replicas) for row in oracle.rows_of(r, "uneven", world.num_replicas, k)]
        world.run(step, lambda r, k=k: oracle.padded(oracle.rows_of(r, "uneven", world.num_replicas, k), "float32"))
        _, d_kernel, d_bias = oracle.cross_entropy(rows, kernel, bias, "token", False)
        kernel, bias = kernel - rate * d_kernel, bias - rate * d_bias
    for found, expected, start in zip(model.get_weights(), (kernel, bias), oracle.weights()):
        assert oracle.relative_error(found - start, expected - start) <= 1e-5


def test_sparse_gradients_stay_sparse(world):
    table = np.random.default_rng(1).normal(size=[6, 3])
    with world.scope():
        embedding, dense = tf.Variable(table), tf.Variable(np.ones([3]))
    loss_fn = distpad.DistributedLoss(lambda t, p: tf.reduce_sum(p**2, -1), backend=world.backend)
    sparse = []

    def step(ids):
        with tf.GradientTape() as tape:
            loss = loss_fn(ids, tf.nn.embedding_lookup(embedding, ids) * dense)
        gradients = distpad.gradient(tape, loss, [dense, embedding], backend=world.backend)
        sparse.append(isinstance(gradients[1], tf.IndexedSlices))
        return world.reduce([tf.convert_to_tensor(gradient) for gradient in gradients])

    ids = lambda r: np.array([[r % 6, 1, 1]])
    results = world.run(step, ids, graph=False)
    assert sparse and all(sparse)
    every = np.concatenate([ids(r).ravel() for r in range(world.num_replicas)])
    expected = np.zeros_like(table)
    np.add.at(expected, every, 2 * table[every] / len(every))
    for d_dense, d_embedding in results.values():
        assert oracle.relative_error(d_embedding, expected) <= 1e-12
        assert oracle.relative_error(d_dense, (2 * table[every] ** 2).sum(0) / len(every)) <= 1e-12


def test_a_variable_without_a_gradient_gives_none(world):
    with world.scope():
        used, unused = tf.Variable([1.0, 2.0]), tf.Variable([1.0])
    loss_fn = distpad.DistributedLoss(lambda t, p: p, backend=world.backend)
    seen = []

    def step(x):
        with tf.GradientTape() as tape:
            loss = loss_fn(x, x * used)
        seen.extend(distpad.gradient(tape, loss, [used, unused], backend=world.backend))
        return loss

    world.run(step, lambda r: np.ones([1, 2], "float32"), graph=False)
    assert seen[0] is not None and seen[1] is None


def test_regularisation_counts_once(world):
    """Half the sum of squares, added to every replica's loss, has the weights themselves for its global gradient."""
    start = np.array([1.0, -2.0, 3.0])
    with world.scope():
        w = tf.Variable(start)
    loss_fn = distpad.DistributedLoss(lambda t, p: p, backend=world.backend)

    def step(x):
        with tf.GradientTape() as tape:
            penalty = distpad.scale_regularization([tf.reduce_sum(w**2) / 2], backend=world.backend)
            loss = loss_fn(x, x * w) + penalty
        return distpad.global_value(loss, backend=world.backend), world.reduce(
            distpad.gradient(tape, loss, [w], backend=world.backend)
        )

    results = world.run(step, lambda r: np.full([1, 3], 1.0 + r), graph=False)
    mean_x = np.mean([1.0 + r for r in range(world.num_replicas)])
    for value, (gradient,) in results.values():
        assert oracle.relative_error(gradient, start + mean_x / 3) <= 1e-12
        assert oracle.relative_error(value, (start**2).sum() / 2 + (start * mean_x).mean()) <= 1e-12


@pytest.mark.core
def test_broadcast_of_keras_variables_and_slots(world):
    with world.scope():
        model = tf.keras.Sequential([tf.keras.Input([2]), tf.keras.layers.Dense(3)])
        optimizer = tf.keras.optimizers.Adam()
        optimizer.build(model.trainable_variables)
    slots = optimizer.variables() if callable(optimizer.variables) else optimizer.variables
    if world.strategy is None:  # strategies keep copies alike by themselves
        model.set_weights([np.full(v.shape, 1.0 + world.backend.worker_index) for v in model.get_weights()])
    distpad.broadcast_variables([*model.variables, *slots], backend=world.backend)
    if world.strategy is None:
        assert all(np.all(value == 1.0) for value in model.get_weights())
    with pytest.raises(ValueError, match="root is 99"):
        distpad.broadcast_variables(model.variables, root=99, backend=world.backend)


def test_sums_and_maxima_of_the_backend(world):
    def step(x):
        return world.backend.all_reduce(x), world.backend.all_gather(x)

    replicas = np.arange(world.num_replicas, dtype="float64")
    for graph in (True, False):
        results = world.run(step, lambda r: np.array([r, -r, 2.5]), graph=graph)
        for total, gathered in results.values():
            np.testing.assert_allclose(total, [replicas.sum(), -replicas.sum(), 2.5 * len(replicas)], rtol=1e-15)
            np.testing.assert_array_equal(gathered[:, 0], replicas)
    backend = world.backend
    workers = np.arange(backend.num_workers)
    for dtype in ("int64", "float64"):
        mine = np.array([backend.worker_index, -backend.worker_index], dtype)
        np.testing.assert_array_equal(backend.host_sum(mine), [workers.sum(), -workers.sum()])
        np.testing.assert_array_equal(backend.host_max(mine), [workers.max(), 0])


def test_detection_finds_the_world(world):
    """Without backend=, in the step: the engine that runs it."""
    found = []

    def step(x):
        found.append(distpad.backends.resolve())
        return distpad.DistributedLoss(lambda t, p: p)(x, x)

    if world.kind == "local" or world.strategy is not None or world.several_workers:
        world.run(step, lambda r: np.ones([1, 1]))
        assert {backend.num_replicas for backend in found} == {world.num_replicas}
        assert {type(backend) for backend in found} == {type(world.backend)}
