"""Pre-padded and truncated features: the loss, the metrics and fit in every engine average over the real positions.

Padding is NaN and labels of a class, so that a mask on the wrong side gives NaN or other numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import test_fit_counts as fitting
import test_for_keras as feeding
from test_for_keras import collected  # noqa: F401 (the fixture collects the iterators of fit)

import distpad
import oracle
from keras_world import KERAS

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")
CUT = {"max_length": 4, "truncating": "pre"}


def padding(**options):
    values = {"x": np.nan, "y": 3, "w": np.nan}
    return {name: distpad.Pad(side="pre", value=value, **options) for name, value in values.items()}


def rows_and_batches(world, **options):
    """Two steps' rows in NumPy, cut as the pipeline cuts them, their batches, and the number of positions that are cut;
    the last step is uneven."""
    data = [
        {**e, "w": np.random.default_rng(i).random(len(e["y"]))} for i, e in enumerate(feeding.examples(40, seed=9))
    ]
    size = 2 * world.num_replicas
    data = data[: size + size // 2 + 1]
    sampler = distpad.LengthSampler([len(e["y"]) for e in data], global_batch_size=size, seed=1)
    cut = {"max_length": options.pop("max_length", None), "truncating": options.pop("truncating", "error")}
    batches = feeding.made(world, (data, sampler), padding=padding(**cut), **options)
    kept = slice(-cut["max_length"] if cut["max_length"] else None, None)
    named = lambda i: {name: data[i][name][kept] for name in ("x", "y", "w")}
    lost = sum(len(e[name]) - len(named(i)[name]) for i, e in enumerate(data) for name in ("x", "y", "w"))
    return [[named(i) for i in step if i >= 0] for step in sampler.plan(0)], batches, lost


def by_batch(loss_fn, batch, logits):
    return loss_fn(batch.data["y"], logits, batch=batch)


def by_lengths(loss_fn, batch, logits):
    return loss_fn(batch.data["y"], logits, lengths=batch.lengths["y"])


def by_mask(loss_fn, batch, logits):
    mask = batch.lengths["y"].mask(tf.shape(logits)[1])
    return loss_fn(batch.data["y"], logits, mask=mask, denominator=batch.counts.tokens)


@pytest.mark.parametrize(
    ("way", "options"),
    [
        (by_batch, CUT),
        (by_lengths, CUT),
        pytest.param(by_mask, {}, marks=pytest.mark.wide),
        pytest.param(by_batch, {"weights": "w"}, marks=pytest.mark.wide),
    ],
)
def test_gradients_in_a_loop_are_those_of_one_device(world, way, options):
    weighted = "weights" in options
    kernel, bias = oracle.weights()
    with world.scope():
        variables = [tf.Variable(kernel, dtype=tf.float32), tf.Variable(bias, dtype=tf.float32)]
    loss_fn = distpad.DistributedLoss(fitting.entropy(), backend=world.backend)

    def step(batch):
        with tf.GradientTape() as tape:
            x = batch.data["x"]
            logits = tf.matmul(tf.where(tf.math.is_nan(x), 0.0, x), variables[0]) + variables[1]
            logits = tf.where(tf.math.is_nan(x[..., :1]), np.nan, logits)
            loss = way(loss_fn, batch, logits)
        return world.reduce(distpad.gradient(tape, loss, variables, backend=world.backend))

    steps, batches, lost = rows_and_batches(world, **options)
    for rows, batch in zip(steps, batches, strict=True):
        found = world._each(world.on_all(step)(batch))
        _, *wanted = oracle.cross_entropy(rows, kernel, bias, "token", weighted)
        for gradients in found:
            assert max(map(oracle.relative_error, gradients, wanted)) <= 1e-5
    counted = batches.stats.as_dict()["truncated_positions"]
    assert world.backend.host_sum(np.array([counted], np.float64))[0] == lost


@pytest.mark.parametrize("average", ["token", pytest.param("sequence_sum", marks=pytest.mark.wide)])
def test_one_value_a_sequence_with_pre_padded_labels(world, average):
    loss_fn = distpad.DistributedLoss(
        lambda y, p: tf.reduce_sum(tf.cast(y, tf.float32), 1) * p,
        per="sequence",
        average=average,
        backend=world.backend,
    )
    value = lambda batch: loss_fn.global_value(
        loss_fn(batch.data["y"], tf.ones([tf.shape(batch.data["y"])[0]]), batch=batch)
    )
    steps, batches, _ = rows_and_batches(world)
    for rows, batch in zip(steps, batches, strict=True):
        lengths = [len(row["y"]) for row in rows]
        count = sum(lengths) if average == "token" else np.count_nonzero(lengths)
        wanted = sum(row["y"].sum() for row in rows) / count
        assert all(abs(found - wanted) <= 1e-5 * wanted for found in world._each(world.on_all(value)(batch)))


@pytest.mark.parametrize(
    ("options", "average"),
    [(CUT, "token"), pytest.param({"weights": "w"}, "sequence_mean", marks=pytest.mark.wide)],
    ids=str,
)
@pytest.mark.worlds("mirrored:2", "horovod:2")
def test_fit_has_the_history_and_the_weights_of_one_device(world, options, average):
    """Also the metric, which counts by the weights of for_keras."""
    clean = lambda x: tf.where(tf.math.is_nan(x), 0.0, x)
    with world.scope():
        metric = [distpad.metrics.TokenAccuracy(name="right")] if KERAS < 3 or world.kind != "multiworker" else []
    loss = distpad.DistributedLoss(fitting.entropy(), average=average)
    model = fitting.model_in(world, loss, tf.keras.layers.Lambda(clean), run_eagerly=True, weighted_metrics=metric)
    steps, batches, _ = rows_and_batches(world, **options)
    history = feeding.fit(world, model, feeding.fed_by(world, batches, len(steps), x="x", y="y"))
    weighted = "weights" in options
    feeding.check(model, history, *fitting.expected(steps, average, weighted))
    if not metric:
        return
    kernel, bias = oracle.weights()
    right = total = 0.0
    for rows in steps:
        for row in rows:
            w = row["w"] if weighted else np.ones(len(row["y"]))
            right, total = right + (w * ((row["x"] @ kernel + bias).argmax(-1) == row["y"])).sum(), total + w.sum()
        _, d_kernel, d_bias = oracle.cross_entropy(rows, kernel, bias, average, weighted)
        kernel, bias = kernel - fitting.RATE * d_kernel, bias - fitting.RATE * d_bias
    assert abs(history.history["right"][0] - right / total) <= 1e-6
