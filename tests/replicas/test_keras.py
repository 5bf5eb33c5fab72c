"""compile(loss=DistributedLoss(...)), fit and evaluate: the history and weights of one device, on any replicas."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle
from keras_world import fit_optimizer, steps_dataset

WORLDS = ("local", "mirrored:1", "mirrored:2", "mirrored:4", "multiworker:2", "horovod:2")

ROWS, STEPS, RATE = 8, 3, 0.5  # rows of the global batch
WORDS = np.random.default_rng(5).normal(size=[9, oracle.FEATURES])  # an embedding; word 0 is padding


def batches():
    """Global batches of 8 rows whose lengths differ much, so that the replicas' own counts do."""
    for step in range(STEPS):
        random = np.random.default_rng([31, step])
        lengths = np.array([5, 4, 1, 0, 1, 1, 2, 0]) + step
        rows = []
        for n in lengths:
            words = random.integers(1, len(WORDS), n)
            w = random.choice([0.5, 1.0, 3.0], n)
            y, z = random.integers(0, oracle.CLASSES, [2, n])
            rows.append({"words": words, "x": WORDS[words], "y": y, "z": z, "w": w})
        yield rows


def padded(rows, names):
    """One step's columns, as wide as the longest of all steps: zeros, and labels of -99."""
    width, filling = max(len(row["y"]) for step in batches() for row in step), {"y": -99, "z": -99}
    columns = {}
    for name in names:
        values = [np.asarray(row[name]) for row in rows]
        inner = values[0].shape[1:]
        columns[name] = np.full([len(rows), width, *inner], filling.get(name, 0), values[0].dtype)
        for column, value in zip(columns[name], values):
            column[: len(value)] = value
    return [c.astype("float32") if c.dtype == np.float64 else c for c in (columns[name] for name in names)]


def subclassed(world, layers, call):
    class Subclassed(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = layers

        def call(self, inputs):
            return call(inputs)

    return Subclassed()


def model_of(world, style, mask_by, dense):
    """A linear model; what masks comes in front of its one trained layer."""
    with world.scope():
        inputs, front, outputs = layers_of(mask_by, dense)
        if style == "functional":
            return tf.keras.Model(inputs, outputs)
        return subclassed(world, [front, dense], lambda given: dense(front(given)))


def layers_of(mask_by, dense):
    if mask_by == "embedding":
        embedding = tf.keras.layers.Embedding(*WORDS.shape, mask_zero=True, trainable=False)
        inputs = tf.keras.Input([None], dtype="int64")
        embedding.build([None, None])
        embedding.set_weights([WORDS])
        front = embedding
    else:
        inputs = tf.keras.Input([None, oracle.FEATURES])
        front = tf.keras.layers.Masking() if mask_by == "masking" else tf.keras.layers.Activation("linear")
    return inputs, front, dense(front(inputs))


def expected(average, weighted=False):
    """NumPy's weights after the three steps, the mean of the three losses, which is what the history shows, and that
    of a later evaluation."""
    kernel, bias = oracle.weights()
    values = []
    for rows in batches():
        value, d_kernel, d_bias = oracle.cross_entropy(rows, kernel, bias, average, weighted)
        kernel, bias = kernel - RATE * d_kernel, bias - RATE * d_bias
        values.append(value)
    later = [oracle.cross_entropy(rows, kernel, bias, average, weighted)[0] for rows in batches()]
    return np.mean(values), np.mean(later), (kernel, bias)


def entropy():
    return tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")


def check_weights(dense, wanted, start):
    for found, after, before in zip(dense.get_weights(), wanted, start):
        assert oracle.relative_error(found - before, after - before) <= 1e-5


PAIRS = [  # every pair of a mask's source with a style, and with an average
    ("functional", "masking", "token"),
    ("subclassed", "sample_weight", "sequence_mean"),
    ("functional", "padding_value", "sequence_mean"),
    ("subclassed", "embedding", "token"),
    ("functional", "embedding", "sequence_mean"),
    ("functional", "sample_weight", "token"),
    ("subclassed", "masking", "sequence_mean"),
    ("subclassed", "padding_value", "token"),
]
ONE, WIDE = pytest.mark.worlds("mirrored:2"), pytest.mark.wide
CASES = [  # a graph takes three times as long as what Keras runs eagerly
    pytest.param(*pair, graph, marks=marks)
    for graph, every in [(True, [(), *[WIDE] * 7]), (False, [WIDE, (), ONE, ONE, *[WIDE] * 4])]
    for pair, marks in zip(PAIRS, every)
]


@pytest.mark.parametrize(("style", "mask_by", "average", "graph"), CASES)
def test_fit_and_evaluate_give_what_one_device_does(world, style, mask_by, average, graph):
    names = ["words" if mask_by == "embedding" else "x", "y", *["w"] * (mask_by == "sample_weight")]
    with world.scope():
        dense = tf.keras.layers.Dense(oracle.CLASSES)
    model = model_of(world, style, mask_by, dense)
    with world.scope():
        dense.set_weights(oracle.weights())
        padding_value = -99 if mask_by == "padding_value" else None
        loss = distpad.DistributedLoss(entropy(), average=average, padding_value=padding_value)
        optimizer = fit_optimizer(world, tf.keras.optimizers.SGD(RATE))
        model.compile(loss=loss, optimizer=optimizer, run_eagerly=not graph)
        data = steps_dataset(world, [padded(rows, names) for rows in batches()])
        history = model.fit(data, verbose=0, shuffle=False)
        found_later = model.evaluate(data, verbose=0)
    value, later, weights = expected(average, weighted=mask_by == "sample_weight")
    assert oracle.relative_error(history.history["loss"], value) <= 1e-5
    check_weights(dense, weights, oracle.weights())
    assert oracle.relative_error(found_later, later) <= 1e-5


@pytest.mark.parametrize("style", ["functional", pytest.param("subclassed", marks=pytest.mark.wide)])
def test_several_outputs_each_over_its_own_positions(world, style):
    """The second label is valid only at every other word; each loss has its own average and weight."""
    starts = {"y": oracle.weights(1), "z": oracle.weights(2)}
    averages, weights = {"y": "token", "z": "sequence_mean"}, {"y": 2.0, "z": 0.5}
    with world.scope():
        heads = {name: tf.keras.layers.Dense(oracle.CLASSES, name=name) for name in starts}
        inputs = tf.keras.Input([None, oracle.FEATURES])
        outputs = {name: head(inputs) for name, head in heads.items()}
        if style == "functional":
            model = tf.keras.Model(inputs, outputs)
        else:
            model = subclassed(world, list(heads.values()), lambda given: {n: head(given) for n, head in heads.items()})
        for name, head in heads.items():
            head.set_weights(starts[name])
        losses = {
            name: distpad.DistributedLoss(entropy(), average=averages[name], padding_value=-99) for name in averages
        }
        optimizer = fit_optimizer(world, tf.keras.optimizers.SGD(RATE))
        model.compile(loss=losses, loss_weights=weights, optimizer=optimizer, run_eagerly=True)

    steps = []
    for rows in batches():
        x, y, z = padded(rows, ["x", "y", "z"])
        z[:, 1::2] = -99
        steps.append((x, {"y": y, "z": z}))
    with world.scope():
        history = model.fit(steps_dataset(world, steps), verbose=0, shuffle=False).history

    total = np.zeros(STEPS)
    for name in starts:
        kernel, bias = starts[name]
        values = []
        for rows in batches():
            part = slice(None, None, 2 if name == "z" else 1)
            rows = [{"x": row["x"][part], "y": row[name][part], "w": row["w"][part]} for row in rows]
            value, d_kernel, d_bias = oracle.cross_entropy(rows, kernel, bias, averages[name], False)
            kernel, bias = kernel - RATE * weights[name] * d_kernel, bias - RATE * weights[name] * d_bias
            values.append(value)
        total += weights[name] * np.array(values)
        assert oracle.relative_error(history[f"{name}_loss"], np.mean(values)) <= 1e-5
        check_weights(heads[name], (kernel, bias), starts[name])
    assert oracle.relative_error(history["loss"], np.mean(total)) <= 1e-5


@pytest.mark.worlds("mirrored:2")
@pytest.mark.parametrize("weighted", [False, True])
def test_a_dropped_mask_is_told_once(world, weighted):
    """In the first step, by the first replica, and not again while the second replica and evaluate are traced."""
    with world.scope():
        words = tf.keras.layers.Embedding(*WORDS.shape, mask_zero=True, name="words")
        parts = [words, tf.keras.layers.MaxPooling1D(1), tf.keras.layers.Dense(oracle.FEATURES)]
        model = tf.keras.Sequential([tf.keras.Input([None], dtype="int32"), *parts])
        model.compile(loss=distpad.DistributedLoss("mse"), optimizer="sgd")
        steps = [padded(rows, ["words", "x"]) for rows in batches()]
        data = steps_dataset(world, [(x, y, np.float32(x != 0))[: 2 + weighted] for x, y in steps])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(data, verbose=0)
        model.evaluate(data, verbose=0)
    told = [str(each.message) for each in caught if "DistributedLoss" in str(each.message)]
    wanted = "no mask was given.*/words' made a Keras mask, which was dropped after it.*the weights of for_keras"
    assert [bool(re.search(wanted, each)) for each in told] == [True] * (not weighted)
