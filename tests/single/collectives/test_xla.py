"""XLA drops assertions: a check that fails inside XLA makes the loss and all gradients NaN."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
from distpad.collectives import checked


def test_whether_xla_compiles():
    """This test notices if TensorFlow changes how it marks conditionals, which is_compiling reads."""
    found = {}

    @tf.function
    def plain():
        found["plain"] = checked.is_compiling()

    @tf.function
    def inner():
        found["inner"] = checked.is_compiling()

    @tf.function(jit_compile=True)
    def compiled():
        found["compiled"] = checked.is_compiling()
        inner()

    plain()
    compiled()
    assert found == {"plain": False, "compiled": True, "inner": True}
    assert not checked.is_compiling()


def run(loss_fn, **given):
    """Return the loss and its gradients towards the predictions and a scale, compiled by XLA."""
    scale, x = tf.Variable(1.0), tf.Variable(tf.ones([2, 3, 2]))

    @tf.function(jit_compile=True)
    def step(given):
        with tf.GradientTape() as tape:
            loss = loss_fn(tf.zeros([2, 3, 2]), x * scale, **given)
        return loss, *tape.gradient(loss, [x, scale])

    given = {name: tf.convert_to_tensor(value) for name, value in given.items()}
    return [np.asarray(part) for part in step(given)]


RIGHT = {"lengths": [3, 1]}
WRONG = {
    "a length above the axis": {"lengths": [9, 1]},
    "all lengths above the axis": {"lengths": [9, 9]},
    "a negative length": {"lengths": [3, -1]},
    "a negative denominator": {"lengths": [3, 1], "denominator": -3.0},
    "a length above the axis beside a denominator": {"lengths": [9, 1], "denominator": 4.0},
}


@pytest.mark.parametrize("average", ["token", pytest.param("sequence_mean", marks=pytest.mark.wide)])
@pytest.mark.parametrize("case", WRONG)
def test_a_check_that_fails_is_nan(case, average):
    loss_fn = distpad.DistributedLoss(tf.keras.losses.MeanSquaredError(), average=average)
    for part in run(loss_fn, **WRONG[case]):
        assert np.isnan(part).all()
    if case == "a negative length":
        for part in run(loss_fn, **RIGHT):
            assert np.isfinite(part).all() and part.any()


def test_shapes_that_only_show_when_it_is_compiled():
    """A mask of a wrong shape, in a function of unknown shapes."""
    loss_fn = distpad.DistributedLoss("mae")
    spec = [tf.TensorSpec([None, None, 1]), tf.TensorSpec([None, None], tf.bool)]

    @tf.function(jit_compile=True, input_signature=spec)
    def step(x, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = loss_fn(tf.zeros_like(x), x, mask=mask)
        return loss, tape.gradient(loss, x)

    assert [np.isfinite(part).all() for part in step(tf.ones([2, 3, 1]), tf.ones([2, 3], tf.bool))] == [True, True]
    for shape in ([2, 5], [2, 2], [1, 3]):
        for part in step(tf.ones([2, 3, 1]), tf.ones(shape, tf.bool)):
            assert np.isnan(part).all()


@pytest.mark.parametrize("counts", ["other positions", "another number of replicas"])
def test_counts_that_are_not_those_of_the_step(counts):
    local = [3.0, 2.0] if counts == "other positions" else [4.0, 2.0]
    replicas = 2.0 if counts == "another number of replicas" else 1.0
    given = distpad.Counts(*(tf.constant(n, tf.float64) for n in (4.0, 2.0, local, replicas)))
    for part in run(
        lambda t, p, lengths: distpad.DistributedLoss("mse")(t, p, lengths=lengths, denominator=given), **RIGHT
    ):
        assert np.isnan(part).all()


def test_outside_the_replicas_of_a_strategy():
    """Keras 3 traces a model once outside any replica; a run of that trace gives NaN."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    loss_fn = distpad.DistributedLoss("mse", backend=strategy)
    for part in run(loss_fn, **RIGHT):
        assert np.isnan(part).all()


def test_clipping_by_a_negative_norm():
    @tf.function(jit_compile=True)
    def step(limit):
        return distpad.clip_by_global_norm([tf.constant([3.0, 4.0])], limit)[0][0]

    assert np.allclose(step(tf.constant(1.0)), [0.6, 0.8])
    assert np.isnan(step(tf.constant(-1.0))).all()


def test_a_metric():
    metric = distpad.metrics.MaskedMean(lambda t, p: abs(t - p))

    @tf.function(jit_compile=True)
    def update(lengths):
        metric.update_state(tf.zeros([2, 3]), tf.ones([2, 3]), lengths=lengths)

    update(tf.constant([3, 1]))
    assert float(metric.result()) == 1.0
    update(tf.constant([9, 1]))
    assert np.isnan(metric.result())


@pytest.mark.parametrize("buckets", [None, distpad.Buckets([4])])
def test_padding_to_a_length_that_is_refused(buckets):
    """Integers have no NaN: the run fails for these lengths."""

    @tf.function(jit_compile=True)
    def pad(lengths):
        return distpad.pad_to_global_max(tf.ones([2, 3], tf.int32), lengths=lengths, buckets=buckets).mask

    assert pad(tf.constant([2, 1])).numpy().sum() == 3
    with pytest.raises(tf.errors.InvalidArgumentError, match="must be non-negative"):
        pad(tf.constant([9, 1]))


def test_half_precision_and_no_valid_position():
    loss_fn = distpad.DistributedLoss("mse")

    @tf.function(jit_compile=True)
    def step(x, lengths):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = loss_fn(tf.zeros_like(x), x, lengths=lengths)
        return loss, tape.gradient(loss, x)

    x = tf.ones([2, 3, 1], tf.float16)
    assert [float(tf.reduce_sum(tf.abs(part))) for part in step(x, tf.constant([0, 0]))] == [0, 0]
    for part in step(x, tf.constant([4, 0])):
        assert np.isnan(part).all()
