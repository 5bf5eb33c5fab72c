"""on_error="skip" with several workers: one skips what the others do not, and all know it."""

from __future__ import annotations

import numpy as np
import pytest

import distpad

COUNT = 12


def made(world, bad, **options):
    """Worker w has 12 + w examples; ``bad`` are a worker's bad ones, which raise or, the odd ones, do not fit."""
    worker = world.backend.worker_index

    class Source:
        def __len__(self):
            return COUNT + worker

        def __getitem__(self, index):
            if index in bad(worker) and not index % 2:
                raise OSError("damaged")
            return {"y": np.full(1 + index % 3, index, np.float32 if index in bad(worker) else np.int64)}

    given = {
        "padding": {"y": distpad.Pad()},
        "tokens": "y",
        "buckets": None,
        "lookahead": 4,
        "on_error": "skip",
        "replicated": True,
    }
    return distpad.PaddedBatches(Source(), 2, **given, backend=world.backend, **options)


def found(world, batches):
    """The indices of this worker, and of each step its rows and its global tokens."""
    indices, rows, tokens = [], [], []
    for batch in batches:
        parts = [part.numpy() for each in world.backend.local_results(batch) for part in [each.indices]]
        real = np.concatenate(parts)
        indices += real[real >= 0].tolist()
        rows.append(int((real >= 0).sum()))
        tokens.append(float(world.backend.local_results(batch)[0].counts.tokens))
    return indices, rows, tokens


def test_all_workers_note_the_skipped_examples_of_each(world):
    workers, worker = world.backend.num_workers, world.backend.worker_index
    bad = lambda of: {1, 4, 5} if of == workers - 1 else {COUNT - 1} if of == 0 else set()
    batches = made(world, bad)
    for epoch in (1, 2):
        indices, _, tokens = found(world, batches)
        assert sorted(indices) == [i for i in range(COUNT + worker) if i not in bad(worker)]
        wanted = sorted((of, i) for of in range(workers) for i in bad(of))
        assert sorted((each.worker, each.example) for each in batches.stats.skipped) == sorted(wanted * epoch)
        assert sum(tokens) == sum(1 + i % 3 for of in range(workers) for i in range(COUNT + of) if i not in bad(of))


def test_a_step_that_all_workers_skip_is_empty_and_not_the_end(world):
    step = 2 * world.backend.replicas_here
    batches = made(world, lambda _: {*range(step, 2 * step)})
    indices, rows, tokens = found(world, batches)
    assert rows[:3] == [step, 0, step] and tokens[1] == 0
    assert len(indices) == COUNT + world.backend.worker_index - step


def test_more_than_the_limit_is_an_error_on_all_workers(world):
    batches = made(world, lambda worker: {3, 4} if worker == world.backend.num_workers - 1 else set(), max_skipped=1)
    with pytest.raises(
        distpad.DistpadError, match=f"2 of the first .*example 3 of worker {world.backend.num_workers - 1}"
    ):
        found(world, batches)


def test_a_worker_whose_examples_are_all_skipped_learns_the_features(world):
    last = world.backend.num_workers - 1
    batches = made(
        world, lambda worker: {*range(0, 2 * COUNT)} - {*range(1, 2 * COUNT, 2)} if worker == last else set()
    )
    indices, _, _ = found(world, batches)
    assert {i % 2 for i in indices} == ({1} if world.backend.worker_index == last else {0, 1})
