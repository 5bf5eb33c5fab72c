"""Window syncs between several workers: errors, differences, and slow workers."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest
import tensorflow as tf

import distpad
from replica_world import HANG_S

PADDING = {"y": distpad.Pad()}
WARN_S, SLOW_S = 0.3, 1.5  # the limit of the warning, and a slow worker's reading time
TIMEOUT_S, TOO_SLOW_S = 1.0, 5.0  # the limit of the error, and the reading time that exceeds it


@pytest.fixture(autouse=True)
def _several(world):
    assert world.backend.num_workers > 1


def examples(worker, count=6, dtype=np.int64):
    return [{"y": np.arange(1 + (worker + i) % 4).astype(dtype) + 10 * worker} for i in range(count)]


def made(world, source, size=2, **options):
    return distpad.PaddedBatches(
        source, size, **{"padding": PADDING, "tokens": "y", "buckets": None, "backend": world.backend, **options}
    )


def refused(world, batches, kind, match):
    began = time.monotonic()
    with pytest.raises(kind, match=match):
        for _ in batches:
            pass
    assert time.monotonic() - began < HANG_S


def test_an_error_of_one_worker_reaches_all_with_worker_step_and_message(world):
    worker, last = world.backend.worker_index, world.backend.num_workers - 1

    class Source:
        def __iter__(self):
            yield from examples(worker, 10)
            if worker == last:
                raise OSError("the disk is gone")
            yield from examples(worker, 10)

    batches = made(world, Source(), lookahead=2)
    if worker == last:
        refused(world, batches, OSError, "the disk is gone")
    else:
        refused(world, batches, distpad.PeerError, f"worker {last} failed at step 5 .*OSError: the disk is gone")


def test_a_bad_example_of_one_worker_reaches_all(world):
    worker = world.backend.worker_index
    source = examples(worker)
    if worker == 0:
        source[3] = {"y": np.zeros([2, 2], np.int64)}
    kind = ValueError if worker == 0 else distpad.PeerError
    refused(world, made(world, source), kind, r"'y' of example 3 is of shape \(2, 2\)")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("lookahead", (4, 8)),
        ("buckets", (distpad.Buckets([8]), distpad.Buckets([16]))),
        ("accumulation_steps", (1, 2)),
        ("padding", ({"y": distpad.Pad()}, {"y": distpad.Pad(value=7)})),
    ],
)
def test_configurations_that_differ_are_named_on_all(world, option, values):
    worker = world.backend.worker_index
    batches = made(world, examples(worker), **{option: values[min(worker, 1)]})
    refused(world, batches, ValueError, rf"configurations differ.*{option}.* on worker 0, .* on worker 1")


def test_examples_of_other_dtypes_are_named_on_all(world):
    worker = world.backend.worker_index
    source = examples(worker, dtype=[np.int64, np.int32][min(worker, 1)])
    refused(world, made(world, source), ValueError, r"examples differ.*int64.*worker 0.*int32.*worker 1")


def test_a_worker_without_examples_gets_filler_rows_of_any_dtype(world):
    worker = world.backend.worker_index
    texts = [{"y": np.arange(3), "t": "a", "b": np.ones([2], tf.bfloat16.as_numpy_dtype), "e": np.ones([0, 2])}] * 2
    batches = list(made(world, texts if worker == 0 else []))
    assert len(batches) == 1
    data = {name: local(world, value) for name, value in batches[0].data.items()}
    assert data["t"].tolist() == ([b"a"] * 2 if worker == 0 else [b""] * 2)
    assert data["b"].dtype == tf.bfloat16.as_numpy_dtype and data["e"].shape == (2, 0, 2)


def local(world, value):
    return (world.strategy.experimental_local_results(value)[0] if world.strategy else value).numpy()


def test_a_late_first_example_that_differs_is_refused_on_all(world):
    """With windows of two steps, worker 1 gets its first example in the second window."""
    worker = world.backend.worker_index
    source = [{"y": np.ones([n], np.int64), "v": np.ones([1 if worker == 1 else 2])} for n in (2, 2, 1, 1, 1, 1)]
    buckets = distpad.Buckets([1, 2])
    sampler = distpad.LengthSampler([2, 2, 1, 1, 1, 1], max_tokens=2, buckets=buckets, shuffle=False)
    kind = ValueError if worker == 1 else distpad.PeerError
    refused(
        world, made(world, (source, sampler), None, lookahead=2), kind, r"the examples of worker 1 differ.*\[1\].* here"
    )


def test_a_padding_value_that_the_dtype_cannot_hold_is_refused_on_all(world):
    """Also if only one worker pads."""
    worker = world.backend.worker_index
    source = [{"y": np.arange(1 + i * (worker == 1), dtype=np.uint8)} for i in range(4)]
    batches = made(world, source, padding={"y": distpad.Pad(value=-1)})
    refused(world, batches, (ValueError, distpad.PeerError), r"Pad\(value=-1\), expected a value that uint8 can hold")


def test_a_forgotten_shard_is_refused_unless_replicated(world):
    refused(world, made(world, examples(0)), ValueError, r"same examples on all .*dataset\.shard")
    assert sum(1 for _ in made(world, examples(0), replicated=True)) == 3


def test_equal_examples_of_a_sampler_are_accepted(world):
    source = [{"y": np.ones([3], np.int64)}] * 12
    sampler = distpad.LengthSampler([3] * 12, global_batch_size=12)
    assert sum(1 for _ in made(world, (source, sampler), None)) == 1


def test_a_slow_worker_is_named(world, caplog):
    worker, last = world.backend.worker_index, world.backend.num_workers - 1

    class Source:
        def __iter__(self):
            for i, example in enumerate(examples(worker)):
                time.sleep(SLOW_S if worker == last and i == 1 else 0)
                yield example

    with caplog.at_level(logging.WARNING, "distpad"):
        assert sum(1 for _ in made(world, Source(), warn_after_s=WARN_S)) == 3
    assert f"worker {last} is still reading" in caplog.text


def test_a_worker_that_is_too_slow_ends_all(world):
    worker, last = world.backend.worker_index, world.backend.num_workers - 1

    class Source:
        def __iter__(self):
            time.sleep(TOO_SLOW_S if worker == last else 0)
            yield from examples(worker)

    kind = distpad.DistpadError if worker == last else distpad.PeerError
    refused(
        world,
        made(world, Source(), warn_after_s=WARN_S, timeout_s=TIMEOUT_S),
        kind,
        f"worker {last} is still reading .*timeout_s",
    )


def test_leaving_together_and_beginning_again(world):
    batches = made(world, examples(world.backend.worker_index), lookahead=1)
    for _ in range(3):
        assert isinstance(next(iter(batches)), distpad.Batch)
    assert sum(1 for _ in batches) == 3
