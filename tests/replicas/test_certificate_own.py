"""certify with the user's own model, loss, step and batch: what is right passes, what is wrong is named."""

from __future__ import annotations

import re
import zlib

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle
from distpad.certification import rows, steps

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

ROWS, WIDTH, FEATURES, CLASSES = 10, 6, 5, 4
EVERY = [
    "uneven rows",
    "random lengths",
    "random masks",
    "sample weights",
    "an empty replica",
    "all padding",
    "accumulation",
]


@pytest.fixture
def eagerly():
    """Each kind is a graph of its own, whose tracing takes most of the time."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def one_kind(monkeypatch):
    """For what any kind shows."""
    monkeypatch.setattr(rows, "kinds", lambda *_, **__: [rows.Kind.UNEVEN_ROWS])


def batch_of(dtype="float32", seed=3):
    random = np.random.default_rng(seed)
    lengths = np.array([6, 1, 5, 1, 2, 4, 1, 6, 3, 1])
    y = random.integers(0, CLASSES, [ROWS, WIDTH])
    y[np.arange(WIDTH) >= lengths[:, None]] = -7
    return {"x": random.normal(size=[ROWS, WIDTH, FEATURES]).astype(dtype), "y": y, "lengths": lengths}


def model_in(world, *layers, dtype="float32"):
    """The same on all workers."""
    with world.scope():
        dense = tf.keras.layers.Dense(CLASSES, dtype=dtype, name="dense")
        model = tf.keras.Sequential([tf.keras.Input([None, FEATURES], dtype=dtype), *layers, dense])
        random = np.random.default_rng(5)
        model.set_weights([random.uniform(0.1, 1, size=weight.shape) for weight in model.get_weights()])
    return model


def each(y_true, y_pred):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y_true, y_pred)


def own_mean(y_true, y_pred, sample_weight=None, *, lengths=None, mask=None):
    """What loops usually do: each replica divides by its own count."""
    valid = tf.sequence_mask(lengths, tf.shape(y_pred)[1])
    losses = each(tf.where(valid, y_true, 0), y_pred) * tf.cast(valid, y_pred.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(losses), tf.reduce_sum(tf.cast(valid, y_pred.dtype)))


def certified(world, *arguments, **options):
    certificate = distpad.certify(*arguments, **{"cases": 1, "backend": world.backend, **options})
    mark = zlib.crc32(str(certificate).encode())
    assert world.backend.host_max(np.array([mark, -mark])).tolist() == [mark, -mark], (
        "it is not the same on all workers"
    )
    return certificate


def step_of(world, model, loss):
    def step(batch):
        with tf.GradientTape() as tape:
            value = loss(batch["y"], model(batch["x"], training=True), lengths=batch["lengths"])
        return world.reduce(distpad.gradient(tape, value, model.trainable_variables, backend=world.backend))

    return step


@pytest.mark.worlds("mirrored:2")
@pytest.mark.parametrize(
    ("dtype", "limit", "average"),
    [("float32", 1e-5, "token"), ("float64", 1e-12, "sequence_mean")],
)
@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=pytest.mark.wide)])
def test_a_right_loss_passes(world, dtype, limit, average, graph, request):
    if not graph:
        request.getfixturevalue("eagerly")
    loss = distpad.DistributedLoss(each, average=average, backend=world.backend)
    certificate = certified(
        world, model_in(world, dtype=dtype), loss, batch=batch_of(dtype), cases=8 if average == "token" else 1
    )
    assert certificate.passed, str(certificate)
    assert [line.kind for line in certificate.lines] == EVERY
    assert {(line.dtype, line.limit, line.cases) for line in certificate.lines} == {
        (dtype, limit, 2 if average == "token" else 1)
    }
    assert 0 < certificate.max_relative_error <= limit or world.num_replicas == 1
    assert (certificate.num_replicas, certificate.notes, certificate.diagnosis) == (world.num_replicas, (), "")
    assert certificate.padded.error < 1e-6  # a dense layer does not look at padding
    assert str(certificate).splitlines()[-1] == "passed"


def test_own_means_do_not_pass(world):
    certificate = certified(world, model_in(world), own_mean, batch=batch_of())
    kinds = [line.kind for line in certificate.lines]
    assert kinds == ["uneven rows", "random lengths", "an empty replica", "all padding"]  # what this loss is told
    if world.num_replicas == 1:
        assert certificate.passed
        return
    assert not certificate.passed and "NOT PASSED" in str(certificate)
    times = "the mean" if world.backend.gradient_reduction == "mean" else f"{world.num_replicas} times the mean"
    assert f"uneven rows: gradients are {times} of each replica's own mean" in certificate.diagnosis
    assert "compared with itself on one device" in str(certificate)


@pytest.mark.worlds("mirrored:2")
def test_a_loss_of_keras_that_reduces_does_not_pass(world, one_kind, eagerly):
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    batch = batch_of()
    batch["y"] = np.maximum(batch["y"], 0)
    if world.strategy and not hasattr(tf.keras, "version"):  # Keras 2, which refuses it itself
        with pytest.raises(ValueError, match="for loss reduction when losses are used with"):
            certified(world, model_in(world), loss, batch=batch)
        return
    certificate = certified(world, model_in(world), loss, batch=batch)
    assert certificate.passed == (world.num_replicas == 1)
    assert bool(re.search("own mean", certificate.diagnosis)) == (world.num_replicas > 1)


@pytest.mark.worlds("mirrored:2")
@pytest.mark.wide
@pytest.mark.parametrize("down", [False, True])
def test_a_factor_is_named(world, one_kind, down):
    replicas = world.num_replicas
    number = (1 / replicas if down else replicas) if replicas > 1 else 5
    words = f"{replicas} times too {'small' if down else 'large'}" if replicas > 1 else "5 times those of one device"
    model, loss = model_in(world), distpad.DistributedLoss(each, backend=world.backend)
    right = step_of(world, model, loss)
    step = lambda batch: [number * gradient for gradient in right(batch)]
    certificate = certified(world, model, loss, step=step, batch=batch_of())
    assert not certificate.passed
    assert certificate.diagnosis.startswith("uneven rows: gradients are " + words)


@pytest.mark.worlds("mirrored:2")
def test_a_step_of_the_users_own(world, eagerly):
    model, loss = model_in(world), distpad.DistributedLoss(each, backend=world.backend)
    right = step_of(world, model, loss)
    assert certified(world, step=tf.function(right), batch=batch_of()).passed
    assert certified(world, model, loss, step=right, batch=batch_of()).passed
    wrong = certified(world, step=step_of(world, model, own_mean), batch=batch_of())
    assert wrong.passed == (world.num_replicas == 1)


@pytest.mark.worlds("mirrored:2")
def test_a_step_on_batches_of_the_pipeline(world, eagerly):
    """Its counts are given again in each case, and an empty replica gets filling, as it does in training."""
    random = np.random.default_rng(4)
    source = [{"x": random.normal(size=[n, FEATURES]), "text": random.integers(0, CLASSES, n)} for n in (4, 1, 2, 6, 3)]
    padding = {"x": distpad.Pad(), "text": distpad.Pad()}
    batch = next(iter(distpad.PaddedBatches(source, 6, padding=padding, tokens="text", backend="local")))
    assert int(batch.rows) == 5 and len(batch.indices) == 6
    model, loss = model_in(world, dtype="float64"), distpad.DistributedLoss(each, backend=world.backend)
    ignored = tf.constant(7.0)

    def step(batch, of=lambda batch: batch.counts):
        with tf.GradientTape() as tape:
            y_pred = model(batch.data["x"], training=True)
            value = loss(batch.data["text"], y_pred, lengths=batch.lengths["text"], denominator=of(batch))
        return world.reduce(distpad.gradient(tape, value, model.trainable_variables, backend=world.backend))

    certificate = certified(world, step=step, batch=batch)
    assert certificate.passed, str(certificate)
    assert [line.kind for line in certificate.lines] == [
        "uneven rows",
        "random lengths",
        "an empty replica",
        "all padding",
    ]
    own = lambda batch: tf.reduce_sum(batch.lengths["text"])
    wrong = certified(world, step=lambda batch: step(batch, own), batch=batch)
    assert wrong.passed == (world.num_replicas == 1)
    with pytest.raises(ValueError, match=r"batch\.counts is .* expected those of its own rows"):
        certified(world, step=step, batch=batch._replace(counts=distpad.Counts(ignored, ignored)))


@pytest.mark.worlds("mirrored:2", "horovod:2")
def test_gradients_that_were_not_reduced(world, one_kind, eagerly):
    if world.num_replicas == 1:
        pytest.skip("nothing is to be reduced")
    model, loss = model_in(world), distpad.DistributedLoss(each, backend=world.backend)

    def step(batch):
        with tf.GradientTape() as tape:
            value = loss(batch["y"], model(batch["x"]), lengths=batch["lengths"])
        return tape.gradient(value, model.trainable_variables)

    certificate = certified(world, model, loss, step=step, batch=batch_of())
    assert not certificate.passed and "they were not reduced" in certificate.diagnosis


@pytest.mark.worlds("mirrored:2")
def test_the_variable_that_is_off_is_named(world, one_kind, eagerly):
    model, loss = model_in(world), distpad.DistributedLoss(each, backend=world.backend)
    right = step_of(world, model, loss)
    step = lambda batch: [gradient + 0.1 * i * tf.norm(gradient) for i, gradient in enumerate(right(batch))]
    certificate = certified(world, model, loss, step=step, batch=batch_of())
    assert re.search(
        r"gradients of \S*bias\S* are off by 0\.\d+ of their size; 1 of 2 variables", certificate.diagnosis
    )


WRONG = {
    "a hidden mean over the batch": (lambda t, p: each(t, p) * tf.reduce_mean(p**2), None),
    "NaN at valid places": (lambda t, p: each(t, p) + tf.math.log(p[..., 0] - 1e9), "NaN or infinite themselves"),
    "a mean of all": (lambda t, p: tf.reduce_mean(each(t, p)), ValueError),
    "a mean over the batch": (lambda t, p: tf.reduce_mean(each(t, p), axis=0), ValueError),
    "a mean over the batch, as one row": (lambda t, p: tf.reduce_mean(each(t, p), axis=0, keepdims=True), ValueError),
    "a mean over positions": (lambda t, p: tf.reduce_mean(each(t, p), axis=1), ValueError),
}


@pytest.mark.worlds("mirrored:2")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.wide] * ("NaN" not in name)) for name in WRONG])
def test_a_loss_that_was_written_wrongly(world, one_kind, name):
    """An error, or a certificate that does not pass, on one replica too."""
    function, expected = WRONG[name]
    loss = distpad.DistributedLoss(function, backend=world.backend)
    if expected is ValueError:
        with pytest.raises(ValueError, match="DistributedLoss"):
            certified(world, model_in(world), loss, batch=batch_of())
        return
    certificate = certified(world, model_in(world), loss, batch=batch_of())
    assert not certificate.passed, str(certificate)
    assert (expected or "") in certificate.diagnosis


def test_an_unreduced_loss_alone_is_refused(world):
    loss = lambda y_true, y_pred, lengths: each(tf.maximum(y_true, 0), y_pred)
    with pytest.raises(ValueError, match=r"certify: loss is of shape .*expected a scalar"):
        certified(world, model_in(world), loss, batch=batch_of())


@pytest.mark.worlds("mirrored:2")
def test_layers_are_named_and_switched_off(world, one_kind, eagerly):
    layers = [tf.keras.layers.Dropout(0.5, name="drop"), tf.keras.layers.BatchNormalization(name="norm")]
    with world.scope():
        model = model_in(world, *layers)
    loss = distpad.DistributedLoss(each, backend=world.backend)
    certificate = certified(world, model, loss, batch=batch_of())
    assert certificate.passed, str(certificate)
    lines = str(certificate).splitlines()
    assert "note: layer drop (Dropout): random in training" in lines
    assert "note: layer norm (BatchNormalization): rows depend on each other in training" in lines
    assert any("training=False" in line for line in lines)


@pytest.mark.worlds("mirrored:2")
def test_a_model_that_sees_padding_and_takes_no_empty_batch(world, monkeypatch, eagerly):
    """A recurrent layer that runs backwards begins in the padding; Keras 3's takes no batch of 0 rows."""
    monkeypatch.setattr(rows, "kinds", lambda *_, **__: [rows.Kind.EMPTY_REPLICA, rows.Kind.ALL_PADDING])
    with world.scope():
        rnn = tf.keras.layers.LSTM(3, return_sequences=True, go_backwards=True)
        model = tf.keras.Sequential(
            [tf.keras.Input([None, FEATURES]), rnn, tf.keras.layers.Dense(CLASSES, name="dense")]
        )
        random = np.random.default_rng(5)
        model.set_weights([random.normal(size=weight.shape) for weight in model.get_weights()])
    loss = distpad.DistributedLoss(each, backend=world.backend)
    certificate = certified(world, model, loss, batch=batch_of())
    assert certificate.passed, str(certificate)
    assert certificate.padded.error > 1e-3 and "padded further" in str(certificate)
    assert "an empty replica" in [line.kind for line in certificate.lines]


@pytest.mark.worlds("mirrored:2")
def test_a_subclassed_model_that_is_not_built_yet(world, one_kind, eagerly):
    class Model(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = tf.keras.layers.Dense(3, activation="tanh"), tf.keras.layers.Dense(CLASSES)

        def call(self, x):
            return self.outer(self.inner(x))

    with world.scope():
        model = Model()
    certificate = certified(world, model, distpad.DistributedLoss(each, backend=world.backend), batch=batch_of())
    assert certificate.passed, str(certificate)
    if world.kind in ("horovod", "mpirun"):  # each had drawn its own
        assert "workers had different variables" in str(certificate)


def test_workers_with_different_variables_are_told(world, one_kind, eagerly):
    model, loss = model_in(world), distpad.DistributedLoss(each, backend=world.backend)
    if world.kind not in ("horovod", "mpirun"):
        pytest.skip("strategies keep variables alike")
    model.set_weights([weight * (1 + world.backend.worker_index) for weight in model.get_weights()])
    certificate = distpad.certify(step=step_of(world, model, loss), batch=batch_of(), cases=1, backend=world.backend)
    assert not certificate.passed and "workers have different variables" in certificate.diagnosis
    certificate = certified(world, model, loss, batch=batch_of())
    assert certificate.passed and "workers had different variables" in str(certificate)


def test_batches_that_differ_between_workers_are_refused_by_all(world):
    if not world.several_workers:
        pytest.skip("there is one worker")
    model, loss = model_in(world), distpad.DistributedLoss(each, backend=world.backend)
    worker = world.backend.worker_index
    with pytest.raises(ValueError, match="batch is not the same on all workers"):
        certified(world, model, loss, batch=batch_of(seed=worker))
    broken = {**batch_of(), "lengths": np.ones([ROWS + worker], int)}
    with pytest.raises(ValueError, match=r"batch is (of leading axes|refused by another worker)"):
        certified(world, model, loss, batch=broken)


@pytest.mark.worlds("mirrored:2", "horovod:2")
def test_a_global_value_after_a_certificate_is_that_of_the_engine(world, one_kind):
    """What ran beside the engine, as one device, leaves no trace in the loss."""
    model, loss = model_in(world), distpad.DistributedLoss(lambda t, p: p, backend=world.backend)
    share = lambda x: loss(x, x, denominator=1.0 * world.num_replicas)
    given = lambda r: np.full([1, 1], r + 1.0, "float32")

    def value(step):
        if world.strategy is None:
            return float(loss.global_value(step(tf.constant(given(world.backend.worker_index)))))
        values = world.strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(given(context.replica_id_in_sync_group))
        )
        return float(loss.global_value(step(values)))

    step = tf.function(share if world.strategy is None else lambda x: world.strategy.run(share, args=(x,)))
    before = value(step)
    assert before == pytest.approx((world.num_replicas + 1) / 2)
    own = distpad.DistributedLoss(each, backend=world.backend)
    right = step_of(world, model, own)

    def with_both(batch):
        loss(batch["x"][..., 0], batch["x"][..., 0], denominator=1.0)
        return right(batch)

    assert certified(world, step=with_both, batch=batch_of()).passed  # compared with itself on one device
    try:
        after = value(step)
    except ValueError as refused:  # by a loss that takes this for one device
        after = refused
    assert after == before


@pytest.mark.worlds("mirrored:2")
@pytest.mark.parametrize("average", ["token", pytest.param("sequence_sum", marks=pytest.mark.wide)])
def test_ctc_that_leaves_out_what_cannot_be_aligned(world, average, eagerly):
    """Rows of three frames, some with texts that need more."""
    with world.scope():
        dense = tf.keras.layers.Dense(CLASSES, name="dense")
        model = tf.keras.Sequential([tf.keras.Input([None, FEATURES]), dense])
        model.set_weights([np.random.default_rng(5).normal(size=weight.shape) for weight in model.get_weights()])
    labels = np.array([[1, 2, 0], [1, 1, 1], [3, 0, 0], [2, 2, 1], [1, 2, 3]], np.int32)
    lengths, frames = np.array([2, 3, 1, 2, 3], np.int32), np.array([3, 3, 3, 3, 2], np.int32)
    batch = {
        "x": np.random.default_rng(3).normal(size=[5, 3, FEATURES]).astype("float32"),
        "y": (labels, lengths, frames),
        "lengths": lengths,
    }
    ctc = distpad.CTC(blank_index=0, too_long="leave_out")
    loss = distpad.DistributedLoss(ctc, per="sequence", average=average, backend=world.backend)
    certificate = certified(world, model, loss, batch=batch)
    assert certificate.passed, str(certificate)
    assert ctc.left_out(backend=world.backend) > 0


@pytest.mark.worlds("mirrored:2")
def test_numpy_agrees(world, one_kind):
    """The one device that gradients are compared with is itself NumPy's."""
    model, loss = model_in(world, dtype="float64"), distpad.DistributedLoss(each, backend=world.backend)
    right, seen = step_of(world, model, loss), []

    def step(batch):
        seen.append(1)
        return right(batch)

    batch = batch_of("float64")
    assert certified(world, model, loss, step=step, batch=batch).passed and seen
    device = steps.on_one_device(model, loss, True)(batch)
    rows = [{"x": x[:n], "y": y[:n], "w": np.ones(n)} for x, y, n in zip(batch["x"], batch["y"], batch["lengths"])]
    _, *expected = oracle.cross_entropy(rows, *model.get_weights(), "token", False)
    assert (device.divisor, device.dtype) == (batch["lengths"].sum(), "float64")
    assert max(oracle.relative_error(f, e) for f, e in zip(device.gradients, expected)) <= 1e-12
