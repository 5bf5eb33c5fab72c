"""LengthSampler: every example once, the same steps for any number of workers, and resuming in the middle."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import distpad

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a machine that others use too
LENGTHS = st.lists(st.integers(0, 40), max_size=60)
OPTIONS = st.one_of(
    st.fixed_dictionaries({"global_batch_size": st.integers(1, 9)}),
    st.fixed_dictionaries({"max_tokens": st.integers(64, 200)}),
)
EXTRAS = st.fixed_dictionaries(
    {
        "buckets": st.sampled_from([None, distpad.Buckets([4, 16, 64]), distpad.Buckets.multiples(8)]),
        "shuffle": st.booleans(),
        "seed": st.integers(0, 5),
        "randomness": st.sampled_from([0.0, 0.1, 1.0]),
    }
)


def dealt(sampler, epoch, workers):
    """The batches of all workers, ``[steps][workers]``."""
    shards = [sampler.shard(worker, workers) for worker in range(workers)]
    for shard in shards:
        shard.set_epoch(epoch)
    return list(zip(*(list(shard) for shard in shards)))


def real(batches):
    return sorted(index for batch in batches for index in batch.tolist() if index >= 0)


@relaxed
@given(LENGTHS, OPTIONS, EXTRAS, st.integers(1, 5), st.integers(0, 3))
def test_every_example_once_and_the_same_steps_for_any_number_of_workers(lengths, options, extras, workers, epoch):
    sampler = distpad.LengthSampler(lengths, **options, **extras)
    plan = sampler.plan(epoch)
    assert sorted(index for step in plan for index in step.tolist()) == list(range(len(lengths)))
    steps = dealt(sampler, epoch, workers)
    assert [real(batches) for batches in steps] == [sorted(step.tolist()) for step in plan]
    again = distpad.LengthSampler(np.array(lengths, np.int32), **options, **extras).plan(epoch)
    assert [step.tolist() for step in again] == [step.tolist() for step in plan]


@relaxed
@given(LENGTHS, OPTIONS, EXTRAS, st.integers(1, 5))
def test_shapes_follow_from_the_boundary_and_budgets_hold(lengths, options, extras, workers):
    sampler = distpad.LengthSampler(lengths, **options, **extras)
    buckets = extras["buckets"] or int
    rows_of = {}
    for step, batches in zip(sampler.plan(0), dealt(sampler, 0, workers)):
        boundary = buckets(max(lengths[index] for index in step))
        if "max_tokens" in options:
            assert len(step) * boundary <= options["max_tokens"]
        else:
            assert len(step) <= options["global_batch_size"]
        rows = {len(batch) for batch in batches}
        assert len(rows) == 1 and rows == rows_of.setdefault(boundary, rows)
        counts = [int((batch >= 0).sum()) for batch in batches]
        assert max(counts) - min(counts) <= 1
        assert all((batch[:count] >= 0).all() for batch, count in zip(batches, counts))  # filler rows come last


@relaxed
@given(LENGTHS, OPTIONS, EXTRAS, st.integers(1, 4), st.integers(1, 4), st.data())
def test_resuming_on_another_number_of_workers_loses_nothing(lengths, options, extras, before, after, data):
    sampler = distpad.LengthSampler(lengths, **options, **extras)
    plan = sampler.plan(2)
    stop = data.draw(st.integers(0, len(plan)))
    states, seen = [], []
    for worker in range(before):
        shard = sampler.shard(worker, before)
        shard.set_epoch(2)
        for _, batch in zip(range(stop), shard):
            seen.append(batch)
        states.append(json.loads(json.dumps(shard.state_dict())))
    assert all(state == states[0] for state in states)
    rest = []
    for worker in range(after):
        shard = distpad.LengthSampler(lengths, **options, **extras).shard(worker, after)
        shard.load_state_dict(states[0])
        if stop < len(plan):  # else the next epoch begins
            rest += list(shard)
        assert shard.state_dict()["epoch"] == (2 if stop < len(plan) else 3)
    assert real(seen + rest) == list(range(len(lengths)))


def test_epochs_follow_one_another_and_differ():
    sampler = distpad.LengthSampler(np.arange(50) % 7, global_batch_size=4)
    shard = sampler.shard(0, 1)
    first, second = ([batch.tolist() for batch in shard] for _ in range(2))
    assert len(shard) == len(first) == 13 and first != second
    assert [sorted(b) for b in second] == [
        sorted([*step.tolist(), *[-1] * (4 - len(step))]) for step in sampler.plan(1)
    ]
    for _ in zip(range(3), shard):
        pass
    assert shard.state_dict()["epoch"] == 2 and shard.state_dict()["step"] == 3
    assert len(list(shard)) == 13 and shard.state_dict()["epoch"] == 3  # what was left early is not gone on with


def test_grouping_by_length_saves_padding_and_randomness_gives_it_back():
    lengths = np.random.default_rng(0).lognormal(5, 1, size=5000).clip(16, 1024).astype(int)

    def padding(randomness):
        plan = distpad.LengthSampler(lengths, global_batch_size=32, randomness=randomness).plan(0)
        return sum(len(step) * lengths[step].max() - lengths[step].sum() for step in plan) / lengths.sum()

    sorted_, default, shuffled = padding(0.0), padding(0.1), padding(1.0)
    assert sorted_ < 0.03 < default < 0.5 * shuffled


def test_steps_come_in_any_order_and_without_shuffling_as_they_are():
    lengths = np.arange(40)
    longest = [int(step.max()) for step in distpad.LengthSampler(lengths, global_batch_size=4).plan(0)]
    assert longest != sorted(longest)
    plan = distpad.LengthSampler(lengths, global_batch_size=16, shuffle=False).plan(5)
    assert np.concatenate(plan).tolist() == list(range(40)) and [len(step) for step in plan] == [16, 16, 8]


def test_workers_of_a_step_have_as_much_to_do():
    lengths = np.random.default_rng(1).integers(1, 1000, size=4096)
    for batches in dealt(distpad.LengthSampler(lengths, global_batch_size=256, randomness=1.0), 0, 4):
        work = [int(lengths[batch[batch >= 0]].sum()) for batch in batches]
        assert max(work) < 1.03 * min(work)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "global_batch_size, max_tokens is neither, expected one of them"),
        ({"global_batch_size": 1, "max_tokens": 1}, ValueError, "is both, expected one of them"),
        ({"global_batch_size": 0}, ValueError, "global_batch_size is 0, expected at least 1"),
        ({"global_batch_size": 2.0}, TypeError, r"global_batch_size is 2\.0, expected an integer"),
        ({"max_tokens": 4}, ValueError, r"max_tokens is 4, expected at least 5. Example 1 has 5 positions"),
        ({"global_batch_size": 1, "randomness": 2}, ValueError, "randomness is 2, expected from 0 to 1"),
        ({"global_batch_size": 1, "seed": -1}, ValueError, "seed is -1, expected at least 0"),
        ({"global_batch_size": 1, "buckets": [8]}, TypeError, r"buckets is \[8\], expected a distpad.Buckets"),
        ({"global_batch_size": 1, "buckets": distpad.Buckets([4])}, ValueError, "length is 5, expected at most 4"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        distpad.LengthSampler([3, 5], **arguments)


def test_wrong_lengths_workers_epochs_and_states():
    for lengths, error in (([1.5], TypeError), ([-1], ValueError), ([[1]], ValueError)):
        with pytest.raises(error, match="LengthSampler: lengths is"):
            distpad.LengthSampler(lengths, global_batch_size=1)
    sampler = distpad.LengthSampler([3, 5], global_batch_size=1)
    for worker, workers in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="expected"):
            sampler.shard(worker, workers)
    with pytest.raises(ValueError, match="epoch is -1"):
        sampler.plan(-1)
    shard = sampler.shard(0, 1)
    with pytest.raises(ValueError, match="state is without"):
        shard.load_state_dict({"epoch": 1})
    other = distpad.LengthSampler([3, 6], global_batch_size=1).shard(0, 1)
    with pytest.raises(ValueError, match="state is of another sampler"):
        shard.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="at step 9, expected from 0 to 2"):
        shard.load_state_dict({**shard.state_dict(), "step": 9})


def test_the_numbers_kind_does_not_matter_to_a_saved_position():
    plain = distpad.LengthSampler([1, 2], global_batch_size=8, seed=3)
    numpys = distpad.LengthSampler(np.array([1, 2], np.int32), global_batch_size=np.int64(8), seed=np.int32(3))
    assert plain.fingerprint() == numpys.fingerprint()


def test_plans_cannot_be_changed_and_samplers_travel():
    sampler = distpad.LengthSampler(range(9), global_batch_size=4)
    with pytest.raises(ValueError, match="read-only"):
        sampler.plan(0)[0][:] = 0
    again = pickle.loads(pickle.dumps(sampler))
    assert [step.tolist() for step in again.plan(3)] == [step.tolist() for step in sampler.plan(3)]


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"randomness": "a"}, TypeError, "randomness is 'a', expected a number"),
        ({"lengths": np.array([2**63], np.uint64)}, ValueError, "below 2"),
    ],
)
def test_numbers_that_are_none_are_refused(options, kind, match):
    with pytest.raises(kind, match=match):
        distpad.LengthSampler(**{"lengths": [1], "global_batch_size": 1, **options})


def test_a_shard_refuses_a_state_that_is_none():
    shard = distpad.LengthSampler([1] * 4, global_batch_size=2).shard(0, 1)
    for state in (None, {**shard.state_dict(), "step": "1"}, {**shard.state_dict(), "step": 0.5}):
        with pytest.raises(TypeError, match="state"):
            shard.load_state_dict(state)
