"""compile(loss=DistributedLoss(...)) and fit: the history and weights of one device, on any number of replicas."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle

ROWS, STEPS, RATE = 8, 3, 0.5  # of the global batch, which strategies deal out evenly


def batches():
    """Global batches of 8 rows whose lengths differ much, so that the replicas' own counts do."""
    for step in range(STEPS):
        random = np.random.default_rng([31, step])
        lengths = np.array([5, 4, 1, 0, 1, 1, 2, 0]) + step
        yield [
            {"x": random.normal(size=[n, oracle.FEATURES]), "y": random.integers(0, oracle.CLASSES, n), "w": np.ones(n)}
            for n in lengths
        ]


def dataset(mask_by):
    """What fit is fed: padded inputs (zeros) and labels (-99), and the mask as weights where that is asked."""
    parts = [oracle.padded(rows, "float32", beyond=0) for rows in batches()]
    width = max(part["y"].shape[1] for part in parts)

    def wide(name, filling):
        behind = lambda part: [(0, 0), (0, width - part["y"].shape[1]), (0, 0)][: part[name].ndim]
        columns = [np.pad(part[name], behind(part), constant_values=filling) for part in parts]
        return np.concatenate(columns)

    columns = [wide("x", 0), wide("y", -99)]
    if mask_by == "sample_weight":
        columns.append(wide("mask", False).astype("float32"))
    data = tf.data.Dataset.from_tensor_slices(tuple(columns)).batch(ROWS)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return data.with_options(options)


def expected(average):
    """NumPy's weights after the three steps, and the mean of the three losses, which is what the history shows."""
    kernel, bias = oracle.weights()
    values = []
    for rows in batches():
        value, d_kernel, d_bias = oracle.cross_entropy(rows, kernel, bias, average, False)
        kernel, bias = kernel - RATE * d_kernel, bias - RATE * d_bias
        values.append(value)
    return np.mean(values), kernel, bias


@pytest.mark.parametrize("average", ["token", "sequence_mean"])
@pytest.mark.parametrize("mask_by", ["keras mask", "padding_value", "sample_weight"])
def test_fit_gives_the_history_and_weights_of_one_device(world, mask_by, average):
    if world.kind not in ("local", "onedevice", "mirrored"):
        pytest.skip("fit under MultiWorkerMirroredStrategy and Horovod has needs of its own (keras#20585)")
    with world.scope():
        inputs = tf.keras.Input([None, oracle.FEATURES])
        masked = tf.keras.layers.Masking()(inputs) if mask_by == "keras mask" else inputs
        dense = tf.keras.layers.Dense(oracle.CLASSES)
        model = tf.keras.Model(inputs, dense(masked))
        dense.set_weights(oracle.weights())
        loss = distpad.DistributedLoss(
            tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none"),
            average=average,
            padding_value=-99 if mask_by == "padding_value" else None,
        )
        model.compile(loss=loss, optimizer=tf.keras.optimizers.SGD(RATE))
    history = model.fit(dataset(mask_by), epochs=1, verbose=0, shuffle=False)
    value, kernel, bias = expected(average)
    assert oracle.relative_error(history.history["loss"], value) <= 1e-5
    for found, wanted, start in zip(dense.get_weights(), (kernel, bias), oracle.weights()):
        assert oracle.relative_error(found - start, wanted - start) <= 1e-5
