"""GradientAccumulator: a step of several micro-batches equals one step of one device with all their rows."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle
from replica_world import alone, collectives_of

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

LIMIT = {"float64": 1e-12, "float32": 1e-5}
SCENARIOS = ("uneven", "empty replica", "padding replica")  # of the first, second and third micro-batch


def rows_of(world, replica, micro):
    return oracle.rows_of(replica, SCENARIOS[micro], world.num_replicas, micro)


def everything(world, micros):
    return [row for m in range(micros) for r in range(world.num_replicas) for row in rows_of(world, r, m)]


def count_of(rows, average):
    return float(sum(len(row["y"]) if average == "token" else len(row["y"]) > 0 for row in rows))


@pytest.fixture(params=["float64", pytest.param("float32", marks=pytest.mark.wide)])
def linear(world, request):
    """Make a linear model, and a function that adds one micro-batch to an accumulator."""
    with world.scope():
        variables = [tf.Variable(value, dtype=request.param) for value in oracle.weights()]

    def adding(accumulator, average, **options):
        loss_fn = distpad.DistributedLoss(
            tf.nn.sparse_softmax_cross_entropy_with_logits, average=average, backend=world.backend
        )

        def add(batch):
            with tf.GradientTape() as tape:
                logits = batch["x"] @ variables[0] + variables[1]
                loss = loss_fn(batch["y"], logits, lengths=batch["lengths"], **{"denominator": 1, **options})
            accumulator.add(tape, loss, **({} if options else {"count": batch["count"]}))
            return loss

        return add

    return variables, adding, request.param


@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=pytest.mark.wide)])
@pytest.mark.parametrize(("micros", "average"), [(1, "token"), (2, "sequence_sum"), (3, "sequence_mean")])
@pytest.mark.parametrize("way", ["denominator", "counts"])
def test_micro_batches_are_one_big_batch(world, linear, average, micros, way, graph):
    """Two steps, each with all micro-batches in one function; the denominator is given, or the counts are added."""
    variables, adding, dtype = linear
    rows = everything(world, micros)
    accumulator = distpad.GradientAccumulator(variables, backend=world.backend)
    add = adding(accumulator, average, **({"denominator": count_of(rows, average)} if way == "denominator" else {}))

    def step(batches):
        for batch in batches:
            add(batch)
        return world.reduce(accumulator.take())

    def given(r):
        micro = [rows_of(world, r, m) for m in range(micros)]
        return [{**oracle.padded(held, dtype), "count": np.float64(count_of(held, average))} for held in micro]

    _, *expected = oracle.cross_entropy(rows, *oracle.weights(), average, False)
    for results in (world.run(step, given, graph=graph), world.run(step, given, graph=graph)):
        assert results
        for found in results.values():
            assert max(map(oracle.relative_error, found, expected)) <= LIMIT[dtype]


@pytest.mark.parametrize(
    "graph", [pytest.param(True, marks=pytest.mark.worlds("mirrored:2")), pytest.param(False, marks=pytest.mark.core)]
)
def test_a_function_for_each_micro_batch(world, linear, graph):
    """One call adds one micro-batch, another one takes; ``reset`` clears an abandoned step."""
    variables, adding, dtype = linear
    accumulator = distpad.GradientAccumulator(variables, backend=world.backend)
    add = adding(accumulator, "token")

    def given(m):
        return lambda r: {
            **oracle.padded(rows_of(world, r, m), dtype),
            "count": np.float64(count_of(rows_of(world, r, m), "token")),
        }

    take = lambda _: world.reduce(accumulator.take())
    world.run(add, given(1), graph=graph)
    accumulator.reset()
    for micros in (3, 2):
        for m in range(micros):
            world.run(add, given(m), graph=graph)
        results = world.run(take, lambda r: np.zeros([]), graph=graph)
        _, *expected = oracle.cross_entropy(everything(world, micros), *oracle.weights(), "token", False)
        for found in results.values():
            assert max(map(oracle.relative_error, found, expected)) <= LIMIT[dtype]


@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_sparse_gradients_stay_sparse(world, graph):
    """The rows of all micro-batches stay, on some replicas more rows; None stays None."""
    table = np.random.default_rng(1).normal(size=[6, 3])
    with world.scope():
        embedding, unused, scalar = tf.Variable(table), tf.Variable([1.0]), tf.Variable(2.0, dtype=tf.float64)
    variables = [embedding, unused, scalar]
    accumulator = distpad.GradientAccumulator(variables, backend=world.backend)
    loss_fn = distpad.DistributedLoss(lambda t, p: tf.reduce_sum(p**2, -1), backend=world.backend)
    ids = lambda r, m: np.array([[r % 6, 1, 1, (m + r) % 6][: 2 + m + r % 2]])
    seen = []

    def add(given):
        with tf.GradientTape() as tape:
            loss = loss_fn(given, tf.nn.embedding_lookup(embedding, given) * scalar, denominator=1)
        accumulator.add(tape, loss, count=tf.size(given))
        return loss

    def take(_):
        sparse, none, dense = accumulator.take()
        seen.append((isinstance(sparse, tf.IndexedSlices), none))
        return [tf.shape(sparse.values)[0], *world.reduce([tf.convert_to_tensor(sparse), dense])]

    for micros in (2, 1):
        every = [ids(r, m).ravel() for m in range(micros) for r in range(world.num_replicas)]
        for m in range(micros):
            world.run(add, lambda r, m=m: ids(r, m), graph=graph)
        flat = np.concatenate(every)
        expected = np.zeros_like(table)
        np.add.at(expected, flat, 2 * table[flat] * 4 / len(flat))
        for r, (rows, d_table, d_scalar) in world.run(take, lambda r: np.zeros([]), graph=graph).items():
            own = sum(ids(r, m).size for m in range(micros))
            assert rows == (own if world.strategy is not None else len(flat))
            assert oracle.relative_error(d_table, expected) <= 1e-12
            assert oracle.relative_error(d_scalar, (2 * table[flat] ** 2 * 2).sum() / len(flat)) <= 1e-12
    assert seen and all(sparse and none is None for sparse, none in seen)


def test_a_table_used_by_rows_and_as_a_whole(world):
    with world.scope():
        table = tf.Variable(np.ones([3, 2]))
    for first in (0, 1):
        accumulator = distpad.GradientAccumulator([table], backend=world.backend)

        def step(ids, accumulator=accumulator, first=first):
            for kind in (first, 1 - first):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_sum(tf.gather(table, ids) if kind == 0 else 3 * table)
                accumulator.add(tape, loss)
            return tf.convert_to_tensor(accumulator.take()[0])

        for found in world.run(step, lambda r: np.array([1, 1]), graph=False).values():
            np.testing.assert_array_equal(found, [[3, 3], [5, 5], [3, 3]])


@pytest.mark.worlds("mirrored:2")
def test_reduced_once_a_step(world, linear):
    """Three micro-batches make as many collectives in the traced graph as one batch with ``distpad.gradient``."""
    variables, adding, dtype = linear
    accumulator = distpad.GradientAccumulator(variables, backend=world.backend)
    add = adding(accumulator, "token", denominator=7.0)
    loss_fn = distpad.DistributedLoss(tf.nn.sparse_softmax_cross_entropy_with_logits, backend=world.backend)

    def accumulated(batch):
        for _ in range(3):
            add(batch)
        return world.reduce(accumulator.take())

    def plain(batch):
        with tf.GradientTape() as tape:
            logits = batch["x"] @ variables[0] + variables[1]
            loss = loss_fn(batch["y"], logits, lengths=batch["lengths"], denominator=7.0)
        return world.reduce(distpad.gradient(tape, loss, variables, backend=world.backend))

    given = lambda r: oracle.padded(rows_of(world, r, 0), dtype)
    expected = collectives_of(world, plain, given)
    assert bool(expected) == (world.num_replicas > 1)
    assert collectives_of(world, accumulated, given) == expected
    assert collectives_of(world, add, given) == []


def test_sums_in_float32_at_least(world):
    """2048 + 1 + 1 is 2048 in float16; a sum that float16 cannot hold is divided before the cast."""
    with world.scope():
        half = tf.Variable([0.0, 0.0], dtype=tf.float16)
    accumulator = distpad.GradientAccumulator([half], backend=world.backend)

    def step(factors):
        for factor in tf.unstack(factors):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(half * factor)
            accumulator.add(tape, loss, count=1)
        return accumulator.take()

    for factors, expected in [([2048, 1, 1, 0], 512.5), ([60000, 60000], 60000)]:
        for (found,) in world.run(step, lambda r, factors=factors: np.array(factors, "float16"), graph=False).values():
            assert found.dtype == np.float16
            assert found.tolist() == [np.float16(expected / world.num_replicas)] * 2


def test_counts_of_nothing_give_zeros(world):
    with world.scope():
        w = tf.Variable([1.0])
    accumulator = distpad.GradientAccumulator([w], backend=world.backend)

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(w * x)
        accumulator.add(tape, loss, count=0)
        return accumulator.take()

    for (found,) in world.run(step, lambda r: np.zeros([1], "float32"), graph=False).values():
        assert found.tolist() == [0.0]


@alone
def test_wrong_use_is_refused():
    w = tf.Variable([1.0])
    with pytest.raises(TypeError, match=r"variables is .*, expected a list of variables"):
        distpad.GradientAccumulator(w)
    accumulator = distpad.GradientAccumulator([w], backend="local")
    with pytest.raises(ValueError, match="nothing was added"):
        accumulator.take()
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_sum(w * 2)
    with pytest.raises(ValueError, match=r"count is .*, expected a scalar"):
        accumulator.add(tape, loss, count=[1, 2])
    with pytest.raises(TypeError, match=r"GradientAccumulator\.add: tape is None"):
        accumulator.add(None, loss)
    accumulator.add(tape, loss, count=2)
    with pytest.raises(ValueError, match="count is missing, expected with all micro-batches, or with none"):
        accumulator.add(tape, loss)
    assert accumulator.take()[0].numpy().tolist() == [1.0]
