"""One training step, the same code for every engine: this is what using distpad looks like."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

import distpad
from handwriting import engines, model, rows
from handwriting.engines import Engine, Rows

keras = tf.keras


def ctc(y_true: dict[str, tf.Tensor], y_pred: tf.Tensor) -> tf.Tensor:
    """CTC, one value a sequence.

    Args:
        y_true: "label" ``[batch, length]``, "length" ``[batch]``, "columns" ``[batch]``, the logits that are real.
        y_pred: logits ``[batch, columns, classes]``, the last class being the blank.

    Returns:
        ``[batch]``, the negative log-likelihood of each text.
    """
    label = y_true["label"]
    # On a CPU, sparse labels take the compiled kernel; dense ones would take a loop of many small operations.
    places = tf.where(tf.sequence_mask(y_true["length"], tf.shape(label)[1]))
    sparse = tf.SparseTensor(places, tf.gather_nd(label, places), tf.shape(label, out_type=tf.int64))
    return tf.nn.ctc_loss(sparse, y_pred, None, y_true["columns"], logits_time_major=False, blank_index=-1)


class Learner:
    """A reader, its optimiser, and the step that trains it on all replicas of an engine.

    Args:
        engine: who trains together.
        config: of the reader.
        optimizer: makes the optimiser; called in the engine's scope.
        mean: "global", the mean over all replicas' characters, which is distpad's; or "naive", for comparison: each
            replica takes the mean over its own characters, and the engine averages these means.
    """

    def __init__(self, engine: Engine, config: model.Config, optimizer: Any, mean: str = "global"):
        self.engine = engine
        self.config = config
        self.mean = mean
        with engine.scope():
            self.model = model.build(config)
            self.optimizer = optimizer()
            self.optimizer.build(self.model.trainable_variables)
        backend = engine.backend if mean == "global" else "local"
        if config.head == "ctc":
            self.loss = distpad.DistributedLoss(ctc, per="sequence", average="token", backend=backend)
        else:
            entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
            self.loss = distpad.DistributedLoss(entropy, average="token", backend=backend)
        self.step = engine.compile(self._step, *(_blank_rows(config, size) for size in (1, 2)))

    def broadcast(self) -> None:
        """Start with worker 0's weights everywhere."""
        distpad.broadcast_variables(self.model.variables, backend=self.engine.backend)
        distpad.broadcast_variables(self.optimizer.variables, backend=self.engine.backend)

    def global_loss(self, loss: Any) -> float:
        """What a step returned, as the mean over all replicas, for the log. Collective."""
        return float(distpad.global_value(loss, backend=self.engine.backend))

    def _step(self, batch: Rows) -> tf.Tensor:
        """Train one step on a replica's rows (see ``rows.pad``)."""
        padded = distpad.pad_to_global_max(
            {"image": batch["image"], "label": batch["label"]},
            axis=1,
            lengths={"image": batch["width"], "label": batch["length"]},
            backend=self.engine.backend,
        )
        with tf.GradientTape() as tape:
            loss = self._loss(padded)
        variables = self.model.trainable_variables
        gradients = distpad.gradient(tape, loss, variables, backend=self.engine.backend)
        self.optimizer.apply_gradients(zip(gradients, variables))
        return loss

    def _loss(self, padded: distpad.Padded) -> tf.Tensor:
        image, width = padded.values["image"], padded.lengths["image"]
        label, length = padded.values["label"], padded.lengths["label"]
        logits = self.model({"image": image, "width": width, "positions": tf.shape(label)[1]})
        if self.config.head == "ctc":
            label = {"label": label, "length": length, "columns": model.columns(width)}
        loss = self.loss(label, logits, lengths=length)
        if self.mean == "naive" and self.engine.strategy is not None:
            loss /= self.engine.replicas  # strategies sum the replicas' gradients; Horovod takes their mean by itself
        return loss


def batches(engine: Engine, source: rows.Source, config: model.Config, batch_size: int, steps: range) -> Iterator[Rows]:
    """What each step feeds to ``Learner.step``; the next step's rows are made while this one runs."""

    def make(step: int) -> dict[int, Rows]:
        return engines.rows_here(
            engine,
            lambda replica: rows.pad(
                rows.of_step(source, step, batch_size, replica, engine.replicas),
                config.alphabet,
                end=config.head == "position",
            ),
        )

    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(make, steps.start) if steps else None
        for step in steps:
            ready = following.result()
            following = ahead.submit(make, step + 1) if step + 1 < steps.stop else None
            yield engine.feed(ready)


def _blank_rows(config: model.Config, size: int) -> Rows:
    return {
        "image": tf.zeros([size, 4 * size, config.height, 1]).numpy(),
        "width": tf.ones([size], tf.int32).numpy(),
        "label": tf.zeros([size, size], tf.int32).numpy(),
        "length": tf.ones([size], tf.int32).numpy(),
    }
