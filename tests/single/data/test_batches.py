"""PaddedBatches in one process: features, wrong arguments, coverage of all examples, threads and memory."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import distpad
from distpad.backends import base, local

PADDING = {"y": distpad.Pad()}
EXAMPLES = [{"y": [1, 2, 3]}, {"y": []}, {"y": [4]}]


def made(source=EXAMPLES, size=2, **options):
    options = {"padding": PADDING, "tokens": "y", "buckets": None, "backend": "local", **options}
    return distpad.PaddedBatches(source, size, **options)


# -- features ---------------------------------------------------------------------------------------------------------


def test_an_empty_list_has_the_dtype_of_the_others():
    first, second = made()
    assert first.data["y"].numpy().tolist() == [[1, 2, 3], [0, 0, 0]] and first.data["y"].dtype == tf.int64
    assert second.lengths["y"].numpy().tolist() == [1, 0] and second.indices.numpy().tolist() == [2, -1]


@pytest.mark.parametrize(("empty", "full", "axes"), [([], [1, 2], (0,)), ([[], []], [[1], [2]], (0, 1))])
def test_empty_lists_wait_for_an_example_with_a_dtype(empty, full, axes):
    source = [{"y": [1], "z": empty}] * 3 + [{"y": [1], "z": full}]
    batches = list(made(source, 1, padding={"y": distpad.Pad(), "z": distpad.Pad(axes)}, lookahead=8))
    assert all(batch.data["z"].dtype == tf.int64 for batch in batches) and len(batches) == 4
    assert [int(batch.lengths["z"][0]) for batch in batches] == [len(empty)] * 3 + [2]
    assert [batch.indices.numpy().tolist() for batch in batches] == [[0], [1], [2], [3]]


def test_bytes_keep_trailing_zeros():
    (batch,) = made([{"y": [1], "s": b"ab\0\0", "t": [b"\0", b"c"]}, {"y": [2], "s": "x\0", "t": ["", "d\0"]}])
    assert batch.data["s"].numpy().tolist() == [b"ab\0\0", b"x\0"]
    assert batch.data["t"].numpy().tolist() == [[b"\0", b"c"], [b"", b"d\0"]]


def test_ragged_strings_are_padded_with_empty_strings():
    padding = {"y": distpad.Pad(), "t": distpad.Pad()}
    (batch,) = made([{"y": [1], "t": ["a", "b"]}, {"y": [2], "t": ["c"]}], 3, padding=padding)
    assert batch.data["t"].numpy().tolist() == [[b"a", b"b"], [b"c", b""], [b"c", b""]]


def test_a_source_may_reuse_its_buffers():
    def source():
        buffer = np.zeros(2, np.int64)
        for k in range(6):
            buffer[:] = k
            yield {"y": buffer}

    assert [batch.data["y"].numpy().tolist() for batch in made(source(), 1)] == [[[k, k]] for k in range(6)]


def test_nested_and_top_level_names_are_sorted_together():
    (batch,) = made([([1, 2], {"x": [1.0]})], 1, padding={0: distpad.Pad(), "1/x": distpad.Pad()}, tokens=0)
    assert {name: int(length[0]) for name, length in batch.lengths.items()} == {0: 2, "1/x": 1}
    assert len(tf.nest.flatten(batch)) > 5  # flatten sorts the names


def test_tuples_and_single_arrays_keep_their_structure():
    pairs = [(np.ones([n, 2]), np.arange(n)) for n in (2, 3)]
    (batch,) = made(pairs, padding={0: distpad.Pad(), 1: distpad.Pad(value=-1)}, tokens=1)
    assert isinstance(batch.data, tuple) and batch.data[1].numpy().tolist() == [[0, 1, -1], [0, 1, 2]]
    (batch,) = made([[1, 2], [3]], padding={0: distpad.Pad()}, tokens=0)
    assert batch.data.numpy().tolist() == [[1, 2], [3, 0]]
    (batch,) = made([({"x": [1.0]}, "a"), ({"x": [2.0, 3.0]}, "bc")], padding={"0/x": distpad.Pad()}, tokens="0/x")
    assert batch.data[0]["x"].shape == (2, 2) and batch.data[1].numpy().tolist() == [b"a", b"bc"]


def test_several_ragged_axes_share_buckets():
    images = [{"image": np.ones([h, w, 1]), "y": [1]} for h, w in ((3, 9), (5, 2))]
    padding = {"image": distpad.Pad(axis=(1, 0)), "y": distpad.Pad()}
    buckets = {"image": distpad.Buckets([4, 16]), "y": distpad.Buckets([1, 2])}
    (batch,) = made(images, padding=padding, buckets=buckets)
    assert batch.data["image"].shape == (2, 16, 16, 1) and batch.data["y"].shape == (2, 2)
    assert batch.lengths["image"].numpy().tolist() == [9, 2]
    assert float(tf.reduce_sum(batch.data["image"])) == 3 * 9 + 5 * 2


def test_each_loss_has_its_own_counts():
    source = [{"a": [1, 2], "b": [1.0], "w": 0.5}, {"a": [3], "b": [], "w": 2.0}]
    padding = {"a": distpad.Pad(), "b": distpad.Pad()}
    (batch,) = made(source, padding=padding, tokens={"text": "a", "tone": "b"}, weights={"text": "w"})
    assert [float(count) for count in batch.counts["text"][:2]] == [0.5 * 2 + 2.0, 2]
    assert [float(count) for count in batch.counts["tone"][:2]] == [1, 1]
    assert isinstance(batch.counts["text"], distpad.WeightedCounts)
    assert not isinstance(batch.counts["tone"], distpad.WeightedCounts)


def test_len_is_the_number_of_steps_or_raises():
    assert len(made()) == len(list(made())) == 2 and len(made(accumulation_steps=3)) == 3
    assert len(made(drop_remainder=True)) == 1
    assert len(made(tf.data.Dataset.range(5).map(lambda i: {"y": tf.range(i)}))) == 3
    with pytest.raises(TypeError, match="number of steps is unknown"):
        len(made(iter(EXAMPLES)))


# -- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"tokens": "z"}, ValueError, r"tokens is 'z', expected a padded feature: \['y'\]"),
        ({"padding": {"y": 0}}, TypeError, r"padding\['y'\] is 0, expected a distpad.Pad"),
        ({"padding": {}}, TypeError, "padding is {}"),
        ({"padding": {"y": distpad.Pad((0, 2))}}, ValueError, r"with ragged axes \[0, 2\]"),
        ({"lookahead": 0}, ValueError, "lookahead is 0, expected at least 1"),
        ({"buckets": 8}, TypeError, "buckets is 8"),
        ({"buckets": {"x": distpad.Buckets([8])}}, ValueError, "buckets is for 'x'"),
        ({"weights": {"tone": "w"}}, ValueError, "weights is for"),
        ({"timeout_s": 0}, ValueError, "timeout_s is 0"),
        ({"timeout_s": "5"}, TypeError, "timeout_s is '5', expected a number"),
        ({"tokens": ["y"]}, TypeError, r"tokens is \['y'\], expected a feature's name"),
        ({"tokens": {None: "y"}}, ValueError, "tokens is {None"),
        ({"weights": ["w"]}, TypeError, r"weights is \['w'\]"),
        (
            {"source": (range(5), distpad.LengthSampler([1, 1], global_batch_size=1)), "size": None},
            ValueError,
            "of 5 ex",
        ),
        ({"size": None}, ValueError, "batch_size is None"),
        ({"source": lambda: EXAMPLES}, TypeError, r"function.*class with __iter__"),
    ],
)
def test_wrong_arguments_are_named(options, kind, match):
    with pytest.raises(kind, match=match):
        made(**options)


@pytest.mark.parametrize(
    ("value", "dtype", "can_hold"),
    [
        (0.5, "int64", False), (np.nan, "int64", False), (np.inf, "int32", False), (2, "bool", False),
        (1, "bool", True), (-1, "uint8", False), (255, "uint8", True), (-1e9, "float16", False), (0.1, "float16", True),
        (np.nan, "float32", True), (-np.inf, "float32", True), ("a", "int64", False), (0, "object", True),
        ("<pad>", "object", True), (1, "object", False), (1e30, "bfloat16", True), (3.0, "int8", True),
    ],
)  # fmt: skip
def test_the_dtype_must_be_able_to_hold_the_padding_value(value, dtype, can_hold):
    dtype = tf.as_dtype("string" if dtype == "object" else dtype).as_numpy_dtype
    source = [{"y": np.array(n * ["1"], object) if dtype is object else np.ones([n], dtype)} for n in (1, 2)]
    batches = made(source, padding={"y": distpad.Pad(value=value)})
    if not can_hold:
        with pytest.raises(ValueError, match=r"padding\['y'\] is Pad\(value="):
            list(batches)
        return
    ((_, found),) = [batch.data["y"][0].numpy() for batch in batches]
    expected = np.full([], b"" if value == 0 and dtype is object else value, dtype)
    assert found == expected or found == str(value).encode() or (found != found and expected != expected)


@pytest.mark.parametrize(
    ("source", "options", "match"),
    [
        ([{"y": [1]}, {"x": [1]}], {}, r"example 1 is with \['x'\], expected the same features"),
        ([{"y": [1], "x": [1]}, {"y": [1], "x": [1, 2]}], {}, "'x' of example 1 .* Add 'x' to padding"),
        ([{"y": [1]}], {"weights": "w"}, "weights is 'w', expected a feature of an example"),
        ([{"y": [1] * 9}], {"buckets": distpad.Buckets([8])}, r"axis 0 of 'y'.*length is 9.*\(example 0\)"),
        ([{"y": [1, 2], "w": [1.0]}], {"padding": {**PADDING, "w": distpad.Pad()}, "weights": "w"}, "of shape .1,. in"),
        ([{"y": 3}], {}, "padding.'y'. is Pad.axis=0., expected no padding for a scalar"),
        ([{"y": [1]}, {"y": [[1], [2, 3]]}], {}, "'y' of example 1 is a list with rows of different sizes"),
        ([{"y": [1]}, {"y": None}], {}, "'y' of example 1 is of NoneType"),
        ([{"y": np.array([1], "datetime64[s]")}], {}, "'y' is of dtype datetime64"),
        ([{"y": [1], "a/b": 1, "a": {"b": 2}}], {}, "'a/b'. twice"),
        ([{"y": [1], 3: 2}], {}, "a mapping with keys"),
    ],
)
def test_bad_examples_are_named(source, options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        list(made(source, **options))


def test_an_iterator_yields_one_epoch():
    batches = made(iter(EXAMPLES))
    assert len(list(batches)) == 2
    with pytest.raises(ValueError, match="used up by the first epoch"):
        list(batches)


def test_a_state_of_another_source_is_refused():
    with pytest.raises(ValueError, match="'batch_size': 3"):
        made().load_state_dict(made(size=3).state_dict())


def test_a_position_out_of_range_is_refused():
    sampler = distpad.LengthSampler([1] * 4, global_batch_size=2)
    source = [{"y": [1]}] * 4
    batches = made((source, sampler), None)
    state = batches.state_dict()
    for step, match in ((3, "at most the 2 of epoch 0"), (0.5, "an integer"), (-1, "at least 0")):
        with pytest.raises((ValueError, TypeError), match=match):
            batches.load_state_dict({**state, "step": step})
    with pytest.raises(ValueError, match="step is 3, expected a multiple of accumulation_steps, which is 2"):
        made(source, 1, accumulation_steps=2).load_state_dict({**made(source, 1).state_dict(), "step": 3})
    with pytest.raises(TypeError, match="state is None"):
        batches.load_state_dict(None)


@pytest.mark.parametrize("ending", [SystemExit, KeyboardInterrupt])
def test_a_source_may_end_the_program(ending):
    def source():
        yield {"y": [1]}
        raise ending("bye")

    with pytest.raises(ending, match="bye"):
        list(made(source(), 1))


# -- two loops at once ------------------------------------------------------------------------------------------------


def test_a_replaced_loop_raises_and_does_not_move_the_position():
    batches = made([{"y": [k]} for k in range(9)], 1)
    older, newer = iter(batches), iter(batches)
    next(older), next(newer)
    with pytest.raises(distpad.DistpadError, match="this loop was left, and another has begun"):
        next(older)
    next(newer)
    assert (batches.state_dict()["epoch"], batches.state_dict()["step"]) == (1, 2)
    batches.load_state_dict({**batches.state_dict(), "step": 5})
    with pytest.raises(distpad.DistpadError, match="this loop was left"):
        next(newer)
    assert [int(batch.data["y"][0, 0]) for batch in batches] == [5, 6, 7, 8]


def test_an_unused_iterator_has_no_threads_and_begins_no_epoch():
    before = threading.active_count()
    batches = made()
    kept = [iter(batches) for _ in range(4)]
    assert threading.active_count() == before and len(kept) == 4 and batches
    assert len(list(batches)) == 2 and batches.state_dict()["epoch"] == 1


# -- coverage ---------------------------------------------------------------------------------------------------------


class Replicas(local.LocalBackend):
    """Several replicas of one worker without an engine: a batch is a list of the replicas' batches."""

    def __init__(self, count):
        self.num_replicas = count

    def to_device(self, values):
        return values


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(0, 30),
    size=st.integers(1, 5),
    replicas=st.integers(1, 3),
    window=st.integers(1, 7),
    accumulate=st.integers(1, 3),
    stop=st.integers(0, 12),
)
def test_every_example_once_wherever_it_is_resumed(count, size, replicas, window, accumulate, stop):
    source = [{"y": np.arange(i % 5)} for i in range(count)]
    options = {"backend": Replicas(replicas), "lookahead": window, "accumulation_steps": accumulate}
    whole = list(made(source, size, **options))
    stopped = made(source, size, **options)
    first = list(itertools.islice(stopped, stop))
    state = stopped.state_dict()
    kept = state["step"] if state["epoch"] == 0 else len(first)
    resumed = made(source, size, **options)
    resumed.load_state_dict(state)
    rest = list(resumed) if state["epoch"] == 0 else []
    assert len(whole) % accumulate == 0
    for steps in (whole, first[:kept] + rest):
        indices = [i for step in steps for batch in step for i in batch.indices]
        assert [i for i in indices if i >= 0] == list(range(count))


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(0, 40), batch=st.integers(1, 9), replicas=st.lists(st.integers(1, 4), min_size=2, max_size=2),
    stop=st.integers(0, 9),
)  # fmt: skip
def test_a_sampler_resumes_with_another_number_of_replicas(count, batch, replicas, stop):
    source = [{"y": np.arange(i % 7)} for i in range(count)]
    sampler = distpad.LengthSampler([i % 7 for i in range(count)], global_batch_size=batch, seed=1)
    before, after = (made((source, sampler), None, backend=Replicas(n), lookahead=3) for n in replicas)
    steps = list(itertools.islice(before, stop))
    after.load_state_dict(before.state_dict())
    if after.state_dict()["epoch"] == 0:
        steps += after
    found = [sorted(i for part in step for i in part.indices if i >= 0) for step in steps]
    assert found == [sorted(step) for step in sampler.plan(0)]


# -- threads and memory -----------------------------------------------------------------------------------------------


@pytest.mark.wide
def test_memory_does_not_grow_over_10000_steps():
    """The peak of the second half is at most that of the first plus two windows of examples.

    TensorFlow's own allocations are counted as live tensors, since 2.15 leaks 16 bytes per tensor in any program.
    """

    class Source:
        def __iter__(self):
            for i in range(20_000):
                yield {"y": np.zeros([1 + i % 50], np.int64)}

    def held():
        gc.collect()
        ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, "*/tensorflow/*")])
        tensors = sum(isinstance(thing, tf.Tensor) for thing in gc.get_objects())
        return np.array([sum(trace.size for trace in ours.traces), tensors])

    tracemalloc.start()
    try:
        largest = np.zeros([2, 2], int)
        for step, _ in enumerate(made(Source(), lookahead=16)):
            if step % 500 == 499:
                half = int(step >= 5000)
                largest[half] = np.maximum(largest[half], held())
        assert step == 9_999
        assert (largest[1] < largest[0] + [64 * 1024, 200]).all(), largest
    finally:
        tracemalloc.stop()


def test_reading_ahead_is_bounded():
    read, threads = [], set(threading.enumerate())

    class Source:
        def __iter__(self):
            for i in range(10_000):
                read.append(i)
                yield {"y": [i]}

    for step, _ in enumerate(made(Source(), 1, lookahead=8)):
        time.sleep(0.005)
        assert len(read) <= step + 1 + 3 * 8
        if step == 40:
            break
    assert not set(threading.enumerate()) - threads


def test_the_default_host_merge_uses_sum_and_maximum():
    """A new engine needs only these two for the pipeline."""
    assert base.Backend.host_merge(local.LocalBackend(), np.ones(2), np.ones(3), 1.0)[1].tolist() == [1, 1, 1]


def test_filler_rows_repeat_inputs_but_not_labels():
    """A mean over the positions of an empty row would be 0 / 0; a loss may take its mask from padded labels."""
    source = [{"y": [1, 2]}, {"y": [3]}, {"y": [4, 5]}]
    batches = distpad.PaddedBatches(source, 2, padding={"y": distpad.Pad(value=9)}, tokens="y", buckets=None)
    *_, (x, y, weights) = batches.for_keras(x="y", y="y")
    assert x.numpy().tolist() == [[4, 5], [4, 5]] and y.numpy().tolist() == [[4, 5], [9, 9]]
    assert tf.convert_to_tensor(weights).numpy().tolist() == [[1, 1], [0, 0]]
    *_, batch = batches
    assert batch.data["y"].numpy().tolist() == [[4, 5], [9, 9]] and batch.lengths["y"].numpy().tolist() == [2, 0]


def test_a_batch_counts_as_requested_before_fit_gets_it():
    """Else a thread of tf.data could count one after fit was left, when workers have agreed on the number."""
    batches = distpad.PaddedBatches([{"y": [1]}, {"y": [2]}], 1, padding={"y": distpad.Pad()}, tokens="y")
    progress = batches._progress
    element = progress.consume(progress.open())
    next(element)
    assert progress.requested == 1
    progress.stop()
    with pytest.raises(distpad.DistpadError, match="another has begun"):
        next(element)
    assert progress.requested == 1


@pytest.mark.parametrize("was_left", [False, True])
def test_an_epoch_that_another_worker_left_may_begin_again(was_left):
    progress = distpad.PaddedBatches([{"y": [1]}], 1, padding={"y": distpad.Pad()}, tokens="y")._progress
    running = progress.open()
    progress.begin_epoch(running.cursor)
    running.was_left = was_left
    assert progress.end_epoch(running, is_peek=False, repeats=False) != was_left
    assert (progress.untrained() == running.cursor) == was_left
    progress.stop()
