"""A saved position resumes with the same examples, or is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf
from test_batches import Replicas

import distpad

PADDING = {"y": distpad.Pad()}


def made(source, size=2, **options):
    return distpad.PaddedBatches(source, size, **{"padding": PADDING, "tokens": "y", "buckets": None, **options})


def indices(batches):
    return [int(i) for batch in batches for i, n in zip(batch.data["y"][:, 0], range(int(batch.rows)))]


def numbers(count=40):
    return tf.data.Dataset.range(count).map(lambda i: {"y": i[tf.newaxis]})


class Shuffles:
    """Yields another order in each iteration, as many loaders do."""

    def __init__(self):
        self.random = np.random.default_rng(0)

    def __iter__(self):
        return iter([{"y": [int(i)]} for i in self.random.permutation(40)])


SOURCES = {
    "tf.data": lambda: numbers().shuffle(40, seed=1, reshuffle_each_iteration=True),
    "tf.data, a small buffer": lambda: numbers().shuffle(4, seed=1, reshuffle_each_iteration=True),
    "Python": Shuffles,
}


@pytest.mark.parametrize("lookahead", [1, 3, 32])
@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_that_shuffles_again_is_refused_in_the_middle_of_an_epoch(kind, lookahead):
    batches = made(SOURCES[kind](), lookahead=lookahead)
    for _ in itertools.islice(batches, 8):
        pass
    state = batches.state_dict()
    assert (state["epoch"], state["step"]) == (0, 8)
    batches.load_state_dict(state)  # the same object: its source is iterated again
    with pytest.raises(ValueError, match=r"source begins with other examples.*reshuffle_each_iteration=False"):
        next(iter(batches))


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_that_shuffles_again_is_accepted_between_epochs(kind):
    """Also if the position is saved at the last step, inside the loop."""
    batches = made(SOURCES[kind]())
    assert sorted(indices(batches)) == list(range(40))
    for step, _ in enumerate(batches):
        if step == 19:
            state = batches.state_dict()
    assert (state["epoch"], state["step"], state["begins"]) == (2, 0, [])
    resumed = made(SOURCES[kind]())
    resumed.load_state_dict(state)
    assert sorted(indices(resumed)) == list(range(40))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.one_stack
@pytest.mark.parametrize("stop", [2, 9, *[pytest.param(stop, marks=pytest.mark.wide) for stop in (3, 17)]])
@pytest.mark.parametrize(
    "source",
    [
        lambda: numbers().shuffle(40, seed=1, reshuffle_each_iteration=False),
        lambda: [{"y": [i]} for i in range(40)],
        lambda: [{"y": [float(i) if i % 3 else i]} for i in range(1, 41)],  # a dtype that later examples change
    ],
)
def test_a_source_of_one_order_resumes(source, stop, accumulate):
    whole = indices(made(source()))
    options = {"accumulation_steps": accumulate}
    stopped = made(source(), lookahead=4, **options)
    kept = stop // accumulate * accumulate
    first = list(itertools.islice(stopped, stop))[:kept]
    resumed = made(source(), lookahead=7, **options)
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == stopped.state_dict()
    assert indices(first) + indices(resumed) == whole


def test_a_position_is_checked_after_loading_and_saving_it_again():
    data = [{"y": [i]} for i in range(40)]
    batches = made(data)
    next(iter(batches))
    for _ in range(3):
        state, batches = batches.state_dict(), made(data)
        batches.load_state_dict(state)
        next(iter(batches))
    changed = made([{"y": [99]}, *data[1:]])
    changed.load_state_dict(batches.state_dict())
    with pytest.raises(ValueError, match="source begins with other examples"):
        next(iter(changed))


def test_the_examples_of_a_sampler_are_checked_whatever_the_number_of_replicas():
    data = [{"y": np.arange(1 + i % 5) + i} for i in range(40)]
    sampler = distpad.LengthSampler([len(e["y"]) for e in data], global_batch_size=8, seed=1)
    before = made((data, sampler), None, backend=Replicas(2))
    list(itertools.islice(before, 2))
    state = before.state_dict()
    for replicas in (1, 2, 3):
        after = made((data, sampler), None, backend=Replicas(replicas))
        after.load_state_dict(state)
        found = [sorted(i for part in step for i in part.indices if i >= 0) for step in after]
        assert found == [sorted(step) for step in sampler.plan(0)[2:]]
    changed = [{"y": example["y"] + 1} for example in data]
    after = made((changed, sampler), None, backend=Replicas(3))
    after.load_state_dict(state)
    with pytest.raises(ValueError, match="source begins with other examples"):
        next(iter(after))


def test_a_position_without_fingerprints_is_refused():
    batches = made([{"y": [1]}] * 9)
    next(iter(batches))
    state = batches.state_dict()
    with pytest.raises(ValueError, match=r"state is without \['begins'\]"):
        batches.load_state_dict({key: state[key] for key in ("epoch", "step", "source")})
    with pytest.raises(ValueError, match=r"state's begins is \[\] at step 1"):
        batches.load_state_dict({**state, "begins": []})


def test_an_error_at_the_beginning_of_the_source_is_raised_unchanged():
    class Source:
        broken = False

        def __iter__(self):
            for i in range(9):
                if self.broken and i == 1:
                    raise OSError("the disk is gone")
                yield {"y": [i]}

    source = Source()
    batches = made(source)
    for _ in itertools.islice(batches, 3):
        pass
    source.broken = True
    batches.load_state_dict(batches.state_dict())
    with pytest.raises(OSError, match="the disk is gone"):
        next(iter(batches))


def test_lengths_are_hashed_once(monkeypatch):
    sampler = distpad.LengthSampler([1] * 10, global_batch_size=2)
    assert sampler.fingerprint() == sampler.fingerprint()
    monkeypatch.setattr("hashlib.sha256", None)
    shard = sampler.shard(0, 1)
    assert shard.state_dict()["sampler"] == sampler.fingerprint()
    with pytest.raises(ValueError, match="read-only"):
        sampler.lengths[0] = 5


# -- tf.train.Checkpoint ----------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_position(tmp_path):
    """A checkpoint restores the position with the variables; the position of another source is refused."""
    made = lambda examples: distpad.PaddedBatches(
        examples, 2, padding={"y": distpad.Pad()}, tokens="y", backend="local"
    )
    examples = [{"y": [i] * (1 + i % 3)} for i in range(12)]
    batches, first_of = made(examples), lambda batch: batch.data["y"].numpy()[:, 0].tolist()
    for _, batch in zip(range(3), batches):
        first_of(batch)
    path = tf.train.Checkpoint(weight=tf.Variable(1.0), batches=batches).save(str(tmp_path / "at"))

    resumed, weight = made(examples), tf.Variable(0.0)
    tf.train.Checkpoint(weight=weight, batches=resumed).restore(path).assert_consumed()
    assert float(weight) == 1 and [first_of(batch) for batch in resumed] == [[6, 7], [8, 9], [10, 11]]
    other = made(examples[::-1])
    tf.train.Checkpoint(weight=weight, batches=other).restore(path)
    with pytest.raises(ValueError, match="source begins with other examples"):
        list(other)
