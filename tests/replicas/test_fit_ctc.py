"""CTC in fit: label lengths and frames reach the loss; and other losses of several labels."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import test_for_keras as feeding
from test_fit_counts import changed, graph_of_fit  # noqa: F401
from test_for_keras import collected  # noqa: F401 (the fixture collects the iterators of fit)

import distpad
from keras_world import around_model, fit_optimizer, model_class

WORLDS = ("local", "mirrored:2", "mirrored:4", "multiworker:2", "horovod:2")
HEIGHT, CLASSES, STRIDE, RATE, STEPS = 3, 5, 2, 0.3, 3
PADDING = {"image": distpad.Pad(), "text": distpad.Pad()}


def frames_of(width):
    return -(-width // STRIDE)


def data_of(count=40):
    """Pictures of 6 to 9 columns for each character; and the number of frames, as a feature."""
    random = np.random.default_rng(2)
    found = []
    for number in range(count):
        text = random.integers(1, CLASSES, 1 + number % 4)
        width = int(len(text) * random.integers(6, 10))
        image = random.normal(size=[width, HEIGHT]).astype("float32")
        weight = np.float32(0.5 + number % 3)
        found.append({"image": image, "text": text, "frames": np.int32(frames_of(width)), "weight": weight})
    return found


def model_in(world, loss, **options):
    """One convolution, which pads nothing at the sides: frame i sees columns 2i and 2i + 1."""
    with world.scope():
        inputs = tf.keras.Input([None, HEIGHT])
        convolution = tf.keras.layers.Conv1D(CLASSES, STRIDE, strides=STRIDE, padding="same")
        outputs = convolution(inputs)
    with around_model(world):
        model = model_class(world)(inputs, outputs)
    with world.scope():
        random = np.random.default_rng(7)
        convolution.set_weights([random.normal(size=[STRIDE, HEIGHT, CLASSES]), random.normal(size=[CLASSES])])
        model.compile(loss=loss, optimizer=fit_optimizer(world, tf.keras.optimizers.SGD(RATE)), **options)
    return model


def fed(world, per_replica=3, feed=None, **options):
    """Three steps, the last of which is uneven; and the examples of each step."""
    data, size = data_of(), per_replica * world.num_replicas
    data = data[: 2 * size + size // 2 + 1]
    sampler = distpad.LengthSampler([len(e["image"]) for e in data], global_batch_size=size, seed=1)
    batches = feeding.made(world, (data, sampler), padding=PADDING, tokens="text", **options)
    return feeding.fed_by(world, batches, STEPS, **(feed or {"x": "image", "y": "text"})), [
        [data[i] for i in step] for step in sampler.plan(0)
    ]


def expected(model, steps, average, weighted=False):
    """History and weights of plain gradient descent, one sequence at a time, by TensorFlow's own loss."""
    kernel, bias = (tf.Variable(weight, dtype=tf.float64) for weight in model.get_weights())
    history = []
    for rows in steps:
        with tf.GradientTape() as tape:
            losses, weights, tokens = [], [], []
            for row in rows:
                image = np.pad(row["image"], [[0, len(row["image"]) % STRIDE], [0, 0]])[np.newaxis].astype("float64")
                logits = tf.nn.conv1d(image, kernel, STRIDE, "VALID") + bias
                length, frames = [len(row["text"])], [logits.shape[1]]
                losses.append(
                    tf.nn.ctc_loss(
                        tf.constant([row["text"]], tf.int32),
                        tf.cast(tf.transpose(logits, [1, 0, 2]), tf.float32),
                        length,
                        frames,
                        blank_index=0,
                    )[0]
                )
                weights.append(row["weight"] if weighted else 1.0)
                tokens.append(len(row["text"]) * weights[-1])
            total = sum(weight * loss for weight, loss in zip(weights, losses))
            value = total / (sum(tokens) if average == "token" else len(rows))
        for variable, gradient in zip((kernel, bias), tape.gradient(value, [kernel, bias])):
            variable.assign_sub(RATE * gradient)
        history.append(float(value))
    return np.mean(history), [kernel.numpy(), bias.numpy()]


def check(model, history, wanted, weights):
    np.testing.assert_allclose(history.history["loss"], [wanted], rtol=1e-5)
    for found, each in zip(model.get_weights(), weights):
        assert np.max(np.abs(found - each)) < 2e-5 * np.max(np.abs(each))


@pytest.mark.parametrize(
    ("average", "weighted"),
    [("sequence_sum", False), ("token", True), pytest.param("token", False, marks=pytest.mark.wide)],
)
def test_history_and_weights_are_those_of_one_device(world, average, weighted):
    """Five lines: for_keras names a picture and a text, and compile a loss with the model's stride."""
    ctc = distpad.CTC(blank_index=0, frames_per_step=STRIDE)
    loss = distpad.DistributedLoss(ctc, per="sequence", average=average)
    model = model_in(world, loss)
    (data, counted), steps = fed(world, **({"weights": "weight"} if weighted else {}))
    assert len(steps) == STEPS
    wanted = expected(model, steps, average, weighted)
    history = feeding.fit(world, model, (data, counted))
    check(model, history, *wanted)
