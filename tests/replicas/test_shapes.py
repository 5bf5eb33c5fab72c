"""Traces of a step that is fed by PaddedBatches: as many as there are boundaries, at the same steps on all workers."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

import distpad

BOUNDARIES, SIZE, STEPS = 3, 2, 24
PADDING = {"image": distpad.Pad(), "label": distpad.Pad()}


def examples(worker: int, count: int, a_step: int) -> list[dict]:
    """Widths and lengths that hardly go together; each worker's are others, but all have steps of short ones."""
    random, scale = np.random.default_rng([3, worker]), np.random.default_rng(4).random([STEPS, 2])
    sizes = random.random([count, 2]) * np.repeat(scale, a_step, axis=0)[:count] * [60, 12]
    return [{"image": np.ones([1 + int(w), 4], np.float32), "label": np.ones([int(n)], np.int64)} for w, n in sizes]


def epoch(world, buckets) -> tuple[list[int], int]:
    """The steps at which the step was traced, and how many there were."""
    worker, here = world.backend.worker_index, world.backend.replicas_here
    source = examples(worker, STEPS * SIZE * here - worker, SIZE * here)

    def step(batch: distpad.Batch) -> tf.Tensor:
        assert None not in [*batch.data["image"].shape, *batch.data["label"].shape]
        return tf.reduce_sum(batch.data["image"])

    run = tf.function(lambda batch: world.strategy.run(step, args=(batch,)) if world.strategy else step(batch))
    traced, steps = [], 0
    for number, batch in enumerate(
        distpad.PaddedBatches(source, SIZE, padding=PADDING, tokens="label", buckets=buckets, backend=world.backend)
    ):
        before = run.experimental_get_tracing_count()
        run(batch)
        steps += 1
        traced += [number] * (run.experimental_get_tracing_count() - before)
    return traced, steps


def test_two_ragged_features_make_no_more_traces_than_rungs_and_at_the_same_steps(world):
    buckets = {"image": distpad.Buckets([20, 40, 60]), "label": distpad.Buckets([4, 8, 12])}
    traced, steps = epoch(world, buckets)
    assert steps == STEPS and 1 < len(traced) <= BOUNDARIES
    at = np.zeros([STEPS])
    at[traced] = 1
    np.testing.assert_array_equal(world.backend.host_sum(at), at * world.backend.num_workers)
    free, _ = epoch(world, None)
    assert len(free) > 2 * BOUNDARIES  # what buckets save
