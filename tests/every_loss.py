"""The losses that DistributedLoss is held against, and what one device makes of each of them.

The reference shares no code with distpad: each row is cut to its own length and shown to the loss alone, on one device,
in float64 where the loss computes in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

import distpad

FEATURES, CLASSES = 5, 4
IS_KERAS_3 = getattr(tf.keras, "__version__", "2").startswith("3")
FRAMES = 17  # of CTC's logits, more than any of its labels needs

Row = dict[str, np.ndarray]


class Case(NamedTuple):
    """A loss and what it is shown.

    Attributes:
        make: the loss, of reduction none.
        labels: those of one row of n positions.
        activate: from logits to what the loss is shown.
        per: as in DistributedLoss.
        dtypes: what it computes in.
        shortest: the fewest labels of a row that it takes.
        reference: what one device is shown instead of a loss of distpad's own.
    """

    make: Callable[[], Any]
    labels: Callable[[np.random.Generator, int], np.ndarray]
    activate: Callable[[tf.Tensor], tf.Tensor] = tf.identity
    per: str = "position"
    dtypes: tuple[str, ...] = ("float64", "float32")
    shortest: int = 0
    reference: Callable[[], Any] | None = None


def classes(random: np.random.Generator, n: int) -> np.ndarray:
    return random.integers(0, CLASSES, n)


def one_hot(random: np.random.Generator, n: int) -> np.ndarray:
    return np.eye(CLASSES)[classes(random, n)]


def bits(random: np.random.Generator, n: int) -> np.ndarray:
    return random.integers(0, 2, [n, CLASSES]).astype(float)


def values(random: np.random.Generator, n: int) -> np.ndarray:
    return random.normal(size=[n, CLASSES])


def counts(random: np.random.Generator, n: int) -> np.ndarray:
    return random.integers(0, 5, [n, CLASSES]).astype(float)


def mixtures(random: np.random.Generator, n: int) -> np.ndarray:
    return random.dirichlet(np.ones(CLASSES), n) if n else np.zeros([0, CLASSES])


def signs(random: np.random.Generator, n: int) -> np.ndarray:
    return random.choice([-1.0, 1.0], [n, CLASSES])


def _keras(name: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(tf.keras.losses, name)(reduction="none", **settings)


_LOGITS = {"from_logits": True}
KERAS = {
    "SparseCategoricalCrossentropy": Case(_keras("SparseCategoricalCrossentropy"), classes, tf.nn.softmax),
    "SparseCategoricalCrossentropy, logits": Case(_keras("SparseCategoricalCrossentropy", **_LOGITS), classes),
    "CategoricalCrossentropy": Case(_keras("CategoricalCrossentropy"), one_hot, tf.nn.softmax),
    "CategoricalCrossentropy, logits": Case(_keras("CategoricalCrossentropy", **_LOGITS), one_hot),
    "CategoricalCrossentropy, smoothed": Case(
        _keras("CategoricalCrossentropy", label_smoothing=0.1, **_LOGITS), one_hot
    ),
    "CategoricalCrossentropy, smoothed, of probabilities": Case(
        _keras("CategoricalCrossentropy", label_smoothing=0.1), one_hot, tf.nn.softmax
    ),
    "BinaryCrossentropy": Case(_keras("BinaryCrossentropy"), bits, tf.nn.sigmoid),
    "BinaryCrossentropy, logits": Case(_keras("BinaryCrossentropy", **_LOGITS), bits),
    "BinaryCrossentropy, smoothed": Case(_keras("BinaryCrossentropy", label_smoothing=0.2, **_LOGITS), bits),
    "BinaryCrossentropy, smoothed, of probabilities": Case(
        _keras("BinaryCrossentropy", label_smoothing=0.2), bits, tf.nn.sigmoid
    ),
    "BinaryFocalCrossentropy": Case(_keras("BinaryFocalCrossentropy", gamma=2.0), bits, tf.nn.sigmoid),
    "BinaryFocalCrossentropy, logits": Case(_keras("BinaryFocalCrossentropy", **_LOGITS), bits),
    "CategoricalFocalCrossentropy": Case(_keras("CategoricalFocalCrossentropy"), one_hot, tf.nn.softmax),
    "CategoricalFocalCrossentropy, logits": Case(_keras("CategoricalFocalCrossentropy", **_LOGITS), one_hot),
    "MeanSquaredError": Case(_keras("MeanSquaredError"), values),
    "MeanAbsoluteError": Case(_keras("MeanAbsoluteError"), values),
    "MeanAbsolutePercentageError": Case(_keras("MeanAbsolutePercentageError"), values),
    "MeanSquaredLogarithmicError": Case(_keras("MeanSquaredLogarithmicError"), counts, tf.nn.softplus),
    "Huber": Case(_keras("Huber", delta=0.5), values),
    "LogCosh": Case(_keras("LogCosh"), values),
    "KLDivergence": Case(_keras("KLDivergence"), mixtures, tf.nn.softmax),
    "CosineSimilarity": Case(_keras("CosineSimilarity"), values),
    "Poisson": Case(_keras("Poisson"), counts, tf.nn.softplus),
    "Hinge": Case(_keras("Hinge"), signs),
    "SquaredHinge": Case(_keras("SquaredHinge"), signs),
    "CategoricalHinge": Case(_keras("CategoricalHinge"), one_hot),
}


def ctc(y_true: Any, y_pred: tf.Tensor) -> tf.Tensor:
    labels, lengths, frames = y_true
    return tf.nn.ctc_loss(labels, y_pred, lengths, frames, logits_time_major=False, blank_index=0)


def sparse_ctc(y_true: Any, y_pred: tf.Tensor) -> tf.Tensor:
    """The same, with labels that are handed on as a SparseTensor."""
    labels, lengths, frames = y_true
    real = tf.where(tf.sequence_mask(lengths, tf.shape(labels)[1]))
    shape = tf.shape(labels, tf.int64)
    sparse = tf.SparseTensor(real, tf.gather_nd(labels, real), shape)
    return tf.nn.ctc_loss(sparse, y_pred, None, frames, logits_time_major=False, blank_index=0)


def _keras_ctc() -> Callable[[Any, Any], tf.Tensor]:
    """It takes every frame for real: those that are padded are made certain blanks, which is what its users must do."""
    loss = tf.keras.losses.CTC(reduction="none")

    def of_sequences(y_true: Any, y_pred: tf.Tensor) -> tf.Tensor:
        labels, _, frames = y_true
        real = tf.sequence_mask(frames, tf.shape(y_pred)[1])[..., tf.newaxis]
        return loss.call(labels, tf.where(real, y_pred, tf.constant([0.0, *[-1e9] * (CLASSES - 1)], y_pred.dtype)))

    return of_sequences


def letters(random: np.random.Generator, n: int) -> np.ndarray:
    return random.integers(1, CLASSES, n)  # 0 is the blank


CTC = {
    "tf.nn.ctc_loss, dense labels": Case(lambda: ctc, letters, per="sequence", dtypes=("float32",)),
    "tf.nn.ctc_loss, sparse labels": Case(lambda: sparse_ctc, letters, per="sequence", dtypes=("float32",), shortest=1),
    "distpad.CTC": Case(
        lambda: distpad.CTC(blank_index=0), letters, per="sequence", dtypes=("float32",), reference=lambda: ctc
    ),
}


def _addons(name: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        import tensorflow_addons as tfa

        return getattr(tfa.losses, name)(reduction=tf.keras.losses.Reduction.NONE, **settings)

    return make


def _sequence_loss() -> Callable[[Any, Any], tf.Tensor]:
    """It divides by the weights that this replica has; in this form it divides by nothing."""
    import tensorflow_addons as tfa

    sums = {"sum_over_timesteps": False, "sum_over_batch": False}
    loss = tfa.seq2seq.SequenceLoss(average_across_timesteps=False, average_across_batch=False, **sums)
    return lambda y_true, y_pred: loss(y_true, y_pred, tf.ones_like(y_pred[..., 0]))


def _crf() -> Callable[[Any, Any], tf.Tensor]:
    import tensorflow_addons as tfa

    transitions = np.random.default_rng(5).normal(size=[CLASSES, CLASSES])

    def of_sequences(y_true: Any, y_pred: tf.Tensor) -> tf.Tensor:
        tags, lengths, _ = y_true
        between = tf.constant(transitions, y_pred.dtype)
        return -tfa.text.crf_log_likelihood(y_pred, tags, lengths, between)[0]

    return of_sequences


ADDONS = {
    "tfa SigmoidFocalCrossEntropy": Case(_addons("SigmoidFocalCrossEntropy", from_logits=True), bits),
    "tfa PinballLoss": Case(_addons("PinballLoss", tau=0.3), values),
    "tfa SequenceLoss, unreduced": Case(_sequence_loss, classes, dtypes=("float32",)),
    "tfa crf_log_likelihood": Case(_crf, classes, per="sequence", dtypes=("float32",)),
}
KERAS_3 = {
    "keras.losses.CTC, padded frames blank": Case(
        _keras_ctc, letters, per="sequence", dtypes=("float32",), reference=lambda: ctc
    ),
}
CASES = {**KERAS, **CTC, **KERAS_3, **ADDONS}


def missing(name: str, is_keras_3: bool = IS_KERAS_3) -> str:
    """Why a stack has no such loss; empty where it has."""
    if is_keras_3:
        return "Addons needs TensorFlow 2.15" if name in ADDONS else ""
    return "Keras 2 has none" if name in KERAS_3 else ""


def rows_of(case: Case, replica: int) -> list[Row]:
    """A replica's rows, of lengths that differ much, one of them 0 if it may; every replica's are its own."""
    random = np.random.default_rng([17, replica])
    lengths = [*random.integers(1, 8, 1 + replica % 3), case.shortest]
    width = [FRAMES] * len(lengths) if case.per == "sequence" and case.labels is letters else lengths
    return [{"x": random.normal(size=[wide, FEATURES]), "y": case.labels(random, n)} for n, wide in zip(lengths, width)]


def weights() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(18)
    return random.normal(size=[FEATURES, CLASSES]), random.normal(size=[CLASSES])


def padded(case: Case, rows: Sequence[Row], dtype: str) -> dict[str, np.ndarray]:
    """One replica's batch, padded to its own longest row and one beyond.

    Labels are out of range where padded, but for losses of sequences, which are handed them as they are.
    """

    def stacked(name: str, filling: float) -> np.ndarray:
        width = 1 + max(len(row[name]) for row in rows)
        beyond = [(0, 0)] * (rows[0][name].ndim - 1)
        return np.stack(
            [np.pad(row[name], [(0, width - len(row[name])), *beyond], constant_values=filling) for row in rows]
        )

    y = stacked("y", -99 if case.per == "position" else 0)
    return {
        "x": stacked("x", 0).astype(dtype),
        "y": y.astype(np.int32 if y.dtype.kind == "i" else dtype),
        "lengths": np.array([len(row["y"]) for row in rows], np.int32),
        "frames": np.array([len(row["x"]) for row in rows], np.int32),
    }


def expected(case: Case, rows: Sequence[Row]) -> list[np.ndarray]:
    """The gradients by kernel and bias on one device: the sum over rows, each alone, over the number of positions."""
    dtype = case.dtypes[0]
    kernel, bias = (tf.Variable(value.astype(dtype)) for value in weights())
    total, count = [np.zeros(variable.shape) for variable in (kernel, bias)], 0
    loss = (case.reference or case.make)()
    for row in rows:
        n = len(row["y"])
        if not n:
            continue
        count += n
        labels = tf.constant(row["y"][None], tf.int32 if row["y"].dtype.kind == "i" else dtype)
        with tf.GradientTape() as tape:
            y_pred = case.activate(tf.constant(row["x"][None], dtype) @ kernel + bias)
            if case.per == "sequence":
                labels = (labels, tf.constant([n]), tf.constant([len(row["x"])]))
            value = tf.reduce_sum(loss(labels, y_pred))
        total = [a + b.numpy() for a, b in zip(total, tape.gradient(value, [kernel, bias]))]
    return [gradient / count for gradient in total]
