"""The loss inputs of a batch on each replica, and batches that were made for another engine."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import test_for_keras as feeding
from test_batches import epoch_of, examples_of, made
from test_for_keras import collected  # noqa: F401 (a fixture)

import distpad
from distpad import backends

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")


def test_local_counts_sum_up_to_the_global_ones(world):
    """The counts have weights and several micro-batches a step; the last steps of some replicas are empty."""
    worker, here = world.backend.worker_index, world.backend.replicas_here
    assert world.backend.num_replicas == world.num_replicas
    examples = [{**example, "w": np.float32(i % 3)} for i, example in enumerate(examples_of(worker, 7 + 5 * worker))]
    options = {"tokens": {"plain": "y", "weighted": "y"}, "weights": {"weighted": "w"}, "accumulation_steps": 2}
    epoch = epoch_of(world, made(world, examples, 2, **options))
    by_id = {int(example["id"]): example for example in examples}
    totals = np.zeros([len(epoch), 2, 2])
    for k, step in enumerate(epoch):
        assert len(step) == here
        for batch in step:
            mine = [by_id[int(i)] for i in batch.data["id"][: batch.rows]]
            plain, weighted = (batch.loss_inputs[name].counts for name in ("plain", "weighted"))
            assert plain.local.tolist() == [sum(len(e["y"]) for e in mine), sum(len(e["y"]) > 0 for e in mine)]
            weights = [float(e["w"]) * len(e["y"]) for e in mine]
            assert weighted.local.tolist() == [sum(weights), sum(w > 0 for w in weights)]
            assert plain.replicas == weighted.replicas == world.num_replicas and plain.local.dtype == np.float64
            np.testing.assert_array_equal(batch.loss_inputs["weighted"].sample_weight, batch.data["w"])
            np.testing.assert_array_equal(batch.loss_inputs["plain"].lengths, batch.lengths["y"])
            assert batch.loss_inputs["plain"].sample_weight == ()
            totals[k] += [plain.local, weighted.local]
    totals = world.backend.host_sum(totals)
    for k, step in enumerate(epoch):
        wanted = totals[k // 2 * 2 : k // 2 * 2 + 2].sum(axis=0).tolist()
        for batch in step:
            assert [list(batch.counts[name][:2]) for name in ("plain", "weighted")] == wanted


def test_one_trace_serves_all_steps(world):
    traces = []

    def step(batch):
        traces.append(1)
        return batch.loss_inputs.counts.local[0] / batch.counts.tokens

    run = tf.function(lambda batch: world.strategy.run(step, args=(batch,)) if world.strategy else step(batch))
    examples = [{"x": np.ones([n, 2]), "y": np.arange(n)} for n in range(1, 15)] * world.num_replicas
    batches = made(world, examples, 2, buckets="auto", replicated=True)
    contributions = [run(batch) for batch in batches]
    assert len(contributions) > 3 and len(traces) == (world.backend.replicas_here if world.strategy else 1)


def test_batches_made_for_one_device_are_refused_where_there_are_several(world):
    """The batches are made outside ``strategy.scope()``, or before Horovod is initialised."""
    if world.num_replicas == 1:
        pytest.skip("needs several replicas")
    source = [{"x": np.ones([2, 2]), "y": np.arange(2)}] * 4
    before = backends.alone.run_alone(lambda: made_alone(source))
    with world.scope():
        for _ in range(2):
            with pytest.raises(
                ValueError,
                match=rf"backend is an engine of 1 replicas, .*the active one, of {world.num_replicas} replicas",
            ):
                next(iter(before))
        assert len(list(made_alone(source, backend="local"))) == 2, "who says so means it"
    if world.several_workers:
        with (
            world.scope(),
            pytest.raises(ValueError, match=r"backend is an engine of 1 workers, detected in the constructor"),
        ):
            before.for_keras(x="x", y="y")


def made_alone(source, **options):
    padding = {"x": distpad.Pad(), "y": distpad.Pad()}
    return distpad.PaddedBatches(source, 2, padding=padding, tokens="y", **options)


def test_fit_deals_out_the_rows_of_batches_that_were_made_outside_its_scope(world):
    """On one worker, Keras deals the rows of a batch for one device to the replicas; the mean stays the same."""
    if world.several_workers:
        pytest.skip("refused there, see above")
    data = feeding.examples(21)
    batches = distpad.PaddedBatches(data, 6, padding=feeding.PADDING, tokens="y")
    model = feeding.model_in(world)
    history = feeding.fit(world, model, (batches.for_keras(x="x", y="y"), {}))
    steps = [data[k : k + 6] for k in range(0, 21, 6)]
    feeding.check(model, history, *feeding.expected([steps]))
