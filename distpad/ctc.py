"""CTC: the loss of a whole sequence over its alignments, with labels that cannot be aligned found before it runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from distpad import backends, errors
from distpad.exchange import Rule
from distpad.replicated import replica_variable

_NAME = "CTC"


@tf.keras.utils.register_keras_serializable("distpad")
class CTC:
    """Connectionist temporal classification, ``-log p(label | logits)`` over all alignments, one value a sequence.

    A label of n classes, k of them like the one before, needs n + k frames. Where a sequence has fewer,
    ``tf.nn.ctc_loss`` gives 700 for dense labels; for sparse ones it fails, on the one replica that has such a label,
    for which the others then wait. Here all replicas raise alike, or leave the sequence out.
    (Under ``denominator`` a step has no exchange in which they could agree: there the worker that has it raises alone.)

    Args:
      blank_index: the class that stands for no label; -1 is the last.
      too_long: what becomes of a label that cannot be aligned. "error": all replicas raise, with the replica, the row,
        and both lengths. "leave_out": it is left out of numerator and count, and ``left_out`` tells how many were. What
        the loss is divided by then follows from the model's output, so that ``Counts`` are refused.

    Raises: ValueError: an unknown ``too_long``. TypeError: ``blank_index`` is no whole number.

    >>> import distpad
    >>> ctc = CTC(blank_index=0, too_long="leave_out")
    >>> loss_fn = distpad.DistributedLoss(ctc, per="sequence", average="sequence_sum", backend="local")
    >>> labels, lengths, frames = tf.constant([[1, 1], [2, 0]]), tf.constant([2, 1]), tf.constant([2, 2])
    >>> loss = loss_fn((labels, lengths, frames), tf.zeros([2, 2, 3]), lengths=lengths)  # 1, 1 needs a blank between
    >>> round(float(tf.exp(-loss)), 3), ctc.left_out(backend="local")  # three of the nine paths: 2 2, 0 2, 2 0
    (0.333, 1)

    Source: A. Graves et al., Connectionist temporal classification, 2006; computed by ``tf.nn.ctc_loss``.
    """

    rule = Rule(
        "a label needs more frames than the logits have, expected at most those (found: the first such row, the frames "
        "that its label needs, and those that are there; -1: none). CTC(too_long='leave_out') leaves such rows out",
        (-1, -1, -1),
        True,
    )

    def __init__(self, *, blank_index: int, too_long: str = "error") -> None:
        errors.choice(_NAME, "too_long", too_long, ("error", "leave_out"))
        self.blank_index = errors.whole_number(_NAME, "blank_index", blank_index, least=-1)
        self.too_long = too_long
        self.leaves_out = too_long == "leave_out"
        self._left_out: tf.Variable | None = None

    def __call__(self, y_true: Any, y_pred: tf.Tensor) -> tf.Tensor:
        """The loss of each sequence, ``[batch]`` float32; of one that cannot be aligned, that of an empty text.

        Args:
          y_true: ``(labels [batch, length], label lengths [batch], frames [batch])``, whole numbers; frames are the
            real ones of each row of the logits. What stands behind a row's labels or frames is not looked at.
          y_pred: logits ``[batch, frames, classes]``.
        """
        labels, lengths, frames = _parts(y_true)
        seen = tf.sequence_mask(frames, tf.shape(y_pred)[1])
        y_pred = tf.where(seen[..., tf.newaxis], tf.cast(y_pred, tf.float32), 0.0)
        texts = tf.logical_and(lengths > 0, _needed(labels, lengths) <= frames)
        # Sparse labels take TensorFlow's compiled kernel on a CPU. It refuses empty texts: they get a letter meanwhile.
        letter = 0 if self.blank_index else 1
        labels = tf.where(texts[:, tf.newaxis], tf.pad(labels, [[0, 0], [0, 1]]), letter)
        places = tf.where(tf.sequence_mask(tf.where(texts, lengths, 1), tf.shape(labels)[1]))
        sparse = tf.SparseTensor(places, tf.gather_nd(labels, places), tf.shape(labels, out_type=tf.int64))
        shown = tf.where(texts, frames, tf.shape(y_pred)[1])
        of_texts = tf.nn.ctc_loss(sparse, y_pred, None, shown, logits_time_major=False, blank_index=self.blank_index)
        blanks = tf.where(seen, tf.nn.log_softmax(y_pred)[..., self.blank_index], 0.0)
        return tf.where(texts, of_texts, -tf.reduce_sum(blanks, axis=1))

    def screen(self, y_true: Any, rows: tf.Tensor | None, *, counting: bool) -> tuple[tf.Tensor | None, Rule]:
        """Which rows can be computed, and what all replicas are held to; ``DistributedLoss`` asks before it averages.

        Args:
          y_true: as above.
          rows: bool ``[batch]``, those that count; None: all.
          counting: whether those that are left out are added to ``left_out``.

        Returns: bool ``[batch]``, None for all; and the rule, with the first row that breaks it.
        """
        labels, lengths, frames = _parts(y_true)
        needed = _needed(labels, lengths)
        short = needed > frames
        if rows is not None:
            short = tf.logical_and(short, rows)
        if self.leaves_out:
            if counting:
                self._count(tf.math.count_nonzero(short))
            return tf.logical_not(short), self.rule
        columns = tf.stack([tf.range(tf.size(needed)), needed, frames], axis=1)
        first = tf.concat([tf.boolean_mask(columns, short), [self.rule.found]], axis=0)[0]
        return None, self.rule._replace(found=tuple(tf.unstack(first)), ok=tf.logical_not(tf.reduce_any(short)))

    def _count(self, number: tf.Tensor) -> None:
        if self._left_out is None:
            self._left_out = replica_variable([], tf.int64)
        self._left_out.assign_add(number)

    @tf.autograph.experimental.do_not_convert
    def left_out(self, *, backend: Any = None) -> int:
        """How many sequences all replicas have left out since this was made; the same on all workers.

        Collective among workers; called outside the step.
        """
        resolved = backends.resolve(backend, function=f"{_NAME}.left_out")
        mine = [] if self._left_out is None else resolved.local_results(self._left_out)
        return int(resolved.host_sum(np.array(sum(map(int, mine)), np.int64)))

    def get_config(self) -> dict[str, Any]:
        """As in Keras."""
        return {"blank_index": self.blank_index, "too_long": self.too_long}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CTC:
        return cls(**config)


def _parts(y_true: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Labels, their lengths, and the frames, all int32."""
    if not isinstance(y_true, (tuple, list)) or len(y_true) != 3:
        raise TypeError(errors.sentence(_NAME, "y_true", type(y_true).__name__, "(labels, label lengths, frames)"))
    labels, lengths, frames = (tf.convert_to_tensor(part) for part in y_true)
    for name, part, rank in (("labels", labels, 2), ("label lengths", lengths, 1), ("frames", frames, 1)):
        if part.shape.rank != rank or not part.dtype.is_integer:
            found = f"of shape {tuple(part.shape)} and dtype {part.dtype.name}"
            raise ValueError(errors.sentence(_NAME, name, found, f"whole numbers of rank {rank}"))
    return tf.cast(labels, tf.int32), tf.cast(lengths, tf.int32), tf.cast(frames, tf.int32)


def _needed(labels: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """The frames that each label takes at least: one a class, and a blank between two that are alike."""
    alike = tf.logical_and(labels[:, 1:] == labels[:, :-1], tf.sequence_mask(lengths - 1, tf.shape(labels)[1] - 1))
    return lengths + tf.math.count_nonzero(alike, axis=1, dtype=tf.int32)
