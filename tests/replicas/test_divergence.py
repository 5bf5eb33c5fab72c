"""Copies that differ, and values that are not finite: all workers raise, naming replica, variable and examples."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf

import distpad
from distpad import backends

COUNT = 24
EPOCH = {"steps_per_epoch": COUNT // 2, "verbose": 0}


def made(world, **options):
    worker, here = world.backend.worker_index, world.backend.replicas_here
    source = [{"y": np.full(1 + i % 3, 100 * worker + i, np.float32)} for i in range(COUNT * here)]
    given = {"padding": {"y": distpad.Pad()}, "tokens": "y", "buckets": None, "lookahead": 4}
    return distpad.PaddedBatches(source, 2, **given, backend=world.backend, **options)


def model(world):
    with world.backend.scope():
        built = tf.keras.Sequential([tf.keras.layers.Dense(3), tf.keras.layers.Dense(2, dtype="float16")])
        built.build([None, 5])
    distpad.broadcast_variables(built.variables, backend=world.backend)
    return built


def loop(batches, does):
    """The steps before the error of a loop, and its text."""
    seen = 0
    try:
        for batch in batches:
            seen += 1
            does(seen, batch)
    except distpad.DistpadError as error:
        return seen, str(error)
    return seen, ""


def on_each(world, function, batch):
    """Run a function of a replica's batch on each replica, in a graph."""
    if world.strategy is None:
        return function(batch)
    return world.strategy.run(function, args=(batch,))


def copies(world, variable):
    return world.backend.local_results(backends.variables.tensorflow_variable(variable, "test"))


@pytest.mark.core
def test_equal_variables_are_watched_without_an_error(world):
    batches, watched = made(world), model(world).trainable_variables
    batches.watch(watched)
    assert len(watched) == 4
    for step, _ in enumerate(batches):
        for variable in watched:
            variable.assign(variable * 0 + step)


@pytest.mark.core
@pytest.mark.parametrize(  # before the first step, in the middle, in the last step
    "at", [0, pytest.param(5, marks=pytest.mark.wide), COUNT // 2]
)
def test_a_copy_that_differs_is_named_on_all_workers(world, at):
    if world.num_replicas == 1:
        pytest.skip("one copy")
    batches, watched = made(world), model(world).trainable_variables
    batches.watch(watched)
    last = world.num_replicas - 1

    def spoil():
        if world.backend.worker_index == world.backend.num_workers - 1:
            copy = copies(world, watched[2])[-1]
            copy.assign(tf.tensor_scatter_nd_add(copy, [[1, 1]], tf.ones([1], copy.dtype) / 1024))

    if at == 0:
        spoil()
    name = getattr(watched[2], "path", watched[2].name)
    one = f"{name} on .*replica {last} " if world.num_replicas > 2 else name
    seen, text = loop(batches, lambda seen, _: spoil() if seen == at else None)
    assert re.search(f"differ between replicas after .*{one}", text) and "other variables" not in text
    assert at <= seen <= at + 4


def test_variables_of_one_name_are_told_apart(world):
    if world.num_replicas == 1:
        pytest.skip("one copy")
    batches = made(world)
    with world.backend.scope():
        pair = [tf.Variable([1.0, 2.0, 3.0, 4.0], name="same"), tf.Variable(2.0, name="same")]
    batches.watch([*pair, tf.Variable(3.0)])  # the last one has no copy for each replica of a strategy
    if world.backend.worker_index == world.backend.num_workers - 1:
        copies(world, pair[0])[-1].assign([3.0, 4.0, 1.0, 2.0])  # whose words have the same sum
    with pytest.raises(distpad.DistpadError, match=r"expected equal ones: same:0 \(variable 0\) on replica"):
        list(batches)


def test_what_not_all_workers_watch(world):
    if not world.several_workers:
        pytest.skip("one worker")
    batches = made(world)
    if world.backend.worker_index:
        batches.watch(model(world).trainable_variables)
    else:
        model(world)
    with pytest.raises(distpad.DistpadError, match="not watched"):
        list(batches)


def test_watched_variables_are_checked(world):
    batches = made(world)
    with pytest.raises(TypeError, match=r"model\.trainable_variables"):
        batches.watch(model(world))
    with pytest.raises(TypeError, match="with a int"):
        batches.watch([3])
    with world.backend.scope():
        own = tf.Variable(1.0, synchronization=tf.VariableSynchronization.ON_READ)
    if world.strategy is not None:
        with pytest.raises(ValueError, match="its own part"):
            batches.watch([own])


@pytest.mark.parametrize(
    ("what", "at"),
    [
        ("rows", 2),
        ("gradient", COUNT // 2 - 1),
        pytest.param("rows", COUNT // 2 - 1, marks=pytest.mark.wide),
        pytest.param("gradient", 2, marks=pytest.mark.wide),
    ],
)
def test_the_replica_and_the_examples_of_a_nan_are_named_on_all_workers(world, at, what):
    batches, last = made(world), world.num_replicas - 1
    worker, here = world.backend.num_workers - 1, world.backend.replicas_here
    bad = 100 * worker + 2 * here * at + 2 * (here - 1) + 1  # the second row of the last replica in this step

    @tf.function
    def step(batch, is_later):
        def of_replica(batch):
            y = batch.data["y"]
            values = tf.where((y == bad) | is_later, np.nan, y)  # by then all weights are NaN
            if what == "rows":
                distpad.check_finite(values, batch, backend=world.backend)
            else:
                total = [tf.IndexedSlices(values, batch.indices, [COUNT]), None, tf.constant(1.0)]
                distpad.check_finite(total, batch, name="gradient", backend=world.backend)
            return y

        return on_each(world, of_replica, batch)

    index = bad - 100 * worker
    named = rf"\[{index}\]" if what == "rows" else rf"\[{index - 1}, {index}\]"
    name = "loss" if what == "rows" else "gradient"
    wanted = rf"{name} is not finite on replica {last} \(worker {worker}\), for examples {named}"
    seen, text = loop(batches, lambda seen, batch: step(batch, tf.constant(seen > at + 1)))
    assert re.search(wanted, text) and at < seen <= at + 5


@pytest.mark.worlds("mirrored:2")
def test_what_check_finite_takes(world):
    batches = distpad.PaddedBatches([{"y": [i]} for i in range(2)], 2, padding={"y": distpad.Pad()}, tokens="y")
    with pytest.raises(TypeError, match="check_finite: values is a dict"):
        distpad.check_finite({"a": tf.ones([2])}, next(iter(batches)))
    for values in (tf.constant(np.array([1, np.nan + 1j], "complex64")), tf.ragged.constant([[1.0, np.nan], []])):
        named = r"\[1\]" if values.dtype.is_complex else r"\[0, 1\]"  # the rows of flat values are no examples
        assert re.search(
            f"for examples {named}", loop(batches, lambda _, batch, v=values: distpad.check_finite(v, batch))[1]
        )


def fed(world, bad=None):
    """A model, and batches whose example index is in x: the loss of example ``bad`` of the last worker is NaN."""
    worker, here = world.backend.worker_index, world.backend.replicas_here
    rows = [np.full([1 + i % 3, 1], 100 * worker + i, np.float32) / 1000 for i in range(COUNT * here)]
    padding = {"x": distpad.Pad(), "y": distpad.Pad()}
    options = {"tokens": "y", "buckets": None, "lookahead": 4, "backend": world.backend}
    batches = distpad.PaddedBatches([{"x": row, "y": row} for row in rows], 2, padding=padding, **options)

    def loss(y_true, y_pred):
        is_bad = tf.abs(y_true - (-1.0 if bad is None else bad / 1000)) < 1e-4
        return tf.where(is_bad, np.nan, tf.abs(y_true - y_pred))[..., 0]

    with world.backend.scope():
        built = tf.keras.Sequential([tf.keras.layers.Dense(1)])
        built.build([None, None, 1])
        optimizer = distpad.DistributedOptimizer(tf.keras.optimizers.SGD(0.1))
        built.compile(optimizer, distpad.DistributedLoss(loss, check_finite=True), jit_compile=False)
    distpad.broadcast_variables(built.variables, backend=world.backend)
    return built, batches


@pytest.mark.worlds("mirrored:2", "horovod:2")
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.wide), COUNT // 2 - 1])
def test_fit_names_the_replica_and_the_example_of_a_nan(world, step):
    worker, here, last = world.backend.num_workers - 1, world.backend.replicas_here, world.num_replicas - 1
    index = 2 * here * step + 2 * (here - 1) + 1
    built, batches = fed(world, 100 * worker + index)
    wanted = rf"loss is not finite on replica {last} \(worker {worker}\), for examples \[{index}\]"
    with pytest.raises((distpad.DistpadError, tf.errors.OpError), match=wanted):
        built.fit(batches.for_keras(x="x", y="y", repeat=True), **EPOCH)


@pytest.mark.worlds("mirrored:2", "horovod:2")
def test_fit_names_a_copy_that_differs_at_the_end_of_the_epoch(world):
    if world.num_replicas == 1:
        pytest.skip("one copy")
    built, batches = fed(world)

    class Spoils(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 4 and world.backend.worker_index == world.backend.num_workers - 1:
                copies(world, self.model.trainable_variables[0])[-1].assign([[7.0]])

    built.fit(batches.for_keras(x="x", y="y", repeat=True), epochs=2, **EPOCH)
    with pytest.raises(ValueError, match=f"differ between the ranks after epoch 0 .*on rank {world.num_replicas - 1}"):
        built.fit(batches.for_keras(x="x", y="y", repeat=True), epochs=2, **EPOCH, callbacks=[Spoils()])
