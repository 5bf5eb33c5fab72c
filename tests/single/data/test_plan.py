"""The plan of a window: merged reports, compared with a loop over all workers' steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distpad
from distpad.data import plan

NAMES = ["feature 0", "feature 1"]
AXES = len(NAMES)


def made(accumulation_steps=1, buckets=None):
    options = {"accumulation_steps": accumulation_steps, "buckets": buckets and dict(zip(NAMES, buckets))}
    return distpad.PaddedBatches([], 1, padding=dict.fromkeys(NAMES, distpad.Pad()), tokens=NAMES[0], **options)


def blank(window: int) -> plan.Report:
    return plan.Report.blank(made()._config, window)


def report(window: int, rows: list[int], failed_at: int | None, seed: int) -> plan.Report:
    """The report of a worker with these numbers of rows in its steps."""
    random = np.random.default_rng(seed)
    one = blank(window)
    for step, count in enumerate(rows):
        if count:
            one.longest[step] = random.integers(0, 20, AXES)
            one.tokens[step] = random.integers(0, 50)
            one.sequences[step] = random.integers(0, count + 1)
        one.rows[step] = count
    one.failed_at = failed_at
    return one


def merged(reports, *, window, accumulation_steps=1, buckets=None, full_rows=None):
    packed = [plan.pack(each, worker, len(reports)) for worker, each in enumerate(reports)]
    batches = made(accumulation_steps, buckets)
    return plan.merge(
        np.max([maxima for maxima, _ in packed], axis=0),
        np.sum([sums for _, sums in packed], axis=0),
        config=batches._config,
        window=window,
        workers=len(reports),
        full_rows=full_rows,
        sizes_of=lambda _, agreed: batches._source.padded_sizes(0, 0, agreed),
    )


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_plans_equal_a_loop_over_the_workers(data):
    accumulate = data.draw(st.integers(1, 3))
    window = accumulate * data.draw(st.integers(1, 4))
    reports = []
    for worker in range(data.draw(st.integers(1, 4))):
        count = data.draw(st.integers(0, window))
        rows = data.draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
        failed_at = data.draw(st.sampled_from([None, None, len(rows)])) if len(rows) < window else None
        reports.append(report(window, rows, failed_at, seed=worker))
    found = merged(reports, window=window, accumulation_steps=accumulate)

    failures = [(each.failed_at, worker) for worker, each in enumerate(reports) if each.failed_at is not None]
    assert found.failure == (min(failures) if failures else None)
    with_data = max((np.flatnonzero(each.rows)[-1] + 1 for each in reports if each.rows.any()), default=0)
    steps = -(-with_data // accumulate) * accumulate
    if failures:
        steps = min(steps, min(failures)[0] // accumulate * accumulate)
    assert len(found.steps) == steps
    assert found.is_last == (not failures and steps < window)
    for k, step in enumerate(found.steps):
        group = slice(k // accumulate * accumulate, k // accumulate * accumulate + accumulate)
        assert step.agreed == step.sizes
        # a step without rows has the sizes of the step before it
        real = max(i for i in range(group.start, k + 1) if any(each.rows[i] for each in reports))
        assert step.agreed == tuple(max(1, max(int(each.longest[real, a]) for each in reports)) for a in range(AXES))
        assert step.rows == sum(each.rows[k] for each in reports)
        assert step.tokens == sum(each.tokens[group].sum() for each in reports)
        assert step.sequences == sum(each.sequences[group].sum() for each in reports)


def test_a_step_takes_the_highest_boundary_that_a_feature_needs():
    buckets = [distpad.Buckets([5, 30]), distpad.Buckets([7, 40])]
    one = blank(2)
    one.longest[:] = [[5, 7], [2, 8]]
    one.rows[:] = 1
    found = merged([one], window=2, buckets=buckets)
    assert [step.sizes for step in found.steps] == [(5, 7), (30, 40)]


def test_dropping_ends_before_the_first_step_that_is_not_full():
    reports = [report(4, [2, 2, 2, 2], None, 0), report(4, [2, 2, 1], None, 1)]
    found = merged(reports, window=4, full_rows=4)
    assert (len(found.steps), found.is_last) == (2, True)
    assert len(merged(reports, window=4, full_rows=4, accumulation_steps=2).steps) == 2


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_failure_after_the_end_of_the_epoch_is_dropped(accumulate):
    reports = [report(6, [2, 2, 2], 3, 0), report(6, [2, 2, 1, 2], None, 1)]
    found = merged(reports, window=6, full_rows=4, accumulation_steps=accumulate)
    assert (len(found.steps), found.is_last, found.failure) == (2 // accumulate * accumulate, True, None)
    found = merged([report(6, [2, 2, 2], 3, 0)], window=6, full_rows=2, accumulation_steps=accumulate)
    assert (len(found.steps), found.failure) == (3 // accumulate * accumulate, plan.Failure(3, 0))


def test_steps_that_complete_a_group_add_no_shape():
    one = blank(4)
    one.longest[:3], one.rows[:3] = [[9, 9], [9, 9], [2, 2]], 1
    buckets = [distpad.Buckets([1, 4, 9])] * AXES
    assert [step.sizes for step in merged([one], window=4, buckets=buckets, accumulation_steps=4).steps][2:] == [
        (4, 4)
    ] * 2
    assert merged([one], window=4, buckets=buckets, accumulation_steps=4).steps[3].rows == 0


def test_the_size_of_a_message_does_not_depend_on_the_number_of_workers():
    sizes = {tuple(map(len, plan.pack(report(8, [3], None, 0), 0, workers))) for workers in (1, 2, 1000)}
    assert sizes == {(4 + 8 * AXES, 1 + 3 * 8 + 2 * 8)}


def test_differences_name_key_values_and_workers():
    texts = [json.dumps({"window": 32, "same": [1]}), "", json.dumps({"window": 16, "same": [1]})]
    assert plan.differences(texts) == ["window is 32 on worker 0, 16 on worker 2"]


def test_floats_hold_fingerprints_exactly():
    prints = [plan.fingerprint(str(i)) for i in range(1000)]
    assert len(set(prints)) == 1000 and all(p == int(p) < 2**48 for p in prints)
