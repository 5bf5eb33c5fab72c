"""The loss inputs of a batch, the default shapes of batches, and the weights of fit."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from test_batches import Replicas

import distpad

PADDING = {"y": distpad.Pad()}
EXAMPLES = [{"y": [1, 2, 3], "w": 0.5}, {"y": [], "w": 1.0}, {"y": [4], "w": 2.0}, {"y": [5, 6], "w": 0.0}, {"y": [7]}]
for example in EXAMPLES:
    example.setdefault("w", 1.0)


def made(source=EXAMPLES, size=2, **options):
    return distpad.PaddedBatches(source, size, **{"padding": PADDING, "tokens": "y", "buckets": None, **options})


# -- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "local"), [(None, [[[3, 1], [3, 2]], [[1, 1], [0, 0]]]),
                                                ("w", [[[1.5, 1], [2, 1]], [[1, 1], [0, 0]]])])  # fmt: skip
def test_each_replica_has_its_own_counts_beside_those_of_all(weights, local):
    steps = list(made(backend=Replicas(2), weights=weights))
    assert len(steps) == 2
    for step, expected in zip(steps, local):
        assert [batch.counts.local.tolist() for batch in step] == expected
        for batch in step:
            assert batch.counts.replicas == 2 and batch.counts.local.dtype == np.float64
            assert (batch.counts.tokens, batch.counts.sequences) == tuple(np.sum(expected, axis=0))


def test_local_counts_are_of_one_micro_batch_and_global_ones_of_the_group():
    first, second = made(accumulation_steps=2, size=3)
    assert [b.counts.local.numpy().tolist() for b in (first, second)] == [[4, 2], [3, 2]]
    assert float(first.counts.tokens) == float(second.counts.tokens) == 7


def test_a_batch_carries_the_arguments_of_its_loss():
    (batch,) = made(size=5)
    lengths, weights, counts = batch.loss_inputs
    assert weights == () and counts is not None and type(counts) is distpad.Counts
    assert lengths.numpy().tolist() == [3, 0, 1, 2, 1]
    tf.nest.map_structure(lambda leaf: leaf.numpy(), batch)  # every leaf is a tensor
    (batch,) = made(size=5, weights="w")
    assert batch.loss_inputs.sample_weight.numpy().tolist() == [0.5, 1.0, 2.0, 0.0, 1.0]
    assert isinstance(batch.loss_inputs.counts, distpad.WeightedCounts)
    (batch,) = made(size=5, tokens={"a": "y", "b": "y"}, weights={"b": "w"})
    assert set(batch.loss_inputs) == {"a", "b"} and batch.loss_inputs["a"].sample_weight == ()
    assert batch.loss_inputs["b"].sample_weight.shape == [5]


@pytest.mark.parametrize(("of_weights", "of_labels"), [([2, 9], [4, 12]), ([8, 9], [3, 12]), ([3, 9], [3, 12])])
def test_weights_of_positions_are_as_wide_as_the_labels(of_weights, of_labels):
    source = [{"y": [1, 2], "w": [0.5, 2.0]}, {"y": [3], "w": [4.0]}]
    padding = {"y": distpad.Pad(), "w": distpad.Pad(value=np.nan)}
    buckets = {"y": distpad.Buckets(of_labels), "w": distpad.Buckets(of_weights)}
    (batch,) = made(source, padding=padding, weights="w", buckets=buckets)
    given = batch.loss_inputs.sample_weight.numpy()
    assert given.shape == batch.data["y"].shape == (2, of_labels[0])
    assert given[0, :2].tolist() == [0.5, 2.0] and given[1, 0] == 4.0 and float(batch.counts.tokens) == 6.5


def test_traces_do_not_grow_over_the_steps_of_an_epoch():
    traces = []

    @tf.function
    def step(batch):
        traces.append(1)
        return batch.counts.tokens + tf.reduce_sum(batch.loss_inputs.counts.local)

    for batch in made([{"y": [i] * (1 + i % 3)} for i in range(40)], buckets="auto"):
        step(batch)
    assert len(traces) == 1


# -- areas ------------------------------------------------------------------------------------------------------------

SHAPES = [(3, 2), (1, 5), (0, 4), (2, 2), (4, 1)]


@pytest.mark.parametrize("axes", [(0, 1), (1, 0)])
@pytest.mark.parametrize("weights", [None, "scalar", "each"])
def test_two_ragged_axes_are_counted_as_areas(axes, weights):
    """The loss of all batches equals NumPy's mean over all positions of all examples."""
    random = np.random.default_rng(0)
    source = [
        {"y": random.normal(size=shape), "scalar": np.float64(i % 3), "each": random.uniform(size=shape)}
        for i, shape in enumerate(SHAPES)
    ]
    padding = {"y": distpad.Pad(axes, value=99.0), "each": distpad.Pad(axes, value=np.nan)}
    loss_fn = distpad.DistributedLoss(lambda y_true, y_pred: tf.square(y_true - y_pred))
    total = count = found = 0.0
    for batch in made(source, 3, padding=padding, weights=weights):
        given = batch.loss_inputs
        assert given.sample_weight.shape == batch.data["y"].shape and given.sample_weight.dtype == tf.float32
        assert float(tf.reduce_sum(given.sample_weight)) == pytest.approx(float(given.counts.tokens), rel=1e-6)
        assert given.counts.local.numpy().tolist() == [float(given.counts.tokens), float(given.counts.sequences)]
        value = loss_fn(batch.data["y"], tf.zeros_like(batch.data["y"]), given.sample_weight,
                        mask=given.sample_weight > 0, denominator=given.counts.tokens)  # fmt: skip
        found += float(value) * float(given.counts.tokens)
        count += float(given.counts.tokens)
    for example in source:
        w = {None: 1.0, "scalar": example["scalar"], "each": example["each"]}[weights]
        total += (w * example["y"] ** 2).sum()
    areas = sum((np.ones(e["y"].shape) * (1.0 if weights is None else e[weights])).sum() for e in source)
    assert count == pytest.approx(areas) and found == pytest.approx(total, rel=1e-6)


def test_fit_is_given_areas_as_weights():
    source = [{"y": np.ones(shape)} for shape in SHAPES[:2]]
    ((_, y, weights),) = made(source, 3, padding={"y": distpad.Pad((0, 1))}).for_keras(x="y", y="y")
    assert weights.shape == y.shape == (3, 3, 5) and weights.numpy().sum(axis=(1, 2)).tolist() == [6, 5, 0]
    assert weights.numpy()[0, :3, :2].all() and weights.numpy()[1, 0].all()


# -- shapes by default ------------------------------------------------------------------------------------------------


def test_forty_steps_of_random_lengths_make_few_traces():
    random = np.random.default_rng(1)
    source = [{"x": np.ones([n, 2]), "y": np.arange(m)} for n, m in zip(*random.integers(1, 60, [2, 320]))]
    padding = {"x": distpad.Pad(), "y": distpad.Pad()}
    shapes = {}
    for buckets in ("auto", None):
        steps = list(made(source, 8, padding=padding, buckets=buckets))
        assert len(steps) == 40
        shapes[buckets] = {(b.data["x"].shape[1], b.data["y"].shape[1]) for b in steps}
    assert len(shapes["auto"]) <= 6 < 30 < len(shapes[None])
    assert {size for shape in shapes["auto"] for size in shape} <= {16, 20, 25, 32, 40, 50, 64}


def test_the_lengths_of_a_sampler_have_eight_boundaries_and_other_features_the_endless_ones():
    random = np.random.default_rng(2)
    source = [{"y": np.arange(n), "z": np.arange(2 * n + 70)} for n in random.integers(1, 300, 400)]
    lengths = [len(e["y"]) for e in source]
    padding = {"y": distpad.Pad(), "z": distpad.Pad()}
    sampler = distpad.LengthSampler(lengths, global_batch_size=8)
    best = distpad.Buckets.from_lengths(lengths, 8)
    for step, batch in zip(sampler.plan(0), made((source, sampler), None, padding=padding, buckets="auto")):
        longest = max(lengths[i] for i in step)
        assert batch.data["y"].shape[1] == best(longest)
        assert batch.data["z"].shape[1] == distpad.Buckets.auto()(2 * longest + 70)
    own = distpad.Buckets([50, 100, 300])
    sampler = distpad.LengthSampler(lengths, max_tokens=3000, buckets=own)
    shapes = {b.data["y"].shape[1] for b in made((source, sampler), None, padding=padding, buckets="auto")}
    assert shapes == {50, 100, 300}
    exact = distpad.LengthSampler(lengths, max_tokens=3000)  # more padding would exceed max_tokens
    for batch in made((source, exact), None, padding=padding, buckets="auto"):
        assert batch.data["y"].shape[0] * batch.data["y"].shape[1] <= 3000


def test_the_default_is_auto():
    (batch,) = distpad.PaddedBatches(EXAMPLES, 5, padding=PADDING, tokens="y")
    assert batch.data["y"].shape == [5, 16] and batch.lengths["y"].numpy().tolist() == [3, 0, 1, 2, 1]
    with pytest.raises(ValueError, match="buckets is 'best', expected one of 'auto'"):
        made(buckets="best")


# -- one label a sequence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "expected"), [(None, [1, 1, 1, 1, 1, 0]), ("w", [0.5, 1, 2, 0, 1, 0])])
def test_one_label_a_sequence_has_one_weight_a_row(weights, expected):
    """An empty text has a label; a filler row has none."""
    source = [{**example, "label": i, "vector": np.ones(2)} for i, example in enumerate(EXAMPLES)]
    for y in ("label", "vector", ("label", "vector")):
        dataset = made(source, 6, weights=weights).for_keras(x="y", y=y)
        ((_, _, found),) = dataset
        assert dataset.element_spec[2].shape.as_list() == [6] and found.numpy().tolist() == expected
    losses = {"text": "y", "class": "y"}
    ((_, _, found),) = made(source, 6, tokens=losses).for_keras(x="y", y={"text": "y", "class": "label"})
    assert found["text"].shape == [6, 3] and found["class"].numpy().tolist() == [1, 1, 1, 1, 1, 0]
    source = [{**e, "v": [1.0] * len(e["y"]), "label": 0} for e in EXAMPLES]
    padding = {"y": distpad.Pad(), "v": distpad.Pad()}
    with pytest.raises(ValueError, match="weights 'v' is one per position, expected one per example"):
        made(source, padding=padding, weights="v").for_keras(x="y", y="label")
