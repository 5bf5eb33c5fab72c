"""fit on for_keras: the weights carry the step's counts to the loss, so that gradients wait for no collective of it."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import tensorflow as tf
import test_for_keras as feeding
from test_for_keras import collected  # noqa: F401 (the fixture collects the iterators of fit)

import distpad
import oracle
from distpad.collectives.checked import Check
from distpad.losses.counted import CountedWeights
from keras_world import fit_optimizer

WORLDS = ("local", "mirrored:2", "mirrored:4", "multiworker:2", "horovod:2")
RATE, STEPS = 0.5, 3


def entropy(reduction="none"):
    return tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)


def model_in(world, loss, front=None, kind=None, **options):
    """A linear model behind the layer ``front``."""
    with world.scope():
        inputs = tf.keras.Input([None, oracle.FEATURES])
        dense = tf.keras.layers.Dense(oracle.CLASSES)
        outputs = dense(front(inputs) if front else inputs)
        model = (kind or tf.keras.Model)(inputs, outputs)
        dense.set_weights(oracle.weights())
        model.compile(loss=loss, optimizer=fit_optimizer(world, tf.keras.optimizers.SGD(RATE)), **options)
    return model


PADDING = {"x": distpad.Pad(), "y": distpad.Pad(value=1)}  # a label that Keras's own losses and metrics take


def fed(world, change=lambda dataset: dataset, per_replica=3, **options):
    """Three steps, the last of which is uneven; and the rows of each step in NumPy."""
    data = [{**e, "y": e["y"], "w": np.float32(0.5 + i % 3)} for i, e in enumerate(feeding.examples(40, seed=8))]
    size = per_replica * world.num_replicas
    data = data[: 2 * size + size // 2 + 1]
    sampler = distpad.LengthSampler([len(e["y"]) for e in data], global_batch_size=size, seed=1)
    batches = feeding.made(world, (data, sampler), padding=PADDING, **options)
    dataset, counted = feeding.fed_by(world, batches, STEPS, x="x", y="y")
    steps = [[{**data[i], "w": np.full(len(data[i]["y"]), data[i]["w"])} for i in step] for step in sampler.plan(0)]
    assert len(steps) == STEPS
    return (change(dataset), counted), steps


def expected(steps, average="token", weighted=False):
    kernel, bias = oracle.weights()
    values = []
    for rows in steps:
        value, d_kernel, d_bias = oracle.cross_entropy(rows, kernel, bias, average, weighted)
        kernel, bias = kernel - RATE * d_kernel, bias - RATE * d_bias
        values.append(value)
    return [np.mean(values)], (kernel, bias)


def changed(world, function):
    """A change of a dataset's weights; a DistributedDataset of several workers has no ``map``."""
    if world.kind == "multiworker":
        pytest.skip("a DistributedDataset cannot be changed")
    return lambda dataset: dataset.map(lambda x, y, weights: (x, y, function(weights)))


@pytest.fixture
def ways(monkeypatch):
    """The ways in which the losses of a test averaged."""
    found = set()
    for name in ("_average_globally", "_average_in_fit"):
        original = getattr(distpad.DistributedLoss, name)

        def spied(self, *arguments, name=name, original=original):
            found.add(name + "(counted)" * (name == "_average_globally" and len(arguments) == 6))
            return original(self, *arguments)

        monkeypatch.setattr(distpad.DistributedLoss, name, spied)
    return found


def with_counts(world):
    return {"_average_globally(counted)"} if world.backend.num_workers > 1 else {"_average_in_fit"}


# -- exact, by the counts of the pipeline -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("average", "weighted"),
    [
        ("token", False),
        ("sequence_mean", True),
        pytest.param("token", True, marks=pytest.mark.wide),
        pytest.param("sequence_sum", False, marks=pytest.mark.wide),
        pytest.param(7.5, True, marks=pytest.mark.worlds("local", "mirrored:2", "horovod:2")),
    ],
)
def test_history_and_weights_are_those_of_one_device(world, ways, average, weighted):
    """The numbers of valid positions of the replicas differ, and the loss does not count them in the step."""
    loss = distpad.DistributedLoss(entropy(), average=average)
    model = model_in(world, loss, run_eagerly=True)
    data, steps = fed(world, **({"weights": "w"} if weighted else {}))
    history = feeding.fit(world, model, data)
    feeding.check(model, history, *expected(steps, average, weighted))
    assert ways == with_counts(world)


IS_COLLECTIVE = re.compile(r"Collective(?!Assign)|Horovod\w*(reduce|gather)").match


def graph_of_fit(world, loss, change=lambda dataset: dataset):
    """The graph in which the replicas here take a step."""
    graphs = []

    class Traced(tf.keras.Model):
        def train_step(self, data):
            graphs.append(tf.compat.v1.get_default_graph())
            return super().train_step(data)

    model = model_in(world, loss, kind=Traced, jit_compile=False)
    feeding.fit(world, model, fed(world, change)[0])
    return graphs[-1]


def collectives_of(graph):
    """The types of all collectives; and the operations of the graph that are some, or call functions that hold some."""
    definition = graph.as_graph_def()
    parts = {part.signature.name: part.node_def for part in definition.library.function}
    found = [node.op for nodes in (definition.node, *parts.values()) for node in nodes if IS_COLLECTIVE(node.op)]
    calls = lambda node: {attr.func.name for attr in node.attr.values() if attr.func.name in parts}
    holds = lambda node: bool(IS_COLLECTIVE(node.op)) or any(holds(n) for name in calls(node) for n in parts[name])
    return sorted(found), [graph.get_operation_by_name(node.name) for node in definition.node if holds(node)]


def waiting(graph):
    """The collectives of a graph that wait for another one."""
    _, collectives = collectives_of(graph)
    found = []
    for operation in collectives:
        before, open_ends = set(), [operation]
        while open_ends:
            last = open_ends.pop()
            inputs = {*(tensor.op for tensor in last.inputs), *last.control_inputs} - before
            before |= inputs
            open_ends += inputs
        found += [operation.name] * bool(before & {*collectives})
    return found


@pytest.mark.worlds("mirrored:2")
def test_a_step_of_fit_has_the_collectives_of_a_plain_loss(world):
    """Those of gradients and metrics. With counts of the step, which any change of the weights brings, it has more."""
    assert world.num_replicas == world.backend.replicas_here == 2
    plain, _ = collectives_of(graph_of_fit(world, entropy("sum")))
    ours, _ = collectives_of(graph_of_fit(world, distpad.DistributedLoss(entropy())))
    assert ours == plain and len(plain) >= 2
    change = changed(world, tf.convert_to_tensor)
    counting, _ = collectives_of(graph_of_fit(world, distpad.DistributedLoss(entropy()), change))
    assert len(counting) == len(ours) + 2


@pytest.mark.worlds("multiworker:2", "horovod:2")
def test_gradients_do_not_wait_for_the_collective_of_the_value(world):
    """Each rank of Horovod has a history of its own, which needs the global value; and errors reach all workers."""
    assert world.backend.num_workers == 2
    plain, ours = (graph_of_fit(world, loss) for loss in (entropy("sum"), distpad.DistributedLoss(entropy())))
    assert len(collectives_of(ours)[0]) == len(collectives_of(plain)[0]) + 1
    if world.kind == "horovod":  # TensorFlow orders the collectives of a strategy by control edges
        assert not waiting(ours)
        counting = graph_of_fit(world, distpad.DistributedLoss(entropy()), changed(world, tf.convert_to_tensor))
        assert waiting(counting) and len(collectives_of(counting)[0]) == len(collectives_of(ours)[0])


@pytest.mark.parametrize("fails", ["while traced", pytest.param("in a step", marks=pytest.mark.wide)])
@pytest.mark.worlds("multiworker:2", "horovod:2")
def test_an_error_of_the_loss_on_one_worker_ends_the_step_on_all(world, monkeypatch, fails):
    """Also where the counts are known, so that no gradient waits for the loss of another worker."""
    assert world.backend.num_workers == 2

    def loss(y_true, y_pred):
        if world.backend.worker_index == 1 and fails == "while traced":
            raise ValueError("a loss that fails on worker 1")
        return entropy()(y_true, y_pred)

    def check(self, sums):
        return Check("a count that fails on worker 1", sums.tokens, sums.tokens * world.backend.worker_index <= 0)

    if fails == "in a step":
        monkeypatch.setattr(CountedWeights, "check", check)
    model = model_in(world, distpad.DistributedLoss(loss))
    started = time.monotonic()
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="fails on worker 1"):
        feeding.fit(world, model, fed(world)[0])
    assert time.monotonic() - started < 8  # TensorFlow takes 10 s to miss a worker that has ended


@pytest.mark.parametrize(
    "options", [{"jit_compile": True}, {"steps_per_execution": 2}], ids=lambda options: next(iter(options))
)
@pytest.mark.worlds("local")
def test_compiled_and_several_steps_at_once(world, options):
    if world.kind != "local":
        pytest.skip("Keras or TensorFlow cannot do this with several replicas on a CPU")
    model = model_in(world, distpad.DistributedLoss(entropy()), **options)
    data, steps = fed(world)
    feeding.check(model, feeding.fit(world, model, data), *expected(steps))


# -- counted in the step, where the counts are not those of the loss --------------------------------------------------


@pytest.mark.parametrize("case", ["changed weights", "Keras's mask", "padding value"])
def test_other_weights_and_masks_are_counted_in_the_step(world, ways, case):
    loss, front, change = distpad.DistributedLoss(entropy()), None, lambda dataset: dataset
    if case == "changed weights":
        change = changed(
            world, lambda weights: weights * tf.range(1.0, 1.0 + tf.cast(tf.shape(weights)[1], tf.float32))
        )
    elif case == "Keras's mask":
        front = tf.keras.layers.Masking(mask_value=2.0)
    else:
        loss = distpad.DistributedLoss(entropy(), padding_value=1)
    model = model_in(world, loss, front, run_eagerly=True)
    data, steps = fed(world, change)
    for row in (row for rows in steps for row in rows):
        if case == "changed weights":
            row["w"] = 1.0 + np.arange(len(row["y"]))
        else:
            row["w"] = np.where(row["y"] == 1, 0, 1) if case == "padding value" else np.ones(len(row["y"]))
    history = feeding.fit(world, model, data)
    feeding.check(model, history, *expected(steps, weighted=True))
    assert ways == {"_average_globally"}


@pytest.mark.worlds("local", "mirrored:2")
def test_rows_of_other_batches_are_refused(world):
    """Batches that are cut and joined again hold rows of several steps, or fewer rows than were counted."""
    if world.kind == "multiworker":
        pytest.skip("a DistributedDataset cannot be changed")
    half = lambda batch: tf.nest.map_structure(
        lambda leaf: leaf[: tf.shape(leaf)[0] // 3 * 2], batch, expand_composites=True
    )
    size = 3 * world.backend.replicas_here
    changes = [
        lambda dataset: dataset.map(lambda *batch: half(batch)),
        lambda dataset: dataset.unbatch().skip(1).batch(size, drop_remainder=True),
    ]
    for change in changes:
        model = model_in(world, distpad.DistributedLoss(entropy()), run_eagerly=True)
        with pytest.raises((ValueError, tf.errors.OpError), match="sample_weight counts other positions"):
            feeding.fit(world, model, fed(world, change, buckets=distpad.Buckets([8]))[0])


# -- a tensor for everything else -------------------------------------------------------------------------------------


@pytest.mark.worlds("mirrored:2", "multiworker:2")
def test_weights_are_a_tensor_for_metrics_losses_and_train_steps(world):
    """Keras's own loss and metrics give what they give with plain weights; so does arithmetic in a train_step."""
    results = []
    for plain in (False, True):
        if plain and world.kind == "multiworker":
            continue
        seen = []

        class Own(tf.keras.Model):
            def train_step(self, data, seen=seen):
                _, y, weights = data
                assert tf.reduce_sum(weights * 2).shape == (weights + 1)[0, 0].shape == ()
                assert tf.convert_to_tensor(weights).dtype == weights.dtype == tf.float32
                assert weights.shape.as_list() == y.shape.as_list() and weights.ndim == 2
                seen.append(type(weights).__name__)
                return super().train_step(data)

        names = {
            "weighted_metrics": [
                "accuracy",
                tf.keras.metrics.MeanMetricWrapper(
                    tf.keras.losses.sparse_categorical_crossentropy, name="own", from_logits=True
                ),
            ]
        }
        model = model_in(world, entropy("sum"), kind=Own, metrics=["accuracy"], **names)
        data, _ = fed(world, changed(world, tf.convert_to_tensor) if plain else lambda dataset: dataset)
        results.append(feeding.fit(world, model, data).history)
        assert {*seen} != {"CountedWeights"} if plain else {*seen} == {"CountedWeights"}
    assert all(np.isfinite(values).all() for values in results[0].values())
    for name in results[-1]:
        np.testing.assert_allclose(results[0][name], results[-1][name], rtol=1e-6)


@pytest.mark.core  # of which the suite of one device runs all
@pytest.mark.worlds("local")
def test_weights_as_a_tensor():
    values = np.array([[1.0, 0.25], [3.0, 0.0]], np.float32)
    weights = CountedWeights(values, np.ones([2, 5]), {"y": [2, 1]}, {}, 1, tf.float32)
    assert weights.shape == (2, 2) and weights.dtype == tf.float32 and len(weights) == 2 and weights.ndim == 2
    np.testing.assert_array_equal(weights.numpy(), values)
    np.testing.assert_array_equal(np.asarray(weights), values)
    np.testing.assert_array_equal((2 * weights + tf.ones([2, 2]) / weights[0])[0], 2 * values[0] + 1 / values[0])
    np.testing.assert_array_equal(tf.where(weights > 0.5, 1, 0), values > 0.5)
    np.testing.assert_array_equal([*weights], values)
    half = tf.cast(weights, tf.float16)
    assert half.dtype == tf.float16 and (half * tf.ones([], tf.float16)).dtype == tf.float16
    assert half.values.dtype == tf.float32 and isinstance(tf.cast(half, tf.float32), CountedWeights)
    assert not any(isinstance(each, CountedWeights) for each in (weights * 1, tf.abs(weights), weights[:1]))
    rows = [row.numpy().tolist() for row in tf.data.Dataset.from_tensors(weights).unbatch()]
    assert rows == values.tolist()


@pytest.mark.core  # of which the suite of one device runs all
@pytest.mark.worlds("local")
def test_counts_of_other_rows_in_a_graph(world):
    """An error, and inside XLA, which drops assertions, NaN: never the mean of other rows."""
    if world.num_replicas > 1:
        pytest.skip("one device shows it")
    loss = distpad.DistributedLoss(entropy())
    y_true, y_pred = tf.constant([[1, 2], [3, 0]]), tf.constant(np.random.default_rng(0).normal(size=[2, 2, 4]))

    def step(rows):
        counts = tf.repeat(tf.constant([[3.0, 2, 3, 2]], tf.float64), 2, axis=0)
        counts = tf.concat([counts, tf.fill([2, 1], tf.cast(rows, tf.float64))], axis=1)
        with tf.GradientTape() as tape:
            tape.watch(y_pred)
            value = loss(y_true, y_pred, CountedWeights(tf.constant([[1.0, 1], [1, 0]]), counts, {}, {}, 1, tf.float32))
        return value, tape.gradient(value, y_pred)

    wanted = loss(y_true, y_pred, lengths=[2, 1])
    for compiled in (False, True):
        traced = tf.function(step, jit_compile=compiled)
        np.testing.assert_allclose(traced(tf.constant(2))[0], wanted, rtol=1e-6)
        if compiled:
            assert all(np.isnan(part).all() for part in traced(tf.constant(3)))
        else:
            with pytest.raises(tf.errors.InvalidArgumentError, match="sample_weight counts other positions"):
                traced(tf.constant(3))
