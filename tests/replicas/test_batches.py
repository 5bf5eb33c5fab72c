"""PaddedBatches in every engine: each replica's batches, compared with the examples of all workers."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tensorflow as tf

import distpad

SIZE = 3
PADDING = {"x": distpad.Pad(value=-5.0), "y": distpad.Pad(value=9)}


def examples_of(worker: int, count: int, seed: int = 0) -> list[dict]:
    random = np.random.default_rng([seed, worker])
    sizes = [(int(random.integers(1, 9)), int(random.integers(0, 7))) for _ in range(count)]
    return [
        {"x": random.normal(size=[n, 2]).astype(np.float32), "y": np.arange(m) + 1, "id": np.int64(1000 * worker + i)}
        for i, (n, m) in enumerate(sizes)
    ]


def counts_of(scenario: str, workers: int) -> list[int]:
    """The number of examples on each worker."""
    last = workers - 1
    return {
        "even": [12] * workers,
        "uneven": [5 + 6 * w for w in range(workers)],
        "none on the last": [7 if w < last or not last else 0 for w in range(workers)],
        "nothing": [0] * workers,
    }[scenario]


def made(world, source, *args, **options):
    return distpad.PaddedBatches(
        source, *args, backend=world.backend, **{"padding": PADDING, "tokens": "y", "buckets": None, **options}
    )


def mine(world, batch: distpad.Batch) -> list[distpad.Batch]:
    """The batch of each replica of this worker, in NumPy."""
    if world.strategy is None:
        return [tf.nest.map_structure(lambda leaf: leaf.numpy(), batch)]
    columns = [world.strategy.experimental_local_results(leaf) for leaf in tf.nest.flatten(batch)]
    return [
        tf.nest.map_structure(lambda leaf: leaf.numpy(), tf.nest.pack_sequence_as(batch, list(row)))
        for row in zip(*columns)
    ]


def epoch_of(world, batches) -> list[list[distpad.Batch]]:
    return [mine(world, batch) for batch in batches]


def seen(epoch: list[list[distpad.Batch]]) -> list[int]:
    return [int(i) for step in epoch for batch in step for i in batch.data["id"][: batch.rows]]


def held(world, scenario) -> list[list[dict]]:
    return [examples_of(w, count) for w, count in enumerate(counts_of(scenario, world.backend.num_workers))]


CORE, WIDE = pytest.mark.core, pytest.mark.wide
EPOCHS = {  # by scenario and lookahead
    ("even", 2): {"list": ()},
    ("uneven", 1): {"list": ()},
    ("uneven", 2): {"dataset": CORE},
    ("uneven", 32): {"list": CORE},
    ("none on the last", 2): {"list": CORE},
    ("none on the last", 32): {"dataset": ()},
    ("nothing", 1): {"list": ()},
}


@pytest.mark.parametrize(
    ("scenario", "window", "kind"),
    [
        pytest.param(scenario, window, kind, marks=EPOCHS.get((scenario, window), {}).get(kind, WIDE))
        for scenario in ("even", "uneven", "none on the last", "nothing")
        for window in (1, 2, 32)
        for kind in ("list", "dataset")
    ],
)
def test_every_example_once_and_all_alike(world, scenario, window, kind):
    """Compares shapes and counts of two epochs with the examples of all workers."""
    here, workers, worker = world.backend.replicas_here, world.backend.num_workers, world.backend.worker_index
    all_held = held(world, scenario)
    source = all_held[worker]
    if kind == "dataset":
        spec = {"x": tf.TensorSpec([None, 2]), "y": tf.TensorSpec([None], tf.int64), "id": tf.TensorSpec([], tf.int64)}
        source = tf.data.Dataset.from_generator(lambda: iter(all_held[worker]), output_signature=spec)
    batches = made(world, source, SIZE, lookahead=window)
    a_step = SIZE * here
    steps = max(-(-len(held) // a_step) for held in all_held)
    for _ in range(2):
        epoch = epoch_of(world, batches)
        assert len(epoch) == steps
        assert seen(epoch) == [int(example["id"]) for example in all_held[worker]]
        for k, step in enumerate(epoch):
            assert len(step) == here
            of_all = [example for held in all_held for example in held[k * a_step : (k + 1) * a_step]]
            longest = {name: max(1, max(len(example[name]) for example in of_all)) for name in ("x", "y")}
            tokens = sum(len(example["y"]) for example in of_all)
            sequences = sum(len(example["y"]) > 0 for example in of_all)
            for batch in step:
                assert isinstance(batch, distpad.Batch) and isinstance(batch.counts, distpad.Counts)
                assert batch.data["x"].shape == (SIZE, longest["x"], 2) and batch.data["x"].dtype == np.float32
                assert batch.data["y"].shape == (SIZE, longest["y"])
                assert (float(batch.counts.tokens), float(batch.counts.sequences)) == (tokens, sequences)
                assert batch.counts.tokens.dtype == np.float64 and batch.indices.dtype == np.int64
                assert batch.rows.dtype == batch.lengths["y"].dtype == np.int32
                _check_rows(batch, {int(example["id"]): example for example in all_held[worker]})
    assert workers == world.backend.num_workers


def _check_rows(batch, by_id):
    real = int(batch.rows)
    assert (batch.indices[:real] >= 0).all() and (batch.indices[real:] == -1).all()
    assert (batch.lengths["y"][real:] == 0).all() and (batch.data["y"][real:] == 9).all()
    assert (batch.lengths["x"] >= 1).all()  # attention over a filler row stays finite
    for row in range(real):
        example = by_id[int(batch.data["id"][row])]
        assert batch.indices[row] == batch.data["id"][row] % 1000
        for name, value in (("x", -5.0), ("y", 9)):
            n = len(example[name])
            assert batch.lengths[name][row] == n
            np.testing.assert_array_equal(batch.data[name][row, :n], example[name])
            assert (batch.data[name][row, n:] == value).all()


@pytest.mark.parametrize("accumulate", [3, pytest.param(2, marks=WIDE)])
def test_counts_are_those_of_the_whole_group(world, accumulate):
    all_held = [examples_of(w, 40 + 6 * w) for w in range(world.backend.num_workers)]  # several full steps everywhere
    a_step = SIZE * world.backend.replicas_here
    batches = made(world, all_held[world.backend.worker_index], SIZE, accumulation_steps=accumulate, lookahead=4)
    epoch = epoch_of(world, batches)
    assert len(epoch) % accumulate == 0
    for k, step in enumerate(epoch):
        group = k // accumulate * accumulate
        part = slice(group * a_step, (group + accumulate) * a_step)
        assert step[0].counts.tokens == sum(len(example["y"]) for held in all_held for example in held[part])


def test_weights_are_counted(world):
    all_held = held(world, "uneven")
    for examples in all_held:
        for i, example in enumerate(examples):
            example["w"] = np.float32(i % 3)
    batches = made(world, all_held[world.backend.worker_index], SIZE, weights="w")
    a_step = SIZE * world.backend.replicas_here
    for k, step in enumerate(epoch_of(world, batches)):
        of_all = [example for held in all_held for example in held[k * a_step : (k + 1) * a_step]]
        assert isinstance(step[0].counts, distpad.WeightedCounts)
        assert step[0].counts.tokens == sum(example["w"] * len(example["y"]) for example in of_all)


def test_drop_remainder_ends_before_the_first_step_that_is_not_full(world):
    all_held = held(world, "uneven")
    batches = made(world, all_held[world.backend.worker_index], SIZE, drop_remainder=True)
    epoch = epoch_of(world, batches)
    assert len(epoch) == min(map(len, all_held)) // (SIZE * world.backend.replicas_here)
    assert all(batch.rows == SIZE for step in epoch for batch in step)


def test_buckets_make_one_shape_per_boundary(world):
    buckets = {"x": distpad.Buckets([4, 8]), "y": distpad.Buckets([2, 6])}
    batches = made(world, held(world, "uneven")[world.backend.worker_index], 1, buckets=buckets)
    shapes = {(b.data["x"].shape[1], b.data["y"].shape[1]) for step in epoch_of(world, batches) for b in step}
    assert shapes <= {(4, 2), (8, 6)} and shapes


def test_resuming_in_the_middle_of_an_epoch(world):
    source = examples_of(world.backend.worker_index, 30 + world.backend.worker_index)
    whole = epoch_of(world, made(world, source, 1, lookahead=2))
    stopped = made(world, source, 1, lookahead=2)
    first = []
    for batch in stopped:
        first.append(mine(world, batch))
        if len(first) == 3:
            break
    resumed = made(world, source, 1, lookahead=2)
    resumed.load_state_dict(stopped.state_dict())
    rest = epoch_of(world, resumed)
    assert seen(first) + seen(rest) == seen(whole)
    assert len(first) + len(rest) == len(whole)
    assert resumed.state_dict()["epoch"] == 1 and resumed.state_dict()["step"] == 0


def test_breaking_leaves_no_thread_and_the_next_epoch_is_whole(world):
    source = held(world, "uneven")[world.backend.worker_index]
    batches = made(world, source, 1, lookahead=2)
    before = threading.active_count()
    for _ in range(3):
        for _batch in batches:
            break
    assert threading.active_count() <= before
    assert seen(epoch_of(world, batches)) == [int(example["id"]) for example in source]


def test_a_sampler_yields_the_same_steps_for_any_number_of_replicas(world):
    examples = examples_of(0, 40)
    lengths = [len(example["y"]) for example in examples]
    sampler = distpad.LengthSampler(lengths, global_batch_size=8, seed=3)
    batches = made(world, (examples, sampler))
    assert len(batches) == len(sampler.plan(0))
    for number in range(2):
        epoch = epoch_of(world, batches)
        plan = sampler.plan(number)
        assert len(epoch) == len(plan)
        rows = np.zeros([len(plan), 40])
        for k, step in enumerate(epoch):
            for batch in step:
                rows[k, batch.indices[: batch.rows]] += 1
            assert step[0].counts.tokens == sum(lengths[i] for i in plan[k])
        everywhere = world.backend.host_sum(rows)
        expected = np.zeros_like(rows)
        for k, step in enumerate(plan):
            expected[k, step] = 1
        np.testing.assert_array_equal(everywhere, expected)


def test_a_step_with_the_counts_of_a_batch_is_that_of_one_device(world):
    """Compares the reduced gradient of a linear model with NumPy's over all workers' examples."""
    random = np.random.default_rng(5)
    kernel = random.normal(size=[2, 1])
    all_held = [
        [{"x": random.normal(size=[n, 2])} for n in random.integers(1, 9, size=4 + 3 * w)]
        for w in range(world.backend.num_workers)
    ]
    loss_fn = distpad.DistributedLoss(lambda t, p: tf.square(t - p)[..., 0], backend=world.backend)
    with world.scope():
        variable = tf.Variable(kernel)

    def step(batch):
        with tf.GradientTape() as tape:
            predicted = tf.matmul(batch.data["x"], tf.broadcast_to(variable, [SIZE, 2, 1]))
            target = tf.ones_like(predicted)
            loss = loss_fn(target, predicted, lengths=batch.lengths["x"], denominator=batch.counts)
        gradients = distpad.gradient(tape, loss, [variable], backend=world.backend)
        return world.reduce(gradients)[0]

    run = tf.function(lambda batch: world.strategy.run(step, args=(batch,)) if world.strategy else step(batch))
    padding = {"x": distpad.Pad(value=1e6)}
    batches = made(world, all_held[world.backend.worker_index], SIZE, padding=padding, tokens="x")
    a_step = SIZE * world.backend.replicas_here
    for k, batch in enumerate(batches):
        found = run(batch)
        if world.strategy is not None:
            found = world.strategy.experimental_local_results(found)[0]
        x = np.concatenate([e["x"] for held in all_held for e in held[k * a_step : (k + 1) * a_step]])
        expected = 2 * x.T @ (x @ kernel - 1) / len(x)
        assert np.abs(found.numpy() - expected).max() < 1e-12 * np.abs(expected).max()


def test_an_error_of_the_source_is_raised_after_the_steps_before_it(world):
    def failing():
        yield from examples_of(world.backend.worker_index, 2 * SIZE * world.backend.replicas_here)
        raise OSError("the disk is gone")

    class Source:
        def __iter__(self):
            return failing()

    batches = iter(made(world, Source(), SIZE))
    assert [int(mine(world, next(batches))[0].rows) for _ in range(2)] == [SIZE, SIZE]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_the_stats_count_every_position(world):
    batches = made(world, held(world, "uneven")[world.backend.worker_index], SIZE, buckets=distpad.Buckets([4, 16]))
    positions = real = 0
    for step in epoch_of(world, batches):
        for batch in step:
            positions += sum(batch.data[name].shape[0] * batch.data[name].shape[1] for name in ("x", "y"))
            real += sum(int(batch.lengths[name][: batch.rows].sum()) for name in ("x", "y"))
    found = batches.stats.as_dict()
    causes = [found[cause] for cause in ("own_batch", "global_maximum", "buckets", "filler_rows")]
    assert found["real"] == real and real + sum(causes) == positions and min(causes) >= 0
    assert found["shapes"] <= 2 and found["steps"] > 0 and "real positions" in str(batches.stats)
