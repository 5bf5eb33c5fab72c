"""Tests that need several processes: errors that reach all workers, broadcasts, and Horovod's own settings."""

from __future__ import annotations

import time

import numpy as np
import pytest
import refused_step
import tensorflow as tf

import distpad
import oracle
from replica_world import HANG_S


@pytest.fixture(autouse=True)
def _several(world):
    assert world.backend.num_workers > 1


@pytest.fixture
def horovod(world):
    if world.strategy is not None:
        pytest.skip("a setting of Horovod's")
    import horovod.tensorflow as hvd

    return hvd


def contribution(world, value, **options):
    loss_fn = distpad.DistributedLoss(lambda t, p: tf.abs(t - p), backend=world.backend, **options)
    return lambda mask: loss_fn(tf.zeros([2, 3]), tf.fill([2, 3], float(value)), mask=mask)


def test_all_workers_show_the_error_of_the_faulty_replica(world):
    last = world.num_replicas - 1
    given = lambda r: np.ones([2, 5 if r == last else 3], bool)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5\)") as raised:
        world.run(contribution(world, 1), given, graph=False)
    assert time.monotonic() - started < HANG_S
    is_of_other_worker = f"replica {last} refused its arguments" in str(raised.value)
    assert is_of_other_worker == (world.backend.worker_index != last)


def test_variables_that_differ_between_workers_are_refused_on_all(world):
    count = 1 + (world.backend.worker_index == 0)
    with world.scope():
        variables = [tf.Variable(0.0) for _ in range(2)]
    with pytest.raises(ValueError, match=r"numbers: 1 to 2"):
        distpad.broadcast_variables(variables[:count], backend=world.backend)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "uint32", "uint64", "int8", "bool", "complex64"])
def test_horovod_broadcasts_variables_of_all_dtypes(world, horovod, dtype):
    """Also dtypes that Horovod does not support."""
    root = world.num_replicas - 1
    values = lambda rank: tf.cast(tf.constant([rank, 1, 3]), dtype)
    variable = tf.Variable(values(world.backend.worker_index))
    distpad.broadcast_variables([variable], root=root, backend=world.backend)
    assert variable.numpy().tolist() == values(root).numpy().tolist()


def test_detection_outside_any_scope(world):
    if world.strategy is None:
        assert isinstance(distpad.backends.resolve(), distpad.backends.HorovodBackend)
        return
    with pytest.raises(ValueError, match=r"TF_CONFIG names 2 workers.*strategy\.run"):
        distpad.DistributedLoss(lambda t, p: p)(tf.ones([1, 1]), tf.ones([1, 1]))
    assert distpad.backends.resolve("local").num_replicas == 1


def test_horovods_own_tape_is_refused(world, horovod):
    with horovod.DistributedGradientTape(tf.GradientTape()) as tape:
        loss = tf.Variable(1.0) * 2.0
    with pytest.raises(TypeError, match=r"plain tf\.GradientTape"):
        distpad.gradient(tape, loss, [])


@pytest.mark.parametrize("op", ["average", "sum"])
def test_horovods_own_tape_with_its_operation_as_op(world, horovod, op):
    reduction = {"average": horovod.Average, "sum": horovod.Sum}[op]
    backend = distpad.backends.HorovodBackend(op=op)
    kernel, bias = (tf.Variable(value) for value in oracle.weights())
    loss_fn = distpad.DistributedLoss(tf.nn.sparse_softmax_cross_entropy_with_logits, backend=backend)
    batch = oracle.padded(oracle.rows_of(backend.worker_index, "uneven", world.num_replicas), "float64")
    with horovod.DistributedGradientTape(tf.GradientTape(), op=reduction) as tape:
        loss = loss_fn(batch["y"], batch["x"] @ kernel + bias, lengths=batch["lengths"])
    found = tape.gradient(loss, [kernel, bias])
    rows = [row for r in range(world.num_replicas) for row in oracle.rows_of(r, "uneven", world.num_replicas)]
    value, *expected = oracle.cross_entropy(rows, *oracle.weights(), "token", False)
    assert oracle.relative_error(loss_fn.global_value(loss), value) <= 1e-12
    assert max(map(oracle.relative_error, found, expected)) <= 1e-12


def test_compressed_gradients_lose_no_more_than_float16_does(world, horovod):
    backend = distpad.backends.HorovodBackend(compression=horovod.Compression.fp16)
    x = tf.Variable(np.random.default_rng(0).normal(size=[50]).astype("float32"))
    with tf.GradientTape() as tape:
        loss = distpad.DistributedLoss(lambda t, p: p, backend=backend)(tf.zeros([1, 50]), tf.square(x)[None])
    (found,) = distpad.gradient(tape, loss, [x], backend=backend)
    error = oracle.relative_error(found, 2 * x.numpy().astype("float64") / 50)
    assert 1e-6 < error < 1e-2  # compressed, and to float16 only


def test_adasum_and_unknown_operations_are_refused(world, horovod):
    with pytest.raises(ValueError, match="Adasum is neither"):
        distpad.backends.HorovodBackend(op="adasum")
    with pytest.raises(ValueError, match="one of 'average', 'sum'"):
        distpad.backends.HorovodBackend(op="mean")


def test_a_graph_refuses_on_all_workers(world):
    """The last test with a strategy: TensorFlow's own collectives do not work again after a failed graph."""
    message, seconds = refused_step.raised(world, "clipping_optimizer")
    assert "DistributedLoss: lengths have dtype float32, expected integers" in message
    assert seconds < HANG_S


@pytest.mark.parametrize("per", ["position", "sequence"])
def test_the_backward_pass_makes_no_collective(world, horovod, per):
    """The counts do not depend on the weights: the traced step has one collective, that of the forward pass."""

    def loss(y_true, y_pred):
        return tf.abs(y_pred) if per == "position" else tf.reduce_sum(tf.abs(y_pred), -1)

    loss_fn = distpad.DistributedLoss(loss, per=per, backend=world.backend)

    @tf.function(input_signature=[tf.TensorSpec([None, None])])
    def step(x):
        weight = tf.ones([])
        with tf.GradientTape() as tape:
            tape.watch(weight)
            value = loss_fn(tf.zeros_like(x), x * weight, lengths=tf.fill([tf.shape(x)[0]], tf.shape(x)[1]))
        return tape.gradient(value, weight)

    made = [operation.type for operation in step.get_concrete_function().graph.get_operations()]
    assert [kind for kind in made if "Horovod" in kind] == ["HorovodAllreduce"]


def test_structures_that_differ_are_named(world, horovod):
    """Horovod's collectives compare sizes, and distpad explains the error; TensorFlow's collectives do not."""
    tensors = (np.ones([2, 3]),) * (2 if world.backend.worker_index else 1)
    with pytest.raises(ValueError, match="pad_to_global_max: replicas gave arguments of different structure"):
        distpad.pad_to_global_max(tensors, backend=world.backend)
