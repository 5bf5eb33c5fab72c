"""distpad.metrics on one device: what arguments are taken, refused, saved and compiled."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from distpad import metrics

ALL = [getattr(metrics, name) for name in metrics.__all__]
LABELS = np.array([[1, 0, 2], [2, 9, 9]])
SCORES = np.array([[[0, 1, 0], [1, 0, 0], [1, 0, 0.0]], [[0, 0, 1], [np.nan] * 3, [np.nan] * 3]])


def value(metric, *arguments, **options):
    metric.update_state(*arguments, **options)
    return float(metric.result())


@tf.keras.utils.register_keras_serializable("distpad_tests")
def best_path(scores):
    """A CTC model's ids; class 2 is the blank."""
    frames = tf.fill([tf.shape(scores)[0]], tf.shape(scores)[1])
    return tf.nn.ctc_greedy_decoder(tf.transpose(scores, [1, 0, 2]), frames)[0][0]


@tf.keras.utils.register_keras_serializable("distpad_tests")
def no_loss(y_true, y_pred):
    return tf.reduce_sum(0 * y_pred, axis=-1)


def test_sources_are_combined():
    mask = np.array([[True, True, False], [True, True, True]])
    weights = np.array([[1.0, 0.0, 1.0], [2.0, 5.0, 5.0]])
    sources = {"lengths": [3, 1], "mask": mask}
    assert value(metrics.TokenAccuracy(), LABELS, SCORES, lengths=[3, 1]) == 3 / 4
    assert value(metrics.TokenAccuracy(), LABELS, SCORES, **sources) == 1
    assert value(metrics.TokenAccuracy(), LABELS, SCORES, weights, lengths=[3, 1]) == 3 / 4
    assert value(metrics.TokenAccuracy(padding_value=2), LABELS, SCORES, mask=LABELS != 9) == 1
    assert value(metrics.SequenceAccuracy(), LABELS, SCORES, lengths=[3, 1]) == 1 / 2
    assert value(metrics.SequenceAccuracy(), LABELS, SCORES, [3.0, 1.0], lengths=[3, 1]) == 1 / 4
    assert value(metrics.SequenceAccuracy(), LABELS, SCORES, [[3.0], [1.0]], lengths=[3, 1]) == 1 / 4
    assert value(metrics.SequenceAccuracy(), LABELS, SCORES, weights, **sources) == 1
    assert value(metrics.CharacterErrorRate(), LABELS, SCORES, lengths=[3, 1]) == 1 / 4
    assert value(metrics.CharacterErrorRate(), LABELS, SCORES, [3.0, 1.0], lengths=[3, 1]) == 3 / 10
    assert value(metrics.CharacterErrorRate(), LABELS, SCORES, weights, **sources) == 0


def test_labels_in_other_forms():
    one_hot = np.eye(3)[np.array([[1, 0, 2], [2, 0, 0]])]
    one_hot[1, 1:] = np.nan
    for labels in (one_hot, LABELS[..., None], LABELS.astype("float32")):
        assert value(metrics.TokenAccuracy(), labels, SCORES, lengths=[3, 1]) == 3 / 4
        assert value(metrics.CharacterErrorRate(), labels[:1], SCORES[:1]) == 1 / 3
    assert value(metrics.TokenAccuracy(), [["a", "b"]], [["a", "c"]]) == 1 / 2


def test_error_rates_of_empty_sequences():
    """A row of length 0 is filling, unless the mask says that it counts; all that is predicted of it is wrong then."""
    guess = {"lengths": [2, 0], "prediction_lengths": [2, 3]}
    assert value(metrics.CharacterErrorRate(), [[1, 2], [0, 0]], [[1, 2, 0], [4, 5, 6]], **guess) == 0
    counted = value(metrics.CharacterErrorRate(), [[1, 2], [0, 0]], [[1, 2, 0], [4, 5, 6]], mask=[True, True], **guess)
    assert counted == 3 / 2
    assert value(metrics.WordErrorRate(), ["a b", ""], ["a", "c"]) == 1
    assert value(metrics.WordErrorRate(), ["a b", ""], ["a", "c"], mask=[True, False]) == 1 / 2
    assert value(metrics.WordErrorRate(), ["a b", "c"], ["", ""]) == 1


def test_decoding():
    """Best path of a CTC model's scores, for labels that are shorter than the frames."""
    frames = np.array([[[9, 0, 0], [9, 0, 0], [0, 0, 9], [9, 0, 0], [0, 9, 0.0]]])  # 0 0 _ 0 1
    metric = metrics.CharacterErrorRate(decode=best_path, padding_value=-1)
    assert value(metric, [[0, 0, 0, -1]], frames) == 1 / 3
    dense = metrics.CharacterErrorRate(padding_value=-1)
    assert value(dense, [[0, 0, 0, -1]], [[0, 0, 1, -1, -1, -1]]) == 1 / 3


def test_a_chance_of_nothing():
    """A probability that float16 rounded to 0 is no infinite perplexity; it counts as Keras's least."""
    chances = tf.constant([[[1.0, 0.0]]], tf.float16)
    assert value(metrics.Perplexity(), [[1]], chances) == pytest.approx(1e7, rel=1e-5)
    large = tf.constant([[[60000.0, 0.0]]], tf.float16)
    assert np.log(value(metrics.Perplexity(from_logits=True), [[0]], large)) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: metrics.MaskedMean("mae"), "MaskedMean: function is 'mae', expected a callable"),
        (lambda: metrics.WordErrorRate(decode=3), "WordErrorRate: decode is 3, expected 'ctc' or a callable"),
        (lambda: metrics.TokenAccuracy(padding_value=[1]), "TokenAccuracy: padding_value is .*, expected one number"),
        (lambda: metrics.TokenAccuracy(backend="mpi"), "TokenAccuracy: backend is 'mpi', expected one of"),
        (lambda: value(metrics.TokenAccuracy(), LABELS, SCORES, lengths=[4, 1]), "TokenAccuracy: lengths hold a value"),
        (lambda: value(metrics.TokenAccuracy(), LABELS, SCORES, lengths=[1]), "TokenAccuracy: lengths has shape"),
        (lambda: value(metrics.TokenAccuracy(), LABELS[:, :2], SCORES), "TokenAccuracy: the shape of labels and"),
        (lambda: value(metrics.TokenAccuracy(), [LABELS], SCORES), "TokenAccuracy: y_true is a list, expected"),
        (lambda: value(metrics.SequenceAccuracy(), LABELS, SCORES, mask=[True]), "SequenceAccuracy: mask has shape"),
        (
            lambda: value(metrics.MaskedMean(lambda *_: 1.0), LABELS, SCORES),
            "MaskedMean: the function's result is of rank 0",
        ),
        (
            lambda: value(metrics.Perplexity(), tf.ragged.constant([[1]]), SCORES),
            "Perplexity: y_true is a RaggedTensor",
        ),
        (
            lambda: value(metrics.CharacterErrorRate(), LABELS, LABELS, prediction_lengths=[4, 1]),
            "CharacterErrorRate: prediction_lengths hold a value above",
        ),
        (
            lambda: value(metrics.CharacterErrorRate(), LABELS[:, :2], SCORES),
            "CharacterErrorRate: the shape of labels and",
        ),
        (lambda: value(metrics.WordErrorRate(), [1], ["a"]), "WordErrorRate: y_true has shape .batch. and dtype int32"),
        (lambda: value(metrics.WordErrorRate(), ["a"], [1]), "WordErrorRate: y_pred has shape .batch. and dtype int32"),
        (lambda: value(metrics.WordErrorRate(), ["a"], {"a": ["b"]}), "WordErrorRate: y_pred is a dict, expected ids"),
        (
            lambda: value(metrics.CharacterErrorRate(), ["a"], [[1, 2]]),
            "CharacterErrorRate: the dtype of y_pred is int32, expected string, as y_true",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_metric_of_another_engine_is_refused():
    """Made outside the scope of a strategy of several replicas, it would be one replica's alone."""

    class Two(type(metrics.TokenAccuracy(backend="local")._engine)):
        num_replicas, name = 2, "two"

    metric = metrics.TokenAccuracy()
    metric._given = Two()
    with pytest.raises(ValueError, match=r"made for local, expected two, where it is updated. Make it inside"):
        metric.update_state(LABELS, SCORES, lengths=[3, 1])


@pytest.mark.parametrize("make", ALL)
def test_configurations(make):
    """What a configuration makes is the same metric, without its state."""
    options = {"padding_value": 9, "backend": "local", "name": "mine"}
    if make is metrics.MaskedMean:
        options["function"] = tf.keras.losses.sparse_categorical_crossentropy
    if issubclass(make, (metrics.CharacterErrorRate, metrics.WordErrorRate)):
        options |= {"decode": best_path, "blank_index": 2, "frames_per_step": 4}
    if make is metrics.Perplexity:
        options["from_logits"] = True
    if make in (metrics.TokenAccuracy, metrics.SequenceAccuracy):
        options["threshold"] = 0.25
    metric = make(**options)
    config = metric.get_config()
    assert set(options) == set(config)
    again = make.from_config(config)
    assert again.get_config() == config
    for name in options:
        if name != "backend":
            assert getattr(again, name) == options[name]


def model_of(held, **options):
    model = tf.keras.Sequential([tf.keras.Input([None, 3]), tf.keras.layers.Dense(3, use_bias=False)])
    model.layers[-1].set_weights([np.eye(3)])
    model.compile(loss=no_loss, optimizer="sgd", metrics=held, **options)
    return model


def test_a_saved_model_keeps_its_metrics(tmp_path):
    model = model_of([metrics.TokenAccuracy(padding_value=9, name="tokens")])
    scores = np.nan_to_num(SCORES)
    labels = LABELS.astype("float32")
    before = model.evaluate(scores, labels, verbose=0, return_dict=True)
    model.save(tmp_path / "model.keras")
    after = tf.keras.models.load_model(tmp_path / "model.keras").evaluate(scores, labels, verbose=0, return_dict=True)
    assert before["tokens"] == 3 / 4 and after["tokens"] == 3 / 4


def test_compiled_by_xla():
    """All that count no edits are."""
    held = [
        metrics.TokenAccuracy(padding_value=9, name="tokens"),
        metrics.SequenceAccuracy(padding_value=9, name="sequences"),
        metrics.Perplexity(from_logits=True, padding_value=9, name="perplexity"),
        metrics.MaskedMean(lambda _, y_pred: y_pred[..., 0], padding_value=9, name="mean"),
    ]
    model = model_of(held, jit_compile=True)
    found = model.evaluate(np.nan_to_num(SCORES), LABELS.astype("float32"), verbose=0, return_dict=True)
    assert (found["tokens"], found["sequences"], found["mean"]) == (3 / 4, 1 / 2, 1 / 2)
    right = np.log(np.e / (np.e + 2))
    assert np.log(found["perplexity"]) == pytest.approx(-(3 * right + np.log(1 / (np.e + 2))) / 4)
