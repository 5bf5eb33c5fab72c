"""DistributedLoss on one device: argument errors and their messages, and valid arguments."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf

import distpad

KERAS_3 = hasattr(tf.keras, "ops")
REDUCTIONS = ["sum", "mean", "mean_with_sample_weight"] if KERAS_3 else ["sum", "sum_over_batch_size"]
COUNTS, WEIGHTED = distpad.Counts(3.0, 2.0), distpad.WeightedCounts(3.0, 2.0)


@tf.keras.utils.register_keras_serializable("distpad_tests")
def absolute(y_true, y_pred):
    return tf.abs(tf.cast(y_true, y_pred.dtype) - y_pred)


def loss_of(**options):
    return distpad.DistributedLoss(absolute, **options)


def call(options=None, *, y_true=None, y_pred=None, **arguments):
    """Return the loss of labels [2, 3] of 0 and predictions of 1."""
    y_true = np.zeros([2, 3], "float32") if y_true is None else y_true
    y_pred = np.ones([2, 3], "float32") if y_pred is None else y_pred
    return loss_of(**(options or {}))(y_true, y_pred, **arguments)


# -- the constructor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_reducing_loss_is_refused_with_the_line_to_write(reduction):
    with pytest.raises(ValueError, match=r'Write MeanSquaredError\(\.\.\., reduction="none"\)') as raised:
        distpad.DistributedLoss(tf.keras.losses.MeanSquaredError(reduction=reduction))
    assert f"of reduction {reduction!r}" in str(raised.value)


def test_a_class_that_keras_ignores_is_padding_here():
    """Keras makes the losses of an ignored class 0, and the mean would count them."""
    ignoring = tf.keras.losses.SparseCategoricalCrossentropy(ignore_class=-1, from_logits=True, reduction="none")
    with pytest.raises(ValueError, match=r"ignore_class is -1, expected the padding value. Write padding_value=-1"):
        distpad.DistributedLoss(ignoring, backend="local")
    loss_fn = distpad.DistributedLoss(ignoring, padding_value=-1, backend="local")
    assert float(loss_fn([[1, -1, -1, -1]], tf.zeros([1, 4, 3]))) == pytest.approx(np.log(3), rel=1e-6)


def test_a_loss_of_nothing_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"result is None, expected a tensor .*SequenceLoss.*tf\.ones_like"):
        distpad.DistributedLoss(lambda t, p: None, backend="local")(tf.zeros([1, 2]), tf.zeros([1, 2]))


@pytest.mark.parametrize("source", ["Keras's mask", "padding_value"])
def test_counts_of_positions_that_another_source_leaves_out(source):
    y_pred, options = tf.ones([1, 3]), {}
    if source == "padding_value":
        options = {"padding_value": 7}
    else:
        y_pred._keras_mask = tf.constant([[True, True, False]])
    loss_fn = distpad.DistributedLoss(lambda t, p: p, backend="local", **options)
    counts = distpad.Counts(tf.constant(3.0, tf.float64), tf.constant(1.0, tf.float64))
    with pytest.raises(ValueError, match=r"drops positions within lengths, which were counted.*0→1"):
        loss_fn(tf.constant([[1, 2, 7]]), y_pred, lengths=[3], denominator=counts)
    counts = distpad.Counts(tf.constant(2.0, tf.float64), tf.constant(1.0, tf.float64))
    assert float(loss_fn(tf.constant([[1, 2, 7]]), y_pred, lengths=[2], denominator=counts)) == 1.0


@pytest.mark.parametrize("reduction", ["none", None] if KERAS_3 else ["none"])
def test_reduction_none_is_taken(reduction):
    assert distpad.DistributedLoss(tf.keras.losses.MeanSquaredError(reduction=reduction)).average == "token"


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (None, "loss is None, expected a Keras loss"),
        (3, "loss is 3, expected"),
        (
            tf.keras.losses.MeanSquaredError,
            r"the class MeanSquaredError, expected an instance. Write MeanSquaredError\(\)",
        ),
    ],
)
def test_an_object_that_is_no_loss(loss, words):
    with pytest.raises(TypeError, match=words):
        distpad.DistributedLoss(loss)


def test_a_distributed_loss_inside_another():
    with pytest.raises(TypeError, match="DistributedLoss object"):
        distpad.DistributedLoss(loss_of())


@pytest.mark.parametrize(
    ("average", "error", "words"),
    [
        ("mean", ValueError, "average is 'mean', expected one of 'token', 'sequence_sum', 'sequence_mean'"),
        (0, ValueError, "average is 0, expected a positive number"),
        (-1.5, ValueError, "average is -1.5, expected a positive number"),
        (float("inf"), ValueError, "average is inf"),
        (float("nan"), ValueError, "average is nan"),
        (True, TypeError, "average is True, expected a string or a positive number"),
        (None, TypeError, "average is None"),
        ([1], TypeError, r"average is \[1\]"),
    ],
)
def test_wrong_averages(average, error, words):
    with pytest.raises(error, match=words):
        loss_of(average=average)


@pytest.mark.parametrize("per", ["row", None, 1])
def test_wrong_per(per):
    with pytest.raises(ValueError, match=f"per is {per!r}, expected one of 'position', 'sequence'"):
        loss_of(per=per)


# -- the call: argument errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "arguments", "error", "words"),
    [
        (
            {},
            {"mask": np.ones([2, 3])},
            TypeError,
            "mask has dtype float64, expected bool. Weights go to",
        ),
        ({}, {"mask": np.ones([2, 4], bool)}, ValueError, r"mask has shape \(2, 4\), expected \(2, 3\)"),
        ({}, {"mask": np.ones([2, 3, 1], bool)}, ValueError, "mask.* rank 3, expected at most 2"),
        ({}, {"sample_weight": np.ones([2, 3, 2])}, ValueError, "sample_weight has rank 3, expected at most 2"),
        ({}, {"sample_weight": np.ones([2, 3, 1, 1])}, ValueError, "sample_weight has rank 4, expected at most 2"),
        ({}, {"sample_weight": 2.0}, ValueError, r"sample_weight has rank 0, expected \[batch"),
        ({}, {"lengths": [[1, 2], [1, 2]]}, ValueError, r"lengths have shape \(2, 2\), expected \[batch\]"),
        ({}, {"lengths": 2}, ValueError, r"lengths have shape \(\), expected \[batch\]"),
        ({}, {"lengths": [1.0, 2.0]}, TypeError, "lengths have dtype float32, expected integers"),
        ({}, {"lengths": [1, 4]}, ValueError, "lengths hold a value above the size of axis 1"),
        ({}, {"lengths": [1, -1]}, ValueError, "lengths hold a value below 0"),
        ({}, {"denominator": {"a": COUNTS}}, TypeError, r"mapping with \['a'\].*denominator=counts\[NAME\]"),
        ({"average": 7.0}, {"denominator": 3.0}, ValueError, "denominator was given with average=7.0"),
        (
            {"average": 7.0},
            {"denominator": COUNTS, "lengths": [1, 2]},
            ValueError,
            "denominator was given with average",
        ),
        ({}, {"denominator": COUNTS}, ValueError, "no argument tells which positions are valid. Give lengths="),
        (
            {},
            {"denominator": COUNTS, "lengths": [1, 2], "mask": np.ones([2, 3], bool)},
            ValueError,
            "mask was not counted in denominator",
        ),
        ({}, {"denominator": COUNTS, "mask": np.ones([2, 3], bool)}, ValueError, "DistributedLoss: "),
        (
            {},
            {"denominator": COUNTS, "lengths": [1, 2], "sample_weight": np.ones([2, 3])},
            ValueError,
            "denominator is a Counts, but sample_weight is given; expected WeightedCounts",
        ),
        (
            {},
            {"denominator": WEIGHTED, "lengths": [1, 2]},
            ValueError,
            "denominator is a WeightedCounts, but sample_weight is missing",
        ),
        ({"padding_value": 0}, {"y_true": np.zeros([2])}, ValueError, "padding_value was given, but y_true is no"),
        (
            {"per": "sequence", "average": "sequence_sum"},
            {},
            ValueError,
            'rank 2, expected .batch. with per="sequence"',
        ),
        ({"backend": "nccl"}, {}, ValueError, "DistributedLoss: backend is 'nccl', expected one of 'local', 'horovod'"),
    ],
)
def test_wrong_arguments_of_the_call(options, arguments, error, words):
    with pytest.raises(error, match=words):
        call(options, **arguments)


@pytest.mark.parametrize("denominator", [[3.0, 2.0], (3.0, 2.0), -3.0, "3", float("nan")])
def test_a_denominator_is_one_number_from_0_on(denominator):
    with pytest.raises((ValueError, TypeError), match="denominator"):
        call(lengths=[1, 2], denominator=denominator)


@pytest.mark.parametrize("padding_value", [0.5, [0, 1], "a"])
def test_a_padding_value_that_labels_cannot_hold(padding_value):
    """A cast of 0.5 to 0 would make valid labels padding."""
    with pytest.raises((ValueError, TypeError), match="padding_value"):
        call({"padding_value": padding_value}, y_true=np.zeros([2, 3], "int32"))


@pytest.mark.parametrize("arguments", [{"sample_weight": np.ones([3])}, {"lengths": [1, 2, 3]}])
def test_the_message_names_the_argument_that_does_not_fit(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        call(**arguments)


def test_ragged_tensors_are_refused():
    ragged, dense = tf.ragged.constant([[0.0], [0.0, 0.0]]), tf.ones([2, 2])
    with pytest.raises(TypeError, match=r"y_true is a RaggedTensor, expected a padded tensor. Use distpad.pad"):
        loss_of()(ragged, dense)
    with pytest.raises(TypeError, match="y_pred is a RaggedTensor"):
        loss_of()(dense, ragged)


def test_a_loss_that_reduces_is_refused_when_it_shows():
    with pytest.raises(ValueError, match=r"the loss has rank 0.*must not reduce by itself"):
        distpad.DistributedLoss(lambda t, p: tf.reduce_mean(p))(tf.zeros([2, 3]), tf.ones([2, 3]))
    with pytest.raises(ValueError, match=r'shape \[batch\].*Write per="sequence"'):
        distpad.DistributedLoss(lambda t, p: tf.reduce_mean(p, 1))(tf.zeros([2, 3]), tf.ones([2, 3]), lengths=[1, 2])


# -- the call: valid arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        np.array([[0, 1, 2], [2, 0, 0]]),
        [[0, 1, 2], [2, 0, 0]],
        np.array([[0, 1, 2], [2, 0, 0]], "int64"),
        tf.constant([[0, 1, 2], [2, 0, 0]], tf.uint8),
        tf.Variable([[0, 1, 2], [2, 0, 0]]),
    ],
    ids=["numpy", "lists", "int64", "uint8", "variable"],
)
def test_labels_of_every_kind(labels):
    p = np.random.default_rng(3).dirichlet(np.ones(3), size=[2, 3]).astype("float32")
    loss_fn = distpad.DistributedLoss(tf.keras.losses.SparseCategoricalCrossentropy(reduction="none"))
    expected = -np.mean(np.log([p[0, 0, 0], p[0, 1, 1], p[1, 0, 2]], dtype="float64"))
    assert float(loss_fn(labels, p, lengths=[2, 1])) == pytest.approx(expected, rel=1e-6)


def test_nested_lists_of_vectors():
    value = loss_of()([[[0.0], [1.0]], [[0.0], [0.0]]], [[[1.0], [2.0]], [[5.0], [9.0]]], lengths=[2, 1])
    assert float(value) == pytest.approx((1 + 1 + 5) / 3)


def test_an_image_error_is_averaged_over_height_and_width():
    """A loss [B, L, H, W] under a mask [B, L]."""
    random = np.random.default_rng(4)
    t, p = random.normal(size=[2, 2, 3, 4, 5]).astype("float32")
    mask = np.array([[True, True, False], [False, True, False]])
    weight = random.uniform(0.5, 2, size=[2, 3]).astype("float32")
    errors = np.mean((t.astype("float64") - p) ** 2, axis=(2, 3))
    square = lambda t, p: tf.square(t - p)
    token = distpad.DistributedLoss(square)(t, p, mask=mask)
    assert float(token) == pytest.approx(errors[mask].mean(), rel=1e-6)
    weighted = distpad.DistributedLoss(square)(t, p, weight, mask=mask)
    assert float(weighted) == pytest.approx(np.average(errors[mask], weights=weight[mask]), rel=1e-6)
    mean = distpad.DistributedLoss(square, average="sequence_mean")(t, p, mask=mask)
    assert float(mean) == pytest.approx(np.mean([errors[0][mask[0]].mean(), errors[1][mask[1]].mean()]), rel=1e-6)


def test_all_sources_of_the_mask_are_combined():
    y_true = np.array([[0.0, 0.0, -1.0, 0.0], [0.0, -1.0, 0.0, 0.0]], "float32")
    y_pred = np.array([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]], "float32")
    mask = np.array([[True, False, True, True], [True, True, True, True]])
    weight = [[2.0, 1.0, 1.0, 1.0], [1.0, 1.0, 3.0, 1.0]]
    value = loss_of(padding_value=-1)(y_true, y_pred, weight, lengths=[4, 3], mask=mask)
    assert float(value) == pytest.approx((2 * 1 + 8 + 16 + 3 * 64) / 7)


@pytest.mark.parametrize(("average", "expected"), [("token", 3 / 3), ("sequence_sum", 3 / 2), ("sequence_mean", 1.0)])
@pytest.mark.parametrize("counted", [False, True])
def test_counts_give_each_average_its_own(average, expected, counted):
    arguments = {"denominator": COUNTS} if counted else {}
    assert float(call({"average": average}, lengths=[1, 2], **arguments)) == pytest.approx(expected)


def test_weighted_counts_go_with_weights():
    weight = np.array([[2.0, 9.0, 9.0], [0.5, 0.5, 9.0]])
    value = call(lengths=[1, 2], sample_weight=weight, denominator=WEIGHTED)
    assert float(value) == pytest.approx(1.0)


@pytest.mark.parametrize("layer", ["masking", pytest.param("embedding", marks=pytest.mark.wide)])
def test_the_mask_of_a_keras_layer_is_used(layer):
    """Predictions carry the mask of a Masking or Embedding layer as ``_keras_mask``, in Keras 2 and in Keras 3."""
    layers, x = tf.keras.layers, np.array([[3, 1, 0, 0], [2, 0, 0, 0]])
    if layer == "embedding":
        first = [tf.keras.Input([None], dtype="int32"), layers.Embedding(5, 2, mask_zero=True)]
    else:
        first, x = [tf.keras.Input([None, 1]), layers.Masking(0.0)], x[..., None].astype("float32")
    model = tf.keras.Sequential([*first, layers.Dense(1)])
    y_true = np.zeros([2, 4, 1], "float32")

    def means(x):
        y_pred = model(x)
        return loss_of()(y_true, y_pred), loss_of()(y_true, y_pred, mask=np.array([[1, 1, 1, 1], [0, 0, 0, 0]], bool))

    each = np.abs(model(x).numpy()[..., 0])
    wanted = each[[0, 0, 1], [0, 1, 0]].mean(), each[0, :2].mean()
    assert wanted[0] != pytest.approx(each.mean(), rel=1e-3)
    for found in (means(tf.constant(x)), tf.function(means)(tf.constant(x))):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("denominator", [None, 3.0])
@pytest.mark.parametrize("graph", [False, True])
def test_an_infinite_loss_stays_infinite(denominator, graph):
    y_pred = np.array([[1.0, np.inf, 1.0], [1.0, 1.0, np.nan]], "float32")
    run = lambda p: distpad.DistributedLoss(lambda t, p: p)(p, p, lengths=[2, 2], denominator=denominator)
    assert (tf.function(run) if graph else run)(tf.constant(y_pred)).numpy() == np.inf


@pytest.mark.parametrize("denominator", [None, 3.0, distpad.Counts(3.0, 2.0)])
def test_compiled_by_xla(denominator):
    loss_fn = loss_of(backend="local")
    y_pred = np.array([[1.0, 2.0, np.nan], [4.0, np.inf, np.nan]], "float32")

    def step(t, p, lengths):
        with tf.GradientTape() as tape:
            tape.watch(p)
            loss = loss_fn(t, p, lengths=lengths, denominator=denominator)
        return loss, tape.gradient(loss, p)

    arguments = tf.zeros([2, 3]), tf.constant(y_pred), tf.constant([2, 1])
    value, gradient = tf.function(step, jit_compile=True)(*arguments)
    assert float(value) == pytest.approx(7 / 3)
    np.testing.assert_allclose(gradient, np.array([[1, 1, 0], [1, 0, 0]]) / 3, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_dtype_is_float32_at_least(dtype):
    value = loss_of()(tf.zeros([2, 3], dtype), tf.ones([2, 3], dtype), lengths=[1, 2])
    assert value.dtype == ("float64" if dtype == "float64" else "float32") and value == 1


# -- as a Keras loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["keras", "callable"])
def test_config_round_trip(loss):
    inner = tf.keras.losses.MeanSquaredError(reduction="none") if loss == "keras" else absolute
    options = {"average": "sequence_mean", "per": "position", "padding_value": -1, "backend": "local", "name": "mine"}
    before = distpad.DistributedLoss(inner, **options)
    after = distpad.DistributedLoss.from_config(before.get_config())
    assert after.get_config() == before.get_config()
    t, p = np.array([[[1.0], [-1.0]], [[2.0], [3.0]]], "float32"), np.full([2, 2, 1], 5.0, "float32")
    assert float(after(t, p)) == float(before(t, p))
    if loss == "callable":
        assert after.loss is absolute


def test_a_saved_model_keeps_the_loss(tmp_path):
    model = tf.keras.Sequential([tf.keras.Input([None, 2]), tf.keras.layers.Dense(1)])
    inner = tf.keras.losses.MeanSquaredError(reduction="none")
    model.compile("sgd", loss=distpad.DistributedLoss(inner, average="sequence_sum", padding_value=-1))
    x, y = np.random.default_rng(0).normal(size=[4, 3, 2]).astype("float32"), np.ones([4, 3, 1], "float32")
    y[:, 2] = -1
    before = model.evaluate(x, y, batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = tf.keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.loss, distpad.DistributedLoss)
    assert loaded.loss.get_config() == model.loss.get_config()
    assert loaded.evaluate(x, y, batch_size=4, verbose=0) == pytest.approx(before, rel=1e-6)
    errors = (model.predict(x, verbose=0)[..., 0] - 1) ** 2
    assert before == pytest.approx(errors[:, :2].sum() / 4, rel=1e-5)


@pytest.mark.parametrize("average", [np.float32(2.5), np.int64(3)])
def test_a_numpy_average_can_be_saved(average):
    """Keras writes the config as JSON."""
    config = json.loads(json.dumps(loss_of(average=average).get_config()))
    assert distpad.DistributedLoss.from_config(config).average == average


def test_a_keras_loss_of_ones_own_gets_its_labels_as_keras_casts_them():
    class Own(tf.keras.losses.Loss):
        def call(self, y_true, y_pred):
            return tf.reduce_mean(tf.abs(tf.cast(y_true, y_pred.dtype) - y_pred), -1)

    class Trusting(Own):
        def call(self, y_true, y_pred):
            return tf.reduce_mean(tf.abs(y_true - y_pred), -1)

    y_pred = tf.zeros([1, 2, 1])
    wide = np.array([[[1.0], [2.0]]])  # float64, NumPy's default
    for own in (Own, Trusting):
        assert float(distpad.DistributedLoss(own(reduction="none"))(wide, y_pred)) == 1.5
    if hasattr(Own(reduction="none"), "dtype"):  # Keras 3 also casts integers
        assert float(distpad.DistributedLoss(Trusting(reduction="none"))(wide.astype("int64"), y_pred)) == 1.5


@pytest.mark.parametrize("name", ["lengths", "mask", "sample_weight"])
def test_ragged_lengths_masks_and_weights_are_refused(name):
    with pytest.raises(TypeError, match=rf"DistributedLoss: {name}.*RaggedTensor"):
        call(**{name: tf.ragged.constant([[1.0], [1.0, 1.0]])})
