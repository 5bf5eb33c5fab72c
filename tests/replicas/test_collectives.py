"""pad_to_global_max and gather: one length on all replicas, one all-reduce of lengths, all rows kept."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
from replica_world import counting


def batch_of(replica, *, empty=None):
    """Return three tensors of a replica, ragged on different axes; replica ``empty`` has no rows and length 0."""
    random = np.random.default_rng([11, replica])
    rows, length = 1 + replica, 2 + 3 * (replica % 3)
    if replica == empty:
        rows = length = 0
    return {
        "label": random.integers(1, 9, size=[rows, length]).astype("int32"),
        "image": random.normal(size=[rows, 2, length + 1]).astype("float32"),
        "flag": random.integers(0, 2, size=[rows, length, 2]).astype(bool),
        "lengths": random.integers(0, length + 1, size=[rows]).astype("int64"),
    }


AXES = {"label": 1, "image": 2, "flag": -2}
VALUES = {"label": -1, "image": 0.5, "flag": True}


def nest(batch):
    return {name: batch[name] for name in AXES}


CASES = [  # whether in a graph, and which replica is empty
    (True, None),
    pytest.param(True, 0, marks=pytest.mark.wide),
    (False, None),
    pytest.param(False, 0, marks=pytest.mark.core),
]


@pytest.mark.parametrize(("graph", "empty"), CASES)
def test_pad_to_global_max(world, graph, empty):
    def step(batch):
        return distpad.pad_to_global_max(
            nest(batch), axis=AXES, value=VALUES, lengths={"label": batch["lengths"], "image": None, "flag": None},
            backend=world.backend,
        )  # fmt: skip

    results = world.run(step, lambda r: batch_of(r, empty=empty), graph=graph)
    every = [batch_of(r, empty=empty) for r in range(world.num_replicas)]
    for replica, (values, lengths, mask) in results.items():
        mine = every[replica]
        for name, axis in AXES.items():
            longest = max(batch[name].shape[axis] for batch in every)
            assert values[name].shape[axis] == longest, name
            own = mine[name].shape[axis]
            there, beyond = np.split(values[name], [own], axis=axis)
            np.testing.assert_array_equal(there, mine[name])
            assert np.all(beyond == VALUES[name])
            expected = mine["lengths"] if name == "label" else np.full(len(mine[name]), own)
            np.testing.assert_array_equal(lengths[name], expected)
            assert lengths[name].dtype == np.int32
            at = axis % mine[name].ndim
            assert mask[name].shape == values[name].shape[: at + 1]
            np.testing.assert_array_equal(mask[name].sum(axis=-1), np.broadcast_to(
                lengths[name].reshape([-1] + [1] * (at - 1)), mask[name].shape[:-1]))  # fmt: skip


def test_buckets_round_the_global_length(world):
    buckets = distpad.Buckets([5, 16, 20])
    longest = max(batch_of(r)["label"].shape[1] for r in range(world.num_replicas))
    for graph in (True, False):
        step = lambda batch: distpad.pad_to_global_max(batch["label"], buckets=buckets, backend=world.backend).values
        for values in world.run(step, batch_of, graph=graph).values():
            assert values.shape[1] == buckets(longest)
        step = lambda batch: (
            distpad.pad_to_global_max(
                batch["label"], buckets=distpad.Buckets.multiples(4), backend=world.backend
            ).values
        )
        for values in world.run(step, batch_of, graph=graph).values():
            assert values.shape[1] == -(-longest // 4) * 4


def test_a_length_above_the_last_boundary_raises_on_all(world):
    step = lambda batch: distpad.pad_to_global_max(batch["label"], buckets=distpad.Buckets([1]), backend=world.backend)
    with pytest.raises(ValueError, match="above the last boundary"):
        world.run(step, batch_of, graph=False)


def test_one_all_reduce_for_any_number_of_tensors(world):
    """Collectives are counted in the traced graph under strategies, in the backend under Horovod."""
    if world.strategy is not None:
        given = world.strategy.experimental_distribute_values_from_function(
            lambda context: nest(batch_of(context.replica_id_in_sync_group))
        )

        @tf.function
        def step(values):
            return world.strategy.run(
                lambda batch: distpad.pad_to_global_max(batch, axis=AXES, backend=world.backend), args=(values,)
            )

        graph = step.get_concrete_function(given).graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        collectives = [node.op for node in nodes if "Collective" in node.op and "Assign" not in node.op]
        local = len(world.strategy.extended.worker_devices)
        reduces = [op for op in collectives if "Reduce" in op]
        assert len(reduces) == (0 if world.num_replicas == 1 else local), collectives
        assert not [op for op in collectives if "Gather" in op]
        return
    counted = counting(world.backend)
    distpad.pad_to_global_max(nest(batch_of(world.backend.worker_index)), axis=AXES, backend=counted)
    assert counted.calls == (0 if world.num_replicas == 1 else 1)


@pytest.mark.parametrize(("graph", "empty"), CASES)
def test_gather_gives_all_rows_in_replica_order(world, graph, empty):
    def step(batch):
        return distpad.gather(
            nest(batch), axis=AXES, value=VALUES, lengths={"label": batch["lengths"], "image": None, "flag": None},
            backend=world.backend,
        )  # fmt: skip

    results = world.run(step, lambda r: batch_of(r, empty=empty), graph=graph)
    every = [batch_of(r, empty=empty) for r in range(world.num_replicas)]
    for values, lengths, mask in results.values():
        np.testing.assert_array_equal(lengths["label"], np.concatenate([batch["lengths"] for batch in every]))
        assert mask["label"].sum() == lengths["label"].sum()
        for name, axis in AXES.items():
            longest = max(batch[name].shape[axis] for batch in every)
            at = 0
            for batch in every:
                rows = values[name][at : at + len(batch[name])]
                there, beyond = np.split(rows, [batch[name].shape[axis]], axis=axis)
                np.testing.assert_array_equal(there, batch[name])
                assert np.all(beyond == VALUES[name]) and rows.shape[axis] == longest
                at += len(batch[name])
            assert at == len(values[name])


def test_gather_drops_filler_rows(world):
    step = lambda batch: distpad.gather(batch["label"], rows=1, backend=world.backend)
    for values, lengths, _ in world.run(step, batch_of, graph=False).values():
        assert len(values) == len(lengths) == world.num_replicas
        for replica, row in enumerate(values):
            mine = batch_of(replica)["label"][0]
            np.testing.assert_array_equal(row[: len(mine)], mine)
    step = lambda rows: distpad.gather(rows, rows=1, backend=world.backend).values
    for values in world.run(step, lambda r: 10 * r + np.arange(3)[:, None], graph=False).values():
        assert values[:, 0].tolist() == [10 * r for r in range(world.num_replicas)]


@pytest.mark.wide  # the default tests are in test_gather_dtypes
def test_gather_of_every_dtype(world):
    for dtype in ("uint8", "int8", "int64", "float16", "float64", "bfloat16", "bool"):
        step = lambda batch, dtype=dtype: distpad.gather(tf.cast(batch, dtype), backend=world.backend).values
        for values in world.run(step, lambda r: np.full([1, 2], r % 2, np.int32), graph=False).values():
            assert values.dtype == tf.as_dtype(dtype).as_numpy_dtype
            np.testing.assert_array_equal(values[:, 0].astype("int32"), np.arange(world.num_replicas) % 2)


def test_negative_axes(world):
    padded = world.run(
        lambda x: tuple(distpad.gather(x, axis=-1, lengths=[1, 2], backend=world.backend)),
        lambda r: np.full([2, 2 + r], r),
        graph=False,
    )
    for values, lengths, mask in padded.values():
        assert values.shape == (2 * world.num_replicas, world.num_replicas + 1) == mask.shape
        assert lengths.tolist() == [1, 2] * world.num_replicas and mask.sum() == 3 * world.num_replicas


def test_lengths_are_a_nest_like_the_tensors(world):
    x = np.ones([2, 3])
    call = lambda x: tuple(
        distpad.pad_to_global_max((x, [x]), lengths=([2, 1], [[3, 3]]), backend=world.backend).lengths
    )
    for first, (second,) in world.run(call, lambda r: x, graph=False).values():
        assert first.tolist() == [2, 1] and second.tolist() == [3, 3]
