"""distpad.gather with indices: the predictions of an epoch in data set order, on every worker."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2", "horovod:3", "mpirun:2")

LENGTHS = [3, 0, 5, 1, 2, 7, 1, 4, 0, 2, 6]


def example(i):
    """Return the labels of an example, some of which equal the padding value."""
    return {"text": np.arange(LENGTHS[i], dtype=np.int32) * (i + 1)}


def predict(batch):
    """Return predictions of each kind: integers, scalars, vectors with the length on axis -2 or -1, bfloat16."""
    text = batch.data["text"]
    real = tf.sequence_mask(batch.lengths["text"], tf.shape(text)[1])
    ids = tf.where(real, text + 1, -77)
    return {
        "ids": ids,
        "score": tf.reduce_sum(tf.where(real, text, 0), axis=1),
        "across": tf.stack([tf.cast(ids, tf.float64), tf.cast(ids, tf.float64) / 3], axis=1),
        "along": tf.cast(tf.stack([ids, -ids], axis=2), tf.bfloat16),
        "real": real,
    }


AXES = {"ids": 1, "score": 1, "across": 2, "along": 1, "real": 1}
VALUES = {"ids": -1, "score": 0, "across": 0.5, "along": 2, "real": True}


def expected(order):
    """Return the expected result for these example indices in this order, element by element."""
    longest = max(LENGTHS[i] for i in order)
    columns = {
        "ids": np.full([len(order), longest], -1, np.int32),
        "score": np.zeros([len(order)], np.int32),
        "across": np.full([len(order), 2, longest], 0.5),
        "along": np.full([len(order), longest, 2], 2.0),
        "real": np.ones([len(order), longest], bool),
    }
    for row, i in enumerate(order):
        for j in range(LENGTHS[i]):
            label = j * (i + 1)
            columns["ids"][row, j] = label + 1
            columns["score"][row] += label
            columns["across"][row, :, j] = [label + 1, (label + 1) / 3]
            columns["along"][row, j] = [label + 1, -(label + 1)]
    return columns


def of_epoch(world, batches):
    """Return the lists that an evaluation loop keeps, with one item a step."""
    steps, lengths, indices = [], [], []
    for batch in batches:
        steps.append(world.strategy.run(predict, args=(batch,)) if world.strategy else predict(batch))
        lengths.append(batch.lengths["text"])
        indices.append(batch.indices)
    return steps, lengths, indices


def check(gathered, order):
    for name, wanted in expected(order).items():
        values, lengths, mask = (part[name].numpy() for part in gathered)
        assert values.dtype == (tf.bfloat16.as_numpy_dtype if name == "along" else wanted.dtype)
        np.testing.assert_array_equal(values.astype(wanted.dtype), wanted)
        counts = [1] * len(order) if name == "score" else [LENGTHS[i] for i in order]
        assert lengths.tolist() == counts and lengths.dtype == np.int32
        if name == "score":
            assert mask.tolist() == [True] * len(order)
        else:
            assert mask.shape == values.shape[: AXES[name] + 1]
            np.testing.assert_array_equal(mask.reshape([len(order), -1, mask.shape[-1]]).sum(axis=2).T[0], counts)


@pytest.mark.core
def test_a_sampler_s_order_is_undone(world):
    sampler = distpad.LengthSampler(LENGTHS, global_batch_size=2 * world.num_replicas, seed=3)
    batches = distpad.PaddedBatches(
        ([example(i) for i in range(len(LENGTHS))], sampler),
        padding={"text": distpad.Pad()},
        tokens="text",
        backend=world.backend,
    )
    for _ in range(2):  # two epochs of different order
        steps, lengths, indices = of_epoch(world, batches)
        assert len(steps) == len(indices) >= 1
        gathered = distpad.gather(
            steps, lengths=lengths, indices=indices, axis=AXES, value=VALUES, backend=world.backend
        )
        check(gathered, range(len(LENGTHS)))


@pytest.mark.parametrize("empty", [False, True])
def test_shards_return_to_data_set_order(world, empty):
    """Examples that ``shard`` dealt return to their order; a worker may have no example."""
    workers, mine = world.backend.num_workers, world.backend.worker_index
    dealt = max(1, workers - 1) if empty else workers
    numbers = range(len(LENGTHS))[mine::dealt] if mine < dealt else []
    batches = distpad.PaddedBatches(
        [example(i) for i in numbers],
        batch_size=2,
        padding={"text": distpad.Pad()},
        tokens="text",
        backend=world.backend,
    )
    steps, lengths, indices = of_epoch(world, batches)
    gathered = distpad.gather(steps, lengths=lengths, indices=indices, axis=AXES, value=VALUES, backend=world.backend)
    check(gathered, range(len(LENGTHS)))


def test_without_lengths_each_row_is_valid_as_a_whole(world):
    """Steps differ in length; rows are dealt to replicas in reverse, with filler rows between them."""

    def step(number):
        def given(replica):
            place = 2 * (world.num_replicas - 1 - replica) + number
            return {"x": np.full([2, 1 + number], place), "at": np.array([-1, place])}

        kept = []
        each = world.run(lambda batch: batch, given, graph=False)
        for replica in sorted(each):
            kept.append(each[replica])
        if world.strategy is None:
            return kept[0]
        queue = iter(kept)
        values = world.strategy.experimental_distribute_values_from_function(
            lambda _: tf.nest.map_structure(tf.constant, next(queue))
        )
        return values

    steps = [step(number) for number in (0, 1)]
    gathered = distpad.gather(
        [each["x"] for each in steps], indices=[each["at"] for each in steps], value=-5, backend=world.backend
    )
    wanted = [[place, place if place % 2 else -5] for place in range(2 * world.num_replicas)]
    assert gathered.values.numpy().tolist() == wanted
    assert gathered.lengths.numpy().tolist() == [1, 2] * world.num_replicas


def test_a_nest_with_lengths_of_one_tensor_alone(world):
    """None in a nest of lengths applies to all replicas."""
    rows = lambda r: {"ids": np.full([1, 2], r), "score": np.full([1, 2], -r), "lengths": np.array([1]), "at": [r]}
    step = world.backend.graph(lambda batch: batch)(rows)
    if world.strategy is None:
        (step,) = step
    else:
        queue = iter(step)
        step = world.strategy.experimental_distribute_values_from_function(
            lambda _: tf.nest.map_structure(tf.identity, next(queue))
        )
    gathered = distpad.gather(
        [{"ids": step["ids"], "score": step["score"]}],
        lengths=[{"ids": step["lengths"], "score": None}],
        indices=[step["at"]],
        value=9,
        backend=world.backend,
    )
    every = range(world.num_replicas)
    assert gathered.values["ids"].numpy().tolist() == [[r] for r in every]
    assert gathered.values["score"].numpy().tolist() == [[-r, -r] for r in every]


def test_values_of_one_replica_beside_those_of_several(world):
    if world.strategy is None or world.backend.replicas_here == 1:
        pytest.skip("needs several replicas in one process")
    step = world.strategy.experimental_distribute_values_from_function(lambda _: tf.ones([1, 1]))
    with pytest.raises(ValueError, match="tensors, lengths and indices is of 2, 2 and 1 replicas, expected of as many"):
        distpad.gather([step], indices=[tf.constant([0])], backend=world.backend)


WRONG = {
    "no step": ({"tensors": [], "indices": []}, "number of tensors is 0, expected at least one"),
    "twice": ({"tensors": [np.ones([2, 1])], "indices": [[0, 0]]}, "indices is 0 in several rows of worker 0"),
    "rows": ({"tensors": [np.ones([2, 1])], "indices": [[0]]}, r"shape of tensors is \(2, 1\)"),
    "lengths": ({"tensors": [np.ones([1, 1])], "indices": [[0]], "lengths": [[2]]}, r"lengths of tensors is \[2\]"),
    "dtype of indices": ({"tensors": [np.ones([1, 1])], "indices": [[0.5]]}, "integers"),
    "text": ({"tensors": [np.array([["a"]])], "indices": [[0]], "value": ""}, "is string, expected numbers"),
    "no list": ({"tensors": np.ones([1, 1]), "indices": [[0]]}, "tensors is a ndarray"),
    "steps": ({"tensors": [np.ones([1, 1])] * 2, "indices": [[0]]}, "number of indices is 1, expected 2"),
    "axis": ({"tensors": [np.ones([1, 1])], "indices": [[0]], "axis": 2}, "axis of tensors is 2, expected 1 to 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_of_one_worker_is_raised_on_all(world, case):
    wrong, message = WRONG[case]
    fine = {"tensors": [np.ones([1, 1])], "indices": [[7]]}
    if world.strategy is not None and len(world.strategy.extended.worker_devices) > 1:
        pytest.skip("one replica a worker is enough")
    mine = dict(wrong if world.backend.worker_index == 0 else fine)
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        distpad.gather(mine.pop("tensors"), **mine, backend=world.backend)
    assert str(raised.value).startswith("gather: ")
    assert world.backend.worker_index == 0 or "worker 0 refused" in str(raised.value)


def test_values_of_a_strategy_that_is_not_in_scope(world):
    if world.kind != "mirrored" or world.num_replicas == 1:
        pytest.skip("needs values of several replicas in one process")
    step = world.strategy.experimental_distribute_values_from_function(lambda _: tf.ones([1, 1]))
    with pytest.raises(ValueError, match=r"no strategy is in scope. Write backend=strategy"):
        distpad.gather([step], indices=[step])
    with world.strategy.scope():
        at = world.strategy.experimental_distribute_values_from_function(lambda c: [c.replica_id_in_sync_group])
        assert len(distpad.gather([step], indices=[at]).values) == world.num_replicas


def test_dtypes_that_differ(world):
    if not world.several_workers:
        pytest.skip("needs several workers")
    mine = world.backend.worker_index
    with pytest.raises(ValueError, match=r"dtypes and inner axes of tensors is .* on worker 1, expected"):
        distpad.gather([np.ones([1, 1], ["f4", "f8"][mine == 1])], indices=[[mine]], backend=world.backend)
