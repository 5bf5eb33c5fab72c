"""One training step with distpad. The code is the same for every engine."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

import distpad
from handwriting import model
from handwriting.engines import Engine

keras = tf.keras


def ctc(y_true: dict[str, tf.Tensor], y_pred: tf.Tensor) -> tf.Tensor:
    """Compute the CTC loss of each sequence.

    Args:
        y_true: "label" ``[batch, length]``, "length" ``[batch]``, "columns" ``[batch]``, the number of valid columns.
        y_pred: logits ``[batch, columns, classes]``, the last class being the blank.

    Returns:
        ``[batch]``, the negative log-likelihood of each text.
    """
    label = y_true["label"]
    # On a CPU, sparse labels use the compiled kernel; dense labels use a loop of many small operations.
    # The kernel rejects the empty labels of filler rows. So each filler row gets a character; its loss is masked.
    places = tf.where(tf.sequence_mask(tf.maximum(y_true["length"], 1), tf.shape(label)[1]))
    sparse = tf.SparseTensor(places, tf.gather_nd(label, places), tf.shape(label, out_type=tf.int64))
    return tf.nn.ctc_loss(sparse, y_pred, None, y_true["columns"], logits_time_major=False, blank_index=-1)


class Learner:
    """A reader, its optimiser, and the step that trains it on all replicas of an engine.

    Args:
        engine: the engine that runs the step.
        config: config of the reader.
        optimizer: function that creates the optimiser; called in the engine's scope.
        average: average of the loss over all replicas, as in ``distpad.DistributedLoss``. With batches of similar
            lengths, "token" weighs characters of short texts more than characters of long texts. "sequence_sum" or a
            number weighs all characters alike.
        naive: for comparison: each replica takes the mean over its own characters; the engine averages these means.
    """

    def __init__(
        self,
        engine: Engine,
        config: model.Config,
        optimizer: Any,
        *,
        average: str | float = "token",
        naive: bool = False,
    ):
        self.engine = engine
        self.config = config
        self.naive = naive
        with engine.scope():
            self.model = model.build(config)
            self.optimizer = optimizer()
            self.optimizer.build(self.model.trainable_variables)
        if config.head == "ctc":
            self.loss = distpad.DistributedLoss(ctc, per="sequence", average=average, backend=engine.backend)
        else:
            entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            self.loss = distpad.DistributedLoss(entropy, average=average, backend=engine.backend)
        self.step = engine.compile(self._step)

    def broadcast(self) -> None:
        """Copy the weights of worker 0 to all workers. Collective."""
        distpad.broadcast_variables(self.model.variables, backend=self.engine.backend)
        distpad.broadcast_variables(self.optimizer.variables, backend=self.engine.backend)

    def global_loss(self, loss: Any) -> float:
        """Return the global loss of a step, for the log. Collective."""
        return float(distpad.global_value(loss, backend=self.engine.backend))

    def _step(self, batch: distpad.Batch) -> tf.Tensor:
        """Train one step on a replica's rows."""
        with tf.GradientTape() as tape:
            loss = self._loss(batch)
        variables = self.model.trainable_variables
        gradients = distpad.gradient(tape, loss, variables, backend=self.engine.backend)
        self.optimizer.apply_gradients(zip(gradients, variables))
        return loss

    def _loss(self, batch: distpad.Batch) -> tf.Tensor:
        width, label, length = batch.lengths["image"], batch.data["label"], batch.lengths["label"]
        inputs = {"image": batch.data["image"], "width": width, "positions": tf.shape(label)[1]}
        logits = self.model({**inputs, "counts": batch.indices >= 0}, training=True)
        if self.config.head == "ctc":
            label = {"label": label, "length": length, "columns": model.columns(width)}
        if not self.naive:
            # the pipeline counts the characters of all replicas, so the step reduces nothing but gradients
            return self.loss(label, logits, batch=batch)
        own = tf.reduce_sum(length) if self.loss.average == "token" else tf.math.count_nonzero(length)
        return self.loss(label, logits, lengths=length, denominator=own) / self.engine.replicas
