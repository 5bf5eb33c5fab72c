"""PaddedBatches.for_keras: the dataset for fit, and the history and weights of one device in every engine."""

from __future__ import annotations

import gc
import itertools
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle
from distpad.data import keras
from keras_world import KERAS, fit_optimizer
from replica_world import HANG_S

WORLDS = ("local", "mirrored:2", "mirrored:4", "multiworker:2", "horovod:2")

PADDING = {"x": distpad.Pad(), "y": distpad.Pad(value=-99)}
RATE = 0.5


@pytest.fixture(autouse=True)
def collected():
    """Collect the iterators that a test left early. Otherwise the thread in which TensorFlow tunes each device's
    dataset may sleep for up to a minute during a later test."""
    gc.freeze()  # collecting all objects from before the test would take seconds
    yield
    gc.collect()
    gc.unfreeze()


def examples(count: int = 46, seed: int = 3) -> list[dict]:
    random = np.random.default_rng(seed)
    return [
        {
            "x": random.normal(size=[n, oracle.FEATURES]).astype(np.float32),
            "y": random.integers(0, oracle.CLASSES, n),
            "w": np.float32(i % 3),
            "id": np.int64(i),
        }
        for i, n in enumerate(random.integers(0, 7, count))
    ]


def sampled(world, **options):
    """The same global steps in every world; the last step is uneven."""
    data = examples()
    sampler = distpad.LengthSampler([len(e["y"]) for e in data], **(options or {"global_batch_size": 8}), seed=1)
    return data, sampler, made(world, (data, sampler))


def made(world, source, *args, **options):
    return distpad.PaddedBatches(
        source, *args, backend=world.backend, **{"padding": PADDING, "tokens": "y", "buckets": None, **options}
    )


def epoch_of(world, dataset, steps) -> list:
    """This worker's batches of an epoch; of a dataset that repeats, the next ``steps`` batches."""

    def rows(leaf):
        parts = world.strategy.experimental_local_results(leaf) if world.strategy else [leaf]
        return np.concatenate([part.numpy() for part in parts])

    found = itertools.islice(dataset, steps) if must_repeat(world) else dataset
    return [tf.nest.map_structure(rows, batch) for batch in found]


def model_in(world, graph=False):
    """A linear model, compiled under the world's strategy. Without ``graph`` Keras runs it eagerly, which takes a third
    of the time."""
    with world.scope():
        inputs = tf.keras.Input([None, oracle.FEATURES])
        dense = tf.keras.layers.Dense(oracle.CLASSES)
        outputs = dense(inputs)
        model = tf.keras.Model(inputs, outputs)
        dense.set_weights(oracle.weights())
        entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        optimizer = fit_optimizer(world, tf.keras.optimizers.SGD(RATE))
        model.compile(loss=distpad.DistributedLoss(entropy), optimizer=optimizer, run_eagerly=not graph)
    return model


def must_repeat(world) -> bool:
    return world.kind == "multiworker" and KERAS < 3


def fed_by(world, batches, steps, **features):
    """A dataset, and the argument ``steps_per_epoch`` if fit needs it."""
    repeat = must_repeat(world)
    return batches.for_keras(**features, repeat=repeat), {"steps_per_epoch": steps} if repeat else {}


def fit(world, model, fed, **options):
    dataset, steps = fed
    with world.scope():  # Keras 3 needs the scope with several workers of a strategy
        return model.fit(dataset, verbose=0, **{**steps, **options})


def expected(epochs, weighted: bool = False):
    """Each epoch's mean loss, and the weights after these epochs of global steps, in NumPy."""
    kernel, bias = oracle.weights()
    means = []
    for steps in epochs:
        values = []
        for rows in steps:
            value, d_kernel, d_bias = oracle.cross_entropy(rows, kernel, bias, "token", weighted)
            kernel, bias = kernel - RATE * d_kernel, bias - RATE * d_bias
            values.append(value)
        means.append(np.mean(values))
    return means, (kernel, bias)


def check(model, history, means, weights) -> None:
    assert oracle.relative_error(history.history["loss"], means) <= 1e-5
    for found, wanted, start in zip(model.get_weights(), weights, oracle.weights()):
        assert oracle.relative_error(found - start, wanted - start) <= 1e-5


# -- the dataset ------------------------------------------------------------------------------------------------------


def test_each_epoch_holds_the_rows_of_this_workers_replicas(world):
    data, sampler, batches = sampled(world)
    here, replicas, worker = world.backend.replicas_here, world.num_replicas, world.backend.worker_index
    dataset, _ = fed_by(world, batches, 0, x="x", y=["y", "id"])
    every = iter(dataset)
    for number in range(2):
        steps = len(sampler.plan(number))
        found = epoch_of(world, every if must_repeat(world) else dataset, steps)
        assert len(found) == steps
        shards = [sampler.shard(worker * here + r, replicas) for r in range(here)]
        for shard in shards:
            shard.set_epoch(number)
        for step, (x, (y, ids), weights), *parts in zip(sampler.plan(number), found, *shards):
            longest = max(1, *(len(data[i]["y"]) for i in step))
            assert (
                x.shape == (-(-8 // replicas) * here, longest, oracle.FEATURES)
                and y.shape == weights.shape == x.shape[:2]
            )
            assert weights.dtype == np.float32
            for row, index in enumerate(np.concatenate(parts)):
                n = len(data[index]["y"]) if index >= 0 else 0
                assert weights[row].tolist() == [1] * n + [0] * (longest - n)
                if index >= 0:
                    assert ids[row] == index
                    np.testing.assert_array_equal(x[row, :n], data[index]["x"])
                    np.testing.assert_array_equal(y[row, :n], data[index]["y"])


def test_uneven_ends_and_weights(world):
    """Worker w holds 3 + 4 w examples, with weights in a dict of losses."""
    workers, here, worker = world.backend.num_workers, world.backend.replicas_here, world.backend.worker_index
    held = [examples(3 + 4 * w, seed=w) for w in range(workers)]
    steps = max(-(-len(part) // (2 * here)) for part in held)
    batches = made(world, held[worker], 2, tokens={"text": "y"}, weights="w")
    fed, _ = fed_by(world, batches, steps, x={"in": "x"}, y={"text": "y"})
    found = epoch_of(world, fed, steps)
    assert len(found) == steps
    assert all(x["in"].shape[:2] == y["text"].shape == w["text"].shape for x, y, w in found)
    total = sum(w["text"].sum() for _, _, w in found)
    assert total == sum(e["w"] * len(e["y"]) for e in held[worker])


def test_wrong_names_and_no_examples(world):
    source, options = examples(4, seed=world.backend.worker_index), {"repeat": must_repeat(world)}
    with pytest.raises(ValueError, match=r"for_keras: y is 'label', expected a feature of an example: \['id', "):
        made(world, source, 2).for_keras(x="x", y="label", **options)
    with pytest.raises(TypeError, match=r"for_keras: x is 1\.5, expected the name of a feature"):
        made(world, source, 2).for_keras(x=1.5, y="y", **options)
    with pytest.raises(ValueError, match=r"for_keras: x is \(\), expected at least one"):
        made(world, source, 2).for_keras(x=(), y="y", **options)
    with pytest.raises(ValueError, match="for_keras: source is empty on all workers"):
        made(world, [], 2).for_keras(x="x", y="y", **options)


def test_keras_2_with_several_workers_of_a_strategy_needs_repeat(world):
    if not must_repeat(world):
        pytest.skip("here a dataset may end")
    with pytest.raises(
        ValueError, match=r"for_keras: repeat is False with 2 workers .* expected True. .*steps_per_epoch"
    ):
        made(world, examples(4), 2).for_keras(x="x", y="y")


def test_rows_of_several_replicas_of_a_worker_are_split(world):
    """A MultiWorkerMirroredStrategy with several devices on a worker needs GPUs; splitting its batches does not."""
    if world.strategy is None or world.backend.replicas_here == 1:
        pytest.skip("needs several replicas in one process")
    here = world.backend.replicas_here
    batch = {"x": np.arange(6 * here).reshape([2 * here, 3]), "y": np.arange(2 * here)}
    found = list(keras.split((batch, batch["y"]), here))
    assert len(found) == here
    for r, (features, y) in enumerate(found):
        np.testing.assert_array_equal(features["x"], batch["x"][2 * r : 2 * r + 2])
        assert features["y"].numpy().tolist() == y.numpy().tolist() == [2 * r, 2 * r + 1]


# -- fit --------------------------------------------------------------------------------------------------------------


def test_fit_gives_the_history_and_weights_of_one_device(world):
    """Two epochs in different orders, whose last step is uneven; one trace for all lengths."""
    data, sampler, batches = sampled(world)
    model = model_in(world, graph=True)
    fed = fed_by(world, batches, len(sampler.plan(0)), x="x", y="y")
    history = fit(world, model, fed, epochs=2)
    check(model, history, *expected([[[data[i] for i in step] for step in sampler.plan(e)] for e in range(2)]))
    count = getattr(model.train_function, "experimental_get_tracing_count", None)
    assert count is None or count() <= 2  # Keras 2 traces a second time, to make variables


@pytest.mark.worlds("mirrored:2", "horovod:2")
def test_an_epoch_of_few_steps_is_trained_on_from_the_first(world):
    """The epoch has fewer steps than tf.data reads ahead while Keras 3 consumes a first batch to infer shapes."""
    data = examples(20)
    sampler = distpad.LengthSampler([len(e["y"]) for e in data], global_batch_size=8, seed=1)
    batches = made(world, (data, sampler))
    model = model_in(world)
    fed = fed_by(world, batches, len(sampler.plan(0)), x="x", y="y")
    history = fit(world, model, fed, epochs=2)
    check(model, history, *expected([[[data[i] for i in step] for step in sampler.plan(e)] for e in range(2)]))


def test_fit_with_uneven_workers_and_weights(world):
    workers, a_step = world.backend.num_workers, 2 * world.backend.replicas_here
    held = [examples(13 + 5 * w, seed=w) for w in range(workers)]
    steps = max(-(-len(part) // a_step) for part in held)
    batches = made(world, held[world.backend.worker_index], 2, weights="w", lookahead=2)
    model = model_in(world)
    history = fit(world, model, fed_by(world, batches, steps, x="x", y="y"), epochs=2)
    rows = [[row for part in held for row in part[k * a_step : (k + 1) * a_step]] for k in range(steps)]
    weighed = [[{**row, "w": np.full(len(row["y"]), row["w"])} for row in step] for step in rows]
    check(model, history, *expected([weighed] * 2, weighted=True))


@pytest.mark.worlds("mirrored:2")
def test_fit_and_evaluate_with_a_loss_for_each_output(world):
    """The second output has fewer labels; each loss averages over its own labels and has its own loss weight."""
    data = [{**e, "z": (e["y"][::2] + 1) % oracle.CLASSES} for e in examples()]
    sampler = distpad.LengthSampler([len(e["y"]) for e in data], global_batch_size=8, seed=1)
    padding = {**PADDING, "z": distpad.Pad(value=-99)}
    batches = made(world, (data, sampler), padding=padding, tokens={"y": "y", "z": "z"})
    starts, parts = {"y": oracle.weights(1), "z": oracle.weights(2)}, {"y": 1, "z": 2}
    with world.scope():
        inputs = tf.keras.Input([None, oracle.FEATURES])
        heads = {name: tf.keras.layers.Dense(oracle.CLASSES, name=name) for name in parts}
        every_second = tf.keras.layers.Lambda(lambda x: x[:, ::2])(inputs)
        outputs = {"y": heads["y"](inputs), "z": heads["z"](every_second)}
        model = tf.keras.Model(inputs, outputs)
        for name, head in heads.items():
            head.set_weights(starts[name])
        entropy = lambda: tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        losses = {name: distpad.DistributedLoss(entropy()) for name in parts}
        optimizer = fit_optimizer(world, tf.keras.optimizers.SGD(RATE))
        model.compile(loss=losses, loss_weights={"y": 1.0, "z": 3.0}, optimizer=optimizer, run_eagerly=True)
    steps, epoch = len(sampler.plan(0)), 1
    fed = fed_by(world, batches, steps, x="x", y={"y": "y", "z": "z"})
    history = fit(world, model, fed).history
    if must_repeat(world):  # fit may have begun and dropped the next epoch
        batches, epoch = made(world, (data, sampler), padding=padding, tokens={"y": "y", "z": "z"}), 0
        fed = fed_by(world, batches, steps, x="x", y={"y": "y", "z": "z"})
    with world.scope():
        counted = {"steps": steps} if must_repeat(world) else {}
        evaluated = model.evaluate(fed[0], return_dict=True, verbose=0, **counted)

    total, later = 0, 0
    for name, every in parts.items():
        kernel, bias = starts[name]

        def rows_of(epoch, name=name, every=every):
            for step in sampler.plan(epoch):
                chosen = [{"x": data[i]["x"][::every], "y": data[i][name]} for i in step]
                yield [{**row, "w": np.ones(len(row["y"]))} for row in chosen]

        values = []
        for rows in rows_of(0):
            value, d_kernel, d_bias = oracle.cross_entropy(rows, kernel, bias, "token", False)
            rate = RATE * (3 if name == "z" else 1)
            kernel, bias = kernel - rate * d_kernel, bias - rate * d_bias
            values.append(value)
        after = np.mean([oracle.cross_entropy(rows, kernel, bias, "token", False)[0] for rows in rows_of(epoch)])
        total, later = total + np.mean(values) * rate / RATE, later + after * rate / RATE
        assert oracle.relative_error(history[f"{name}_loss"], np.mean(values)) <= 1e-5
        assert oracle.relative_error(evaluated[f"{name}_loss"], after) <= 1e-5
        for found, wanted, start in zip(heads[name].get_weights(), (kernel, bias), starts[name]):
            assert oracle.relative_error(found - start, wanted - start) <= 1e-5
    assert oracle.relative_error(history["loss"], total) <= 1e-5
    assert oracle.relative_error(evaluated["loss"], later) <= 1e-5


@pytest.mark.worlds("mirrored:2")
def test_epochs_of_different_numbers_of_steps(world):
    """With a token budget, a dataset that repeats leaves no batch out."""
    data, sampler, batches = sampled(world, max_tokens=40, randomness=0.3)
    counts = [len(sampler.plan(e)) for e in range(6)]
    assert len(set(counts)) > 1, "of different numbers"
    dataset = batches.for_keras(x="x", y="y", repeat=True)
    model = model_in(world)
    fit(world, model, (dataset, {"steps_per_epoch": sum(counts[:3])}))
    _, weights = expected([[[data[i] for i in step] for step in sampler.plan(e)] for e in range(3)])
    for found, wanted, start in zip(model.get_weights(), weights, oracle.weights()):
        assert oracle.relative_error(found - start, wanted - start) <= 1e-5


def test_an_error_of_the_source_ends_fit(world):
    mine = examples(40, seed=world.backend.worker_index)

    class Source:
        def __iter__(self):
            yield from mine[:24]
            raise OSError("the disk is gone")

    fed = fed_by(world, made(world, Source(), 2, lookahead=2), 20, x="x", y="y")
    model = model_in(world)
    with pytest.raises(tf.errors.OpError, match="the disk is gone"):
        fit(world, model, fed)


class Stop(tf.keras.callbacks.Callback):
    """Leaves an epoch on all workers at the same step."""

    def __init__(self, last=2):
        super().__init__()
        self.last = last

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.last:
            raise KeyError("enough")


def test_leaving_early_leaves_no_thread_and_fit_goes_on(world):
    before = {*threading.enumerate()}  # models of other tests may keep iterators
    _, sampler, batches = sampled(world)
    fed = fed_by(world, batches, len(sampler.plan(0)), x="x", y="y")
    if isinstance(fed[0], tf.data.Dataset):
        assert not fed[0].options().autotune.enabled, "its thread may block garbage collection for a minute"
    model = model_in(world)
    with pytest.raises(KeyError, match="enough"):
        fit(world, model, fed, callbacks=[Stop()])
    if not world.strategy:
        assert batches.state_dict()["step"] == 3, "no batch is read ahead, so that workers leave together"
    fit(world, model, fed, steps_per_epoch=2)
    assert len(fit(world, model, fed).history["loss"]) == 1
    gc.collect()  # until then another worker may keep its iterator, while this one waits to announce that it leaves
    until = time.monotonic() + HANG_S
    while left := [each.name for each in {*threading.enumerate()} - before if each.name.startswith("distpad-")]:
        assert time.monotonic() < until, left
        time.sleep(0.1)


@pytest.mark.worlds("multiworker:2", "horovod:2")
def test_a_worker_that_keeps_its_iterator_does_not_block_the_others(world):
    """Python's garbage collector may keep an iterator on one worker and not on another."""
    if world.num_replicas > 2:
        pytest.skip("abandoned iterators of four replicas block later tests for minutes, see keras.py")
    gc.collect()  # an iterator of another test may take a minute to end: see the options of our datasets in keras.py
    data, sampler, _ = sampled(world)
    batches = made(world, (data, sampler), lookahead=2)
    dataset, _ = fed_by(world, batches, len(sampler.plan(0)), x="x", y="y")
    iterator = iter(dataset)
    next(iterator)
    began = time.monotonic()
    kept = [iterator] if world.backend.worker_index == 0 else []
    del iterator
    gc.collect()
    assert world.backend.host_sum(np.ones(1)) == world.backend.num_workers
    assert time.monotonic() - began < HANG_S, "a worker waited for the one that keeps its iterator"
    kept.clear()
    gc.collect()
    following = epoch_of(world, dataset, 2)
    assert len(following) == (2 if must_repeat(world) else len(sampler.plan(1)))


@pytest.mark.worlds("multiworker:2", "horovod:2")
@pytest.mark.parametrize("slow", [0, pytest.param(1, marks=pytest.mark.wide)])
def test_workers_continue_together_after_leaving_at_any_step(world, slow, monkeypatch):
    """Every second step has an exchange, and one worker pads slowly: when all leave at the same step, the others have
    come to an exchange that the slow worker does not reach."""
    if world.num_replicas > 2:
        pytest.skip("abandoned iterators of four replicas block later tests for minutes, see keras.py")
    made_of = keras.Elements.of

    def slowly(*arguments):
        time.sleep(0.15 if world.backend.worker_index == slow % world.backend.num_workers else 0)
        return made_of(*arguments)

    monkeypatch.setattr(keras.Elements, "of", slowly)
    data, sampler, _ = sampled(world)
    batches = made(world, (data, sampler), lookahead=2)
    fed, model = fed_by(world, batches, len(sampler.plan(0)), x="x", y="y"), model_in(world)
    began = time.monotonic()
    for last in range(len(sampler.plan(0))):
        with pytest.raises(KeyError, match="enough"):
            fit(world, model, fed, callbacks=[Stop(last)])
    start = [weight.copy() for weight in model.get_weights()]
    fit(world, model, fed)
    assert time.monotonic() - began < HANG_S, "no worker waited for one that never came"

    def error_of(number):
        kernel, bias = start
        for step in sampler.plan(number):
            _, d_kernel, d_bias = oracle.cross_entropy([data[i] for i in step], kernel, bias, "token", False)
            kernel, bias = kernel - RATE * d_kernel, bias - RATE * d_bias
        return max(map(oracle.relative_error, model.get_weights(), (kernel, bias)))

    errors = [error_of(number) for number in range(len(sampler.plan(0)) * 2 + 2)]
    assert sum(error <= 1e-5 for error in errors) == 1, "fit trained exactly one whole epoch"
