"""DistributedLoss: valid losses, ranks and batches, and the messages of argument errors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tensorflow as tf

import distpad
from distpad.losses.counts import LossInputs

LOSSES = tf.keras.losses
VALUES = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "float32")


def mean_of(loss, **options):
    """Return the mean loss of VALUES against 0, four of which are valid."""
    loss_fn = distpad.DistributedLoss(loss, **options)
    return float(loss_fn(VALUES[..., None], tf.zeros([2, 3, 1]), lengths=[3, 1]))


@pytest.mark.parametrize("loss", ["mse", "MSE", "mean_squared_error", "MeanSquaredError", LOSSES.MeanSquaredError()])
def test_a_loss_by_name_or_of_the_default_reduction(loss):
    assert mean_of(loss) == (1 + 4 + 9 + 16) / 4
    assert mean_of(loss, average="sequence_sum") == (1 + 4 + 9 + 16) / 2


def test_every_name_is_unreduced():
    for name in (
        "mae",
        "kl_divergence",
        "huber",
        "log_cosh",
        "categorical_crossentropy",
        "binary_crossentropy",
        "poisson",
    ):
        loss_fn = distpad.DistributedLoss(name)
        assert loss_fn(tf.ones([2, 3, 4]) / 4, tf.ones([2, 3, 4]) / 4, lengths=[3, 1]).shape == ()


def test_a_copy_keeps_the_attributes_of_the_loss():
    """The copy has attributes that get_config omits; the original keeps its reduction."""

    class Scaled(LOSSES.Loss):
        def __init__(self, scale=1.0, **options):
            super().__init__(**options)
            self.scale = scale

        def call(self, y_true, y_pred):
            return self.scale * tf.abs(y_true - y_pred)[..., 0]

    given = Scaled(scale=3.0)
    before = given.reduction
    assert mean_of(given) == 3 * (1 + 2 + 3 + 4) / 4
    assert given.reduction == before != "none"
    assert mean_of(LOSSES.Huber(delta=100.0)) == (1 + 4 + 9 + 16) / 8


@pytest.mark.parametrize("name", ["msee", "", "DistributedLoss"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=f"loss is {name!r}, expected Keras's name of a loss, such as 'mse'"):
        distpad.DistributedLoss(name)


def test_a_loss_by_name_is_saved():
    loss_fn = distpad.DistributedLoss("mae", average="sequence_mean")
    again = distpad.DistributedLoss.from_config(loss_fn.get_config())
    values = [float(each(VALUES[..., None], tf.zeros([2, 3, 1]), lengths=[3, 1])) for each in (loss_fn, again)]
    assert values == [3.0, 3.0]  # the mean of 2 and 4


# -- one value a row ---------------------------------------------------------------------------------------------------

LABELS, LOGITS = np.array([0, 1, 2, 3]), np.random.default_rng(0).normal(size=[4, 5]).astype("float32")


def each_row():
    shifted = np.exp(LOGITS.astype("float64"))
    return -np.log(shifted[np.arange(4), LABELS] / shifted.sum(axis=1))


@pytest.mark.parametrize("average", ["token", "sequence_sum", "sequence_mean"])
@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ({}, [1, 1, 1, 1]),
        ({"mask": [True, False, True, True]}, [1, 0, 1, 1]),
        ({"sample_weight": [1.0, 0.0, 1.0, 1.0]}, [1, 0, 1, 1]),
    ],
)
def test_plain_classification_needs_no_mask(average, given, weights):
    loss_fn = distpad.DistributedLoss(LOSSES.SparseCategoricalCrossentropy(from_logits=True), average=average)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = loss_fn(LABELS, LOGITS, **given)
    np.testing.assert_allclose(found, np.average(each_row(), weights=weights), rtol=1e-6)


@pytest.mark.parametrize("average", ["token", "sequence_sum", "sequence_mean"])
def test_weights_of_rows_may_have_an_axis(average):
    """Keras 2 passes weights ``[batch, 1]`` from fit."""
    loss_fn = distpad.DistributedLoss(LOSSES.SparseCategoricalCrossentropy(from_logits=True), average=average)
    weight = np.array([1.0, 0.0, 2.0, 0.5], np.float32)
    assert float(loss_fn(LABELS, LOGITS, weight[:, None])) == float(loss_fn(LABELS, LOGITS, weight))


@pytest.mark.parametrize(
    "given", [{"lengths": [1, 1, 1, 1]}, {"mask": np.ones([4, 5], bool)}, {"sample_weight": np.ones([4, 5])}]
)
def test_one_value_a_row_beside_positions_is_refused(given):
    loss_fn = distpad.DistributedLoss(LOSSES.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match=r'shape \[batch\].*lengths, a mask or weights of positions.*per="sequence"'):
        loss_fn(LABELS, LOGITS, **given)


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "mae", "binary_crossentropy", LOSSES.Huber()])
@pytest.mark.parametrize("given", [{}, {"lengths": [3, 1]}, {"mask": np.ones([2, 3], bool)}])
@pytest.mark.parametrize(("shape", "other", "name"), [((2, 3), (2, 3, 1), "y_true"), ((2, 3, 1), (2, 3), "y_pred")])
def test_an_axis_that_only_one_of_them_has_is_named(loss, given, shape, other, name):
    """Predictions of Dense(1) with labels [batch, length]: Keras would take positions for features."""
    loss_fn = distpad.DistributedLoss(loss, average="sequence_sum")
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 3\) .*Write {name}\[\.\.\., None\]"):
        loss_fn(tf.ones(shape), tf.ones(other), **given)


@pytest.mark.parametrize("given", [{"lengths": [3, 1]}, {"padding_value": -1.0}])
@pytest.mark.parametrize(("shape", "other", "name"), [((2, 3), (2, 3, 1), "y_true"), ((2, 3, 1), (2, 3), "y_pred")])
def test_positions_are_no_features_of_a_sequence_either(given, shape, other, name):
    """Keras's mean over positions includes padding, whatever the lengths."""
    options = {key: given[key] for key in given if key == "padding_value"}
    loss_fn = distpad.DistributedLoss("mse", per="sequence", average="sequence_sum", **options)
    arguments = {key: given[key] for key in given if key == "lengths"}
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 3\) .*Write {name}\[\.\.\., None\]"):
        loss_fn(tf.ones(shape), tf.ones(other), **arguments)


def test_the_axis_of_channels_of_masks_of_images_is_named():
    loss_fn = distpad.DistributedLoss("mse")
    with pytest.raises(ValueError, match=r"y_true has shape \(2, 3, 4\) .*Write y_true\[\.\.\., None\]"):
        loss_fn(tf.ones([2, 3, 4]), tf.ones([2, 3, 4, 1]), tf.ones([2, 3, 4]))


def test_a_series_with_its_axis_is_right():
    assert mean_of("mse") == 7.5
    loss_fn = distpad.DistributedLoss(lambda t, p: tf.square(t - p[..., 0]))  # a callable that knows its ranks
    assert float(loss_fn(VALUES, tf.zeros([2, 3, 1]), lengths=[3, 1])) == 7.5


def test_a_loss_that_broadcasts_labels_over_an_axis_is_refused():
    loss_fn = distpad.DistributedLoss(lambda t, p: tf.square(t - p))
    with pytest.raises(ValueError, match=r"Write y_true\[\.\.\., None\]"):
        loss_fn(tf.ones([3, 3]), tf.ones([3, 3, 1]), lengths=[1, 2, 3])


# -- no mask -----------------------------------------------------------------------------------------------------------


def test_it_warns_once_that_all_positions_count():
    loss_fn = distpad.DistributedLoss("mse")
    with pytest.warns(
        UserWarning, match="no mask was given.*all positions count.*batch=, lengths=, mask=, padding_value="
    ):
        loss_fn(VALUES[..., None], tf.zeros([2, 3, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(VALUES[..., None], tf.zeros([2, 3, 1]))
        for given in ({"lengths": [3, 1]}, {"mask": np.ones([2, 3], bool)}, {"sample_weight": np.ones([2, 3])}):
            distpad.DistributedLoss("mse")(VALUES[..., None], tf.zeros([2, 3, 1]), **given)
        distpad.DistributedLoss("mse", padding_value=0)(VALUES[..., None], tf.zeros([2, 3, 1]))


# -- batch= ------------------------------------------------------------------------------------------------------------


def counts_of(lengths, weights=None, kind=distpad.Counts, replicas=1.0):
    weights = np.ones(int(np.sum(lengths))) if weights is None else np.array(weights)
    totals = [tf.constant(float(n), tf.float64) for n in (weights.sum(), np.count_nonzero(lengths))]
    return kind(*totals, local=tf.stack(totals), replicas=tf.constant(replicas, tf.float64))


@pytest.mark.parametrize("average", ["token", "sequence_sum", "sequence_mean", 10.0])
def test_batch_brings_lengths_and_counts(average):
    loss_fn, lengths = distpad.DistributedLoss("mse", average=average), tf.constant([3, 1])
    y_pred = tf.zeros([2, 3, 1])
    found = loss_fn(VALUES[..., None], y_pred, batch=LossInputs(lengths, None, counts_of([3, 1])))
    assert float(found) == pytest.approx(float(loss_fn(VALUES[..., None], y_pred, lengths=lengths)), rel=1e-6)


def test_batch_brings_weights():
    inputs = LossInputs(
        tf.constant([3, 1]),
        tf.constant([[1.0, 0.0, 2.0], [1.0, 9.0, 9.0]]),
        counts_of([3, 1], [1, 0, 2, 1], distpad.WeightedCounts),
    )
    found = distpad.DistributedLoss("mae")(VALUES[..., None], tf.zeros([2, 3, 1]), batch=inputs)
    assert float(found) == (1 * 1 + 2 * 3 + 1 * 4) / 4


@pytest.mark.parametrize("average", ["token", "sequence_sum", "sequence_mean"])
def test_batch_of_areas(average):
    """Two ragged axes: images of 1 x 2 and 2 x 1, and a filler row."""
    sizes = {"y": distpad.Pad(axis=(0, 1))}
    images = [{"y": np.full(shape, value, "float32")} for shape, value in [((1, 2), 3.0), ((2, 1), 5.0), ((1, 1), 9.0)]]
    batches = distpad.PaddedBatches(images, 2, padding=sizes, tokens="y")
    loss_fn = distpad.DistributedLoss(lambda t, p: tf.abs(t - p), average=average)
    found = [float(loss_fn(batch.data["y"], tf.zeros_like(batch.data["y"]), batch=batch)) for batch in batches]
    assert found == ([8.0, 9.0] if average == "sequence_sum" else [4.0, 9.0])


def test_batch_beside_the_arguments_that_it_carries_is_refused():
    inputs, y_pred = LossInputs(tf.constant([3, 1]), None, counts_of([3, 1])), tf.zeros([2, 3, 1])
    loss_fn = distpad.DistributedLoss("mse")
    with pytest.raises(ValueError, match="batch is given beside lengths, denominator, expected alone: it carries them"):
        loss_fn(VALUES[..., None], y_pred, lengths=[3, 1], denominator=4, batch=inputs)
    with pytest.raises(ValueError, match=r"batch is of the losses \['a'\].*Write batch=batch.loss_inputs\[NAME\]"):
        loss_fn(VALUES[..., None], y_pred, batch={"a": inputs})
    with pytest.raises(TypeError, match=r"batch is tuple, expected a batch of distpad\.PaddedBatches"):
        loss_fn(VALUES[..., None], y_pred, batch=(1, 2))


# -- counts of other positions or replicas -----------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("average", ["token", "sequence_sum", "sequence_mean"])
@pytest.mark.parametrize(
    ("counted", "given"),
    [
        ([3, 1], {"lengths": [2, 1]}),  # texts and frames, in either direction
        ([1, 1], {"lengths": [3, 1]}),
        ([3, 0], {"lengths": [2, 1]}),
    ],
)
def test_counts_of_another_feature_are_found_out(average, counted, given, graph):
    loss_fn = distpad.DistributedLoss("mse", average=average)
    call = lambda: loss_fn(VALUES[..., None], tf.zeros([2, 3, 1]), denominator=counts_of(counted), **given)
    call = tf.function(call) if graph else call
    with pytest.raises(tf.errors.InvalidArgumentError if graph else ValueError, match="Counts of other positions"):
        call()


def test_counts_of_another_feature_for_one_value_a_sequence():
    ctc = distpad.DistributedLoss(distpad.CTC(blank_index=0), per="sequence")
    y_true, logits = ([[1, 2], [1, 0]], [2, 1], [4, 3]), tf.zeros([2, 4, 3])
    assert float(ctc(y_true, logits, lengths=[2, 1], denominator=counts_of([2, 1]))) > 0
    with pytest.raises(ValueError, match=r"Counts of other positions.*0→\(4, 2, 3, 2\)"):
        ctc(y_true, logits, lengths=[2, 1], denominator=counts_of([3, 1]))


def test_one_position_of_many_is_found_out():
    loss_fn, values = distpad.DistributedLoss("mse"), tf.ones([1, 40000, 1])
    assert float(loss_fn(values, 0 * values, lengths=[39999], denominator=counts_of([39999]))) == 1
    with pytest.raises(ValueError, match="Counts of other positions"):
        loss_fn(values, 0 * values, lengths=[39999], denominator=counts_of([40000]))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("average", ["token", "sequence_sum"])
def test_counts_for_another_number_of_replicas_are_found_out(average, graph):
    loss_fn = distpad.DistributedLoss("mse", average=average)
    call = lambda: loss_fn(
        VALUES[..., None], tf.zeros([2, 3, 1]), lengths=[3, 1], denominator=counts_of([3, 1], replicas=2.0)
    )
    call = tf.function(call) if graph else call
    with pytest.raises(tf.errors.InvalidArgumentError if graph else ValueError, match="another number of replicas"):
        call()


# -- no rows -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True])
def eagerly(request):
    """Run functions eagerly, as users do to debug a step."""
    tf.config.run_functions_eagerly(request.param)
    yield
    tf.config.run_functions_eagerly(False)


def test_a_loss_of_no_rows_is_traced_once(eagerly):
    traced = []

    def loss(y_true, y_pred):
        traced.append(1)
        return tf.reduce_sum(y_pred, [1, 2])

    loss_fn = distpad.DistributedLoss(loss, per="sequence", average="sequence_sum")
    for width in (4, 4, 4, 5):
        y_pred = tf.zeros([0, width, 2])
        assert float(loss_fn(tf.zeros([0, 3], tf.int32), y_pred, lengths=tf.zeros([0], tf.int32))) == 0
    assert len(traced) <= 4  # two of each width: tf.cond traces both of its branches
