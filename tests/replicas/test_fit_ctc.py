"""CTC in fit: label lengths and frames reach the loss; and other losses of several labels."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import test_for_keras as feeding
from test_for_keras import collected  # noqa: F401 (the fixture collects the iterators of fit)

import distpad
from keras_world import KERAS, fit_optimizer
from replica_world import alone

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")
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


def model_in(world, loss, rate=RATE, **options):
    """One convolution, which pads nothing at the sides: frame i sees columns 2i and 2i + 1."""
    with world.scope():
        inputs = tf.keras.Input([None, HEIGHT])
        convolution = tf.keras.layers.Conv1D(CLASSES, STRIDE, strides=STRIDE, padding="same")
        outputs = convolution(inputs)
        model = tf.keras.Model(inputs, outputs)
        random = np.random.default_rng(7)
        convolution.set_weights([random.normal(size=[STRIDE, HEIGHT, CLASSES]), random.normal(size=[CLASSES])])
        model.compile(loss=loss, optimizer=fit_optimizer(world, tf.keras.optimizers.SGD(rate)), **options)
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


def expected(model, steps, average, weighted=False, rate=RATE, stride=STRIDE):
    """History and weights of plain gradient descent, one sequence at a time, by TensorFlow's own loss."""
    kernel, bias = (tf.Variable(weight, dtype=tf.float64) for weight in model.get_weights())
    kernel = tf.Variable(tf.reshape(kernel, [stride, HEIGHT, CLASSES]))
    history = []
    for rows in steps:
        with tf.GradientTape() as tape:
            losses, weights, tokens = [], [], []
            for row in rows:
                image = np.pad(row["image"], [[0, len(row["image"]) % stride], [0, 0]])[np.newaxis].astype("float64")
                logits = tf.nn.conv1d(image, kernel, stride, "VALID") + bias
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
            variable.assign_sub(rate * gradient)
        history.append(float(value))
    return np.mean(history), [kernel.numpy(), bias.numpy()]


def check(model, history, wanted, weights):
    np.testing.assert_allclose(history.history["loss"], [wanted], rtol=1e-5)
    for found, each in zip(model.get_weights(), weights):
        assert np.max(np.abs(found - each)) < 2e-5 * np.max(np.abs(each))


@pytest.mark.parametrize(
    ("average", "weighted"),
    [
        ("token", True),
        pytest.param("sequence_sum", False, marks=pytest.mark.wide),
        pytest.param("token", False, marks=pytest.mark.wide),
    ],
)
@pytest.mark.worlds("mirrored:2", "multiworker:2")  # Horovod: the next test
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


@pytest.mark.parametrize("weighted", [True, pytest.param(False, marks=pytest.mark.wide)])
@pytest.mark.worlds("mirrored:2")
def test_a_keras_mask_tells_the_frames(world, weighted):
    """Keras 2 would multiply the weights, of the text's characters, by the mask of frames."""
    with world.scope():
        inputs, dense = tf.keras.Input([None, HEIGHT]), tf.keras.layers.Dense(CLASSES)
        model = tf.keras.Model(inputs, dense(tf.keras.layers.Masking()(inputs)))
        dense.set_weights([np.random.default_rng(7).normal(size=[HEIGHT, CLASSES]), np.arange(CLASSES)])
        made = lambda name, **options: distpad.metrics.CharacterErrorRate(decode="ctc", name=name, **options)
        rates = [made("by_mask", blank_index=0), made("by_lengths", blank_index=0, frames_per_step=1)]
        loss = distpad.DistributedLoss(distpad.CTC(blank_index=0), per="sequence")
        optimizer = fit_optimizer(world, tf.keras.optimizers.SGD(RATE))
        model.compile(loss=loss, optimizer=optimizer, weighted_metrics=rates)
    data, steps = fed(world, **({"weights": "weight"} if weighted else {}))
    value, (kernel, bias) = expected(model, steps, "token", weighted, stride=1)
    history = feeding.fit(world, model, data)
    check(model, history, value, [kernel[0], bias])
    assert history.history["by_mask"] == history.history["by_lengths"]


def own_loss(y_true, y_pred):
    """A loss of one's own that takes a dict."""
    return distpad.CTC(blank_index=0)((y_true["text"], y_true["lengths"], y_true["frames"]), y_pred)


@pytest.mark.parametrize(
    ("loss", "y_true"),
    [
        pytest.param(
            distpad.CTC(blank_index=0),
            ("text", distpad.Lengths("text"), "frames"),
            marks=pytest.mark.worlds("horovod:2"),
        ),
        pytest.param(
            own_loss,
            {"text": "text", "lengths": distpad.Lengths("text"), "frames": "frames"},
            marks=pytest.mark.wide,
        ),
    ],
)
def test_labels_of_any_nest_reach_the_loss(world, loss, y_true):
    """Frames as a feature of the examples."""
    model = model_in(world, distpad.DistributedLoss(loss, per="sequence", average="sequence_sum"))
    fed_data, steps = fed(world, feed={"x": "image", "y": "text", "y_true": y_true})
    wanted = expected(model, steps, "sequence_sum")
    check(model, feeding.fit(world, model, fed_data), *wanted)


def distance(read, text):
    """Levenshtein's distance."""
    row = [*range(len(text) + 1)]
    for i, one in enumerate(read, 1):
        before, row = row, [i]
        for j, other in enumerate(text, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (one != other)))
    return row[-1]


@(pytest.mark.worlds("mirrored:2") if KERAS >= 3 else pytest.mark.wide)
def test_error_rate_in_fit_and_evaluate(world):
    """A character error rate decodes real frames alone; the history of a model that stays as it is."""
    ctc = distpad.CTC(blank_index=0, frames_per_step=STRIDE)
    loss = distpad.DistributedLoss(ctc, per="sequence", average="sequence_sum")
    with world.scope():
        rate = distpad.metrics.CharacterErrorRate(decode="ctc", frames_per_step=STRIDE, name="cer")
    model = model_in(world, loss, rate=0.0, weighted_metrics=[rate], **({"jit_compile": False} if KERAS >= 3 else {}))
    (data, counted), steps = fed(world)
    kernel, bias = model.get_weights()
    edits = length = 0
    for row in (row for rows in steps for row in rows):
        image = np.pad(row["image"], [[0, len(row["image"]) % STRIDE], [0, 0]])[np.newaxis]
        best = np.argmax((tf.nn.conv1d(image, kernel, STRIDE, "VALID") + bias)[0], axis=1)
        read = [c for c, before in zip(best, [0, *best[:-1]]) if c and c != before]
        edits += distance(read, row["text"].tolist())
        length += len(row["text"])
    assert edits > 0
    wanted, _ = expected(model, steps, "sequence_sum", rate=0.0)
    found = [{name: values[-1] for name, values in feeding.fit(world, model, (data, counted)).history.items()}]
    if world.kind != "multiworker":
        found.append(model.evaluate(data, verbose=0, return_dict=True))
    for each in found:
        np.testing.assert_allclose(each["cer"], edits / length, rtol=1e-6)
        np.testing.assert_allclose(each["loss"], wanted, rtol=1e-5)


@pytest.mark.worlds("mirrored:2")
@alone
def test_saved_with_the_model(tmp_path):
    loss = distpad.DistributedLoss(distpad.CTC(blank_index=0, frames_per_step=2, inputs="image"), per="sequence")
    model = tf.keras.Sequential([tf.keras.Input([None, HEIGHT]), tf.keras.layers.Dense(CLASSES)])
    rate = distpad.metrics.CharacterErrorRate(decode="ctc", blank_index=-1, frames_per_step=2)
    model.compile(loss=loss, optimizer="sgd", weighted_metrics=[rate])
    model.save(tmp_path / "model.keras")
    loaded = tf.keras.models.load_model(tmp_path / "model.keras")
    assert loaded.loss.loss.get_config() == loss.loss.get_config()
    assert distpad.metrics.CharacterErrorRate.from_config(rate.get_config()).get_config() == rate.get_config()


@pytest.mark.worlds("mirrored:2")
@alone
def test_what_cannot_be_known_is_refused():
    examples = data_of(4)
    both = [{**each, "other": each["image"][:3]} for each in examples]
    batches = distpad.PaddedBatches(both, 2, padding={**PADDING, "other": distpad.Pad()}, tokens="text")
    _, text, weights = next(iter(batches.for_keras(x=("image", "other"), y="text")))
    one_input = next(iter(batches.for_keras(x="image", y="text")))[2]
    logits = tf.zeros([2, 40, CLASSES])
    loss = distpad.DistributedLoss(distpad.CTC(blank_index=0, frames_per_step=2), per="sequence")
    rate = distpad.metrics.CharacterErrorRate(decode="ctc", frames_per_step=1)
    with pytest.raises(ValueError, match="frames_per_step gives more frames than y_pred has"):
        rate.update_state(text, logits[:, :2], one_input)
    with pytest.raises(ValueError, match=r"frames_per_step is 2 without .*Write inputs=, one of \['image', 'other'"):
        loss(text, logits, weights)
    named = distpad.DistributedLoss(distpad.CTC(blank_index=0, frames_per_step=2, inputs="image"), per="sequence")
    assert np.isfinite(named(text, logits, weights))
    positions = [{**each, "weight": np.ones(len(each["text"]), np.float32)} for each in examples]
    batches = distpad.PaddedBatches(
        positions, 2, padding={**PADDING, "weight": distpad.Pad()}, tokens="text", weights="weight"
    )
    _, text, weights = next(iter(batches.for_keras(x="image", y="text")))
    with pytest.raises(ValueError, match="sample_weight weighs positions, expected one weight an example"):
        loss(text, logits, weights)
    for y_true, message in (
        (("text", ("image",)), "one tuple or dict"),
        ("no", "expected a feature"),
        ({}, "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            batches.for_keras(x="image", y="text", y_true=y_true)
    with pytest.raises(ValueError, match=r"x is Lengths\(feature='no'\), expected a feature of padding"):
        batches.for_keras(x=distpad.Lengths("no"), y="text")


@pytest.mark.worlds("mirrored:2")
@alone
def test_lengths_and_indices_as_inputs():
    """Filler rows have length 0 and index -1."""
    batches = distpad.PaddedBatches(data_of(3), 2, padding=PADDING, tokens="text")
    given = {"image": "image", "lengths": distpad.Lengths("image"), "ids": distpad.Indices()}
    found = [x for x, _, _ in batches.for_keras(x=given, y="text")]
    widths = [len(each["image"]) for each in data_of(3)]
    assert [x["lengths"].numpy().tolist() for x in found] == [widths[:2], [widths[2], 0]]
    assert [x["ids"].numpy().tolist() for x in found] == [[0, 1], [2, -1]]
    alone = [x for (x,) in batches.for_keras(x=given, y=None)]
    assert [x["ids"].numpy().tolist() for x in alone] == [[0, 1], [2]]
