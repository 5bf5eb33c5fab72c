"""What a certificate compares with: the plain average of one device, layers that are named, batches that are dealt."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
from distpad import backends
from distpad.certification import comparison, layers, linear, reference, rows, steps

pytestmark = pytest.mark.one_stack

LOCAL = backends.LocalBackend()
AVERAGES = ("token", "sequence_sum", "sequence_mean", 7.5)


def expected(losses, weights, way, tokens=None):
    """Position by position; with ``tokens`` each row has one loss, which stands for so many of them."""
    total, count, sequences = 0.0, 0.0, 0
    for i, row in enumerate(weights):
        own, weight = 0.0, 0.0
        for k, w in enumerate(np.atleast_1d(row)):
            if w:
                own += w * np.atleast_1d(losses[i])[k]
                weight += w
        total += own / weight if way == "sequence_mean" and weight and tokens is None else own
        count += weight * (1 if tokens is None else tokens[i])
        sequences += weight > 0
    divisor = {"token": count, "sequence_sum": sequences, "sequence_mean": sequences}.get(way, way)
    return total / divisor, divisor


def of_rows(loss, given, y_pred):
    given = {name: tf.convert_to_tensor(value) for name, value in given.items()}
    return [float(figure) for figure in reference.of_rows(loss, given, tf.convert_to_tensor(y_pred))]


@pytest.mark.parametrize("way", AVERAGES)
@pytest.mark.parametrize(
    "source", ["lengths", "mask", "weights", "all three", "row weights", "none", "label", "NaN label"]
)
def test_positions(way, source):
    random = np.random.default_rng(8)
    y_pred, y = random.normal(size=[4, 5]), random.normal(size=[4, 5])
    lengths, mask = np.array([5, 0, 2, 3]), random.random([4, 5]) < 0.6
    weight = random.choice([0.0, 0.5, 2.0], [4, 5])
    sources = {
        "lengths": {"lengths": lengths},
        "mask": {"mask": mask},
        "weights": {"sample_weight": weight},
        "all three": {"lengths": lengths, "mask": mask, "sample_weight": weight},
        "row weights": {"sample_weight": weight[:, 0]},
    }.get(source, {})
    weights = np.ones([4, 5])
    for name, given in sources.items():
        given = np.arange(5) < given[:, None] if name == "lengths" else given
        weights = weights * (given if given.ndim > 1 else given[:, None])
    padding = {"label": -9.0, "NaN label": np.nan}.get(source)
    if padding is not None:
        weights = mask * 1.0
        y = np.where(mask, y, padding)
    loss = distpad.DistributedLoss(lambda t, p: (t - p) ** 2, average=way, padding_value=padding, backend=LOCAL)
    found = of_rows(loss, {"y": y, **sources}, np.where(weights, y_pred, np.nan))
    assert np.allclose(found, expected((y - y_pred) ** 2, weights, way), rtol=1e-12)


@pytest.mark.parametrize("way", AVERAGES)
@pytest.mark.parametrize(
    "source", ["lengths", "mask of rows", "mask of labels", "label", "NaN label", "weights", "none"]
)
def test_sequences(way, source):
    random = np.random.default_rng(9)
    y, y_pred = random.uniform(1, 2, size=[4, 3]), random.normal(size=[4, 6])
    lengths, weight = np.array([3, 0, 1, 2]), np.array([1.0, 0.5, 0.0, 2.0])
    labels = np.arange(3) < lengths[:, None]
    sources, counted, tokens = {"lengths": lengths}, lengths > 0, lengths
    padding = {"label": -9.0, "NaN label": np.nan}.get(source)
    if source == "mask of rows":  # a row of length 0 may count
        sources["mask"] = counted = np.array([True, True, False, True])
    elif source == "mask of labels":
        sources = {"mask": labels}
    elif source == "weights":
        sources["sample_weight"] = weight
        counted = counted * weight
    elif source == "none":
        sources, counted, tokens, labels = {}, np.ones(4), np.full(4, 3), np.ones([4, 3], bool)
    elif padding is not None:
        sources, y = {}, np.where(labels, y, padding)
    each = lambda t, p: tf.reduce_sum(t, 1) * tf.reduce_mean(p, 1)
    losses = np.where(labels, y, 0).sum(1) * y_pred.mean(1)
    loss = distpad.DistributedLoss(each, average=way, per="sequence", padding_value=padding, backend=LOCAL)
    found = of_rows(loss, {"y": y, **sources}, y_pred)
    assert np.allclose(found, expected(losses, counted * 1.0, way, tokens), rtol=1e-12)


@pytest.mark.wide
@pytest.mark.parametrize(
    ("per", "padding_value"),
    [
        ("position", -1.0),
        ("sequence", float("nan")),
        pytest.param("position", float("nan"), marks=pytest.mark.wide),
        pytest.param("sequence", -1.0, marks=pytest.mark.wide),
    ],
)
def test_labels_that_say_what_is_padding_are_certified(per, padding_value):
    model = tf.keras.Sequential([tf.keras.Input([4, 3]), tf.keras.layers.Dense(1), tf.keras.layers.Flatten()])
    random = np.random.default_rng(2)
    y = np.where(random.random([6, 4]) < 0.7, random.random([6, 4]), padding_value).astype("float32")
    each = {"position": lambda t, p: (t - p) ** 2, "sequence": lambda t, p: tf.reduce_sum(t - p, 1) ** 2}[per]
    loss = distpad.DistributedLoss(each, per=per, padding_value=padding_value, backend=LOCAL)
    batch = {"x": random.normal(size=[6, 4, 3]).astype("float32"), "y": y}
    certificate = distpad.certify(model, loss, batch=batch, cases=1, backend=LOCAL)
    assert certificate.passed, str(certificate)


def test_layers_are_named_once_each():
    keras = tf.keras.layers

    class Block(keras.Layer):
        def __init__(self):
            super().__init__()
            self.rate = 3  # of something else
            self.inner = {"some": [keras.Dropout(0.1, name="deep")]}

    class Model(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.block, self.again = Block(), None
            self.part = tf.keras.Sequential(
                [keras.BatchNormalization(name="bn"), keras.GaussianNoise(0.1, name="noise")]
            )
            self.both = keras.Bidirectional(keras.LSTM(2, dropout=0.1), name="both")
            self.gru = keras.GRU(2, recurrent_dropout=0.1, name="gru")
            self.stack = keras.RNN([keras.LSTMCell(2), keras.GRUCell(2, dropout=0.2)], name="stack")
            self.heads = keras.MultiHeadAttention(1, 2, dropout=0.1, name="heads")
            self.timed = keras.TimeDistributed(keras.SpatialDropout1D(0.1), name="timed")
            self.still = [keras.LSTM(2), keras.Dropout(0.0), keras.MultiHeadAttention(1, 2), keras.LayerNormalization()]
            self.frozen = keras.BatchNormalization(trainable=False, name="frozen")
            self.again = self.gru

    found = [note.split()[1] for note in layers.notes_on(Model())]
    assert sorted(found) == ["bn", "both", "deep", "gru", "heads", "noise", "stack", "timed"]


BATCH = {"x": np.ones([4, 3, 2], "float32"), "y": np.zeros([4, 3], int), "lengths": [3, 1, 2, 0]}


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (7, TypeError, "batch is int, expected arrays by name"),
        ({"x": BATCH["x"]}, ValueError, "batch is without 'y'"),
        ({**BATCH, "y": np.zeros([5, 3])}, ValueError, "batch is of leading axes"),
        ({**BATCH, "lengths": [3.0, 1.0, 2.0, 0.0]}, TypeError, "lengths have dtype float"),
        ({**BATCH, "mask": np.ones([4, 3])}, TypeError, "mask has dtype float"),
        ({**BATCH, "y": tf.ragged.constant([[1], [1, 2], [], [3]])}, TypeError, "RaggedTensor"),
        ({"x": BATCH["x"][:0], "y": BATCH["y"][:0]}, ValueError, "batch is of no rows"),
        (None, ValueError, "batch is None"),
    ],
)
def test_batches_that_are_refused(batch, error, message):
    model = tf.keras.Sequential([tf.keras.Input([None, 2]), tf.keras.layers.Dense(2)])
    loss = distpad.DistributedLoss(tf.nn.sparse_softmax_cross_entropy_with_logits)
    with pytest.raises(error, match=message):
        distpad.certify(model, loss, batch=batch, backend=LOCAL)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": BATCH}, ValueError, "batch is given alone"),
        ({"model": lambda x: x, "batch": BATCH}, ValueError, "loss is None"),
        ({"step": lambda batch: [], "loss": lambda t, p: p, "batch": BATCH}, ValueError, "model is None"),
        ({"model": lambda x: x, "loss": lambda t, p: p, "batch": BATCH}, TypeError, "model is function"),
        ({"step": 3, "batch": BATCH}, TypeError, "step is 3"),
        ({"step": lambda batch: [], "batch": BATCH}, ValueError, "step is one that returns nothing"),
    ],
)
def test_arguments_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        distpad.certify(**arguments, backend=LOCAL)


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_rows_are_dealt_unevenly_and_all_of_them(replicas, micro):
    sizes = rows.sizes_of_parts(replicas * micro, replicas, [0])
    assert min(sizes) >= 1 and (len(sizes) == 1 or len(set(sizes)) > 1)
    fields = {"x": np.arange(sum(sizes)), "lengths": np.full(sum(sizes), 9)}
    for kind in (rows.Kind.UNEVEN_ROWS, rows.Kind.RANDOM_LENGTHS, rows.Kind.ALL_PADDING):
        parts = rows.split(rows.draw(fields, kind, sum(sizes), [1]), sizes)
        assert [len(part["x"]) for part in parts] == sizes
        assert sorted(np.concatenate([part["x"] for part in parts])) == list(range(sum(sizes)))
        lengths = np.concatenate([part["lengths"] for part in parts])
        as_expected = {rows.Kind.UNEVEN_ROWS: set(lengths) == {9}, rows.Kind.ALL_PADDING: not lengths.any()}
        assert as_expected.get(kind, len(set(lengths)) > 1)


def test_every_case_has_draws_of_its_own():
    """No two kinds share a seed, and no two cases of a kind."""
    seeds, device = [], steps.Device([np.ones(1)], 0.0, 0.0, "float64")
    draw = lambda kind, number, seed: seeds.append(tuple(seed)) or {"x": np.zeros(number)}
    compared = comparison.Comparison(draw, lambda given: [device.gradients], lambda batch: device, LOCAL)
    for kind in rows.Kind:
        for number in range(2):
            compared.case(kind, 5, number)
    assert len(set(seeds)) == len(seeds) == 2 * len(rows.Kind)


def test_predictions_of_the_built_in_model_are_nan_in_padding():
    case = linear.subject(None, 0, LOCAL).comparisons[0][0].case(rows.Kind.NAN_IN_PADDING, 0, 0)
    (((batch,),), (gradients,), device) = case
    is_padding = np.arange(batch["y"].shape[1]) >= batch["lengths"][:, None]
    assert is_padding.any() and (np.isnan(batch["x"]["bias"][..., 0]) == is_padding).all()
    assert np.isfinite(gradients[0]).all() and device.divisor == batch["lengths"].sum() and case.error <= 1e-12


def test_whatever_form_a_batch_has_a_step_gets_it_so():
    forms = [BATCH, (BATCH["x"], BATCH["y"]), distpad.Padded(BATCH["x"], np.array([3, 1, 2, 0]), None)]
    variable, seen = tf.Variable(1.0), []

    def step(batch):
        seen.append(type(batch))
        first = batch["x"] if isinstance(batch, dict) else batch[0]
        return {"gradient": tf.reduce_sum(first) * variable}

    for form in forms:
        seen.clear()
        distpad.certify(step=step, batch=form, cases=1, backend=LOCAL)
        assert set(seen) == {type(form)}


def test_a_step_gives_a_gradient_for_each_variable_of_the_model():
    """One that is None is zeros; a list that is too short is no agreement."""
    model = tf.keras.Sequential([tf.keras.Input([None, 2]), tf.keras.layers.Dense(2)])
    loss = distpad.DistributedLoss(lambda t, p: p[..., 0] * 0, backend=LOCAL)
    none = distpad.certify(model, loss, step=lambda batch: [None, tf.zeros([2])], batch=BATCH, cases=1, backend=LOCAL)
    assert none.passed
    with pytest.raises(ValueError, match=r"returns 1 gradients, expected 2, one for each"):
        distpad.certify(model, loss, step=lambda batch: [tf.zeros([2, 2])], batch=BATCH, cases=1, backend=LOCAL)
    named = distpad.certify(model, step=lambda batch: [tf.ones([2, 2]), None], batch=BATCH, cases=1, backend=LOCAL)
    assert named.passed


@pytest.mark.wide
@pytest.mark.parametrize(("half", "limit"), [("float16", 1e-2), pytest.param("bfloat16", 1e-1, marks=pytest.mark.wide)])
def test_half_precision_has_its_own_limit(half, limit):
    dense = tf.keras.layers.Dense(8, dtype=f"mixed_{half}", activation="tanh")
    model = tf.keras.Sequential([tf.keras.Input([None, 2]), dense, tf.keras.layers.Dense(2)])
    loss = distpad.DistributedLoss(tf.nn.sparse_softmax_cross_entropy_with_logits, backend=LOCAL)
    certificate = distpad.certify(model, loss, batch=BATCH, cases=1, backend=LOCAL)
    assert certificate.passed and {(line.dtype, line.limit) for line in certificate.lines} == {(half, limit)}


def test_float32_is_not_rounded_to_tensor_float_32():
    enabled = tf.config.experimental.tensor_float_32_execution_enabled
    seen = []

    def step(batch):
        seen.append(enabled())
        return [tf.reduce_sum(batch["x"], 0)]

    distpad.certify(step=step, batch={"x": np.ones([4, 2], "float32")}, cases=1)
    assert seen and not any(seen) and enabled()


@pytest.mark.wide
def test_a_batch_in_which_nothing_counts_is_told():
    model = tf.keras.Sequential([tf.keras.Input([None, 2]), tf.keras.layers.Dense(2)])
    loss = distpad.DistributedLoss(tf.nn.sparse_softmax_cross_entropy_with_logits, backend=LOCAL)
    batch = {**BATCH, "lengths": [0, 0, 0, 0]}
    assert "nothing was compared" in str(distpad.certify(model, loss, batch=batch, cases=1, backend=LOCAL))


def test_a_step_may_call_its_arrays_what_it_likes():
    variable = tf.Variable(1.0)
    step = lambda batch: [variable * tf.reduce_sum(batch["mask"]) + tf.cast(batch["lengths"]["a"][0], tf.float32) * 0]
    batch = {"mask": np.ones([4, 3], "float32"), "lengths": {"a": np.array([1, 2, 3, 4]), "b": np.ones([4, 2])}}
    certificate = distpad.certify(step=step, batch=batch, cases=1, backend=LOCAL)
    assert [line.kind for line in certificate.lines] == [
        "uneven rows",
        "random masks",
        "an empty replica",
        "all padding",
    ]
