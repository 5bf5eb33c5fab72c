"""CTC: the loss of a sequence over all its alignments, with checks of its labels before the loss runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors, precision
from distpad.backends import keras_masks
from distpad.backends.variables import replica_variable
from distpad.collectives import shapes
from distpad.collectives.checked import Check

_NAME = "CTC"
_ZERO = -1e30  # the logarithm of 0; -inf - -inf would be NaN


@tf.keras.utils.register_keras_serializable("distpad")
class CTC:
    r"""Compute the connectionist temporal classification loss of each sequence, for DistributedLoss.

    .. math:: -\log p(label \mid logits) = -\log \sum_{alignments} \prod_{frames} p(class \mid logits)

    A label of n classes, k of which repeat the class before, needs n + k frames. For a row with fewer frames,
    ``tf.nn.ctc_loss`` gives 700 (dense labels) or fails on one replica while the others wait (sparse labels). Here all
    replicas raise together, or leave the row out. All replicas also raise for classes that the logits do not have, for
    the blank among the labels, and for lengths out of range. With ``denominator``, a step has no all-gather: only the
    worker with the wrong label raises.

    Args:
      blank_index: the class of the blank, an integer; -1 is the last class.
      too_long: "error": a label that needs more frames than its row has is an error on all replicas, which shows the
        replica, the row and both numbers. "leave_out": the row counts neither in the numerator nor in the count, and
        ``left_out`` counts it. The count then depends on the model's output, so that ``Counts`` are an argument error.
      frames_per_step: in Keras's ``fit``, the frames of the input for one frame of the logits: the product of the
        model's strides. A row then has ``ceil(length / frames_per_step)`` frames. None: the frames that Keras's mask
        tells, or else all frames of the logits.
      inputs: in ``fit``, the feature whose lengths are meant; None: the only padded feature of the model's inputs.

    Raises:
      ValueError: an unknown ``too_long``; ``blank_index`` below -1; ``frames_per_step`` below 1.
      TypeError: ``blank_index`` or ``frames_per_step`` is no integer.

    >>> import distpad
    >>> ctc = CTC(blank_index=0, too_long="leave_out")
    >>> loss_fn = distpad.DistributedLoss(ctc, per="sequence", average="sequence_sum")
    >>> labels, lengths, frames = tf.constant([[1, 1], [2, 0]]), tf.constant([2, 1]), tf.constant([2, 2])
    >>> loss = loss_fn((labels, lengths, frames), tf.zeros([2, 2, 3]), lengths=lengths)  # 1, 1 needs 3 frames
    >>> round(float(tf.exp(-loss)), 3), ctc.left_out()  # three of the nine paths: 2 2, 0 2, 2 0
    (0.333, 1)

    Source: A. Graves et al., Connectionist temporal classification, 2006. XLA compiles the operations.
    """

    def __init__(
        self, *, blank_index: int, too_long: str = "error", frames_per_step: int | None = None, inputs: Any = None
    ) -> None:
        errors.choice(_NAME, "too_long", too_long, ("error", "leave_out"))
        self.blank_index = errors.integer(_NAME, "blank_index", blank_index, least=-1)
        self.too_long = too_long
        self.frames_per_step = (
            None if frames_per_step is None else errors.integer(_NAME, "frames_per_step", frames_per_step, least=1)
        )
        self.inputs = inputs
        self.drops_invalid = too_long == "leave_out"
        self._left_out: tf.Variable | None = None

    @tf.autograph.experimental.do_not_convert
    def __call__(self, y_true: Any, y_pred: tf.Tensor) -> tf.Tensor:
        """Compute the loss of each sequence.

        Args:
          y_true: integers ``(labels [batch, length], label lengths [batch], frames [batch])``. A row has ``frames``
            valid frames in the logits. Positions after a row's label length or frames are ignored.
          y_pred: floating logits ``[batch, frames, classes]``.

        Returns: ``[batch]``, float32, or float64 for float64 logits. A row that fails a check gives NaN. A row that is
          left out gives the loss of an empty label.

        Raises: TypeError, ValueError: a part of another kind, rank, dtype or static number of rows.
        """
        batch = _batch(y_true, y_pred, self.blank_index)
        passed = _passed(batch.failed)
        seen = tf.sequence_mask(batch.frames, tf.shape(batch.logits)[1])
        # Rows that fail are computed as empty labels, so that they raise in the checked all-gather alone.
        lengths = tf.where(passed, batch.lengths, 0)
        labels = tf.where(tf.sequence_mask(lengths, tf.shape(batch.labels)[1]), batch.labels, 0)
        log_odds = tf.nn.log_softmax(tf.where(seen[..., tf.newaxis], batch.logits, 0))
        losses = _negative_log_likelihood(log_odds, *(_int32(x) for x in (labels, lengths, batch.frames, batch.blank)))
        return tf.where(_passed(batch.failed[:-1]) if self.drops_invalid else passed, losses, np.nan)

    def labels_in_fit(self, y_true: Any, y_pred: Any, weights: Any) -> tuple[Any, Any, tf.Tensor]:
        """Return ``(labels, label lengths, frames)`` of a batch of ``for_keras``, for DistributedLoss.

        Args:
          weights: the sample weights of ``for_keras``, which carry the lengths.
        """
        frames = frames_in_fit(self, _NAME, y_pred, weights, self.frames_per_step, self.inputs)
        return y_true, weights.lengths_of(weights.tokens), frames

    @tf.autograph.experimental.do_not_convert
    def filter_invalid(self, y_true: Any, y_pred: Any, rows: tf.Tensor | None) -> tuple[tf.Tensor | None, list[Check]]:
        """Return the rows that the loss can compute, and the checks of this batch, for DistributedLoss.

        Args:
          y_true, y_pred: as in a call.
          rows: bool ``[batch]``, the rows that count; None: all rows.

        Returns: bool ``[batch]``, None for all rows; and the checks, each with the first row that fails it.
        """
        batch = _batch(y_true, y_pred, self.blank_index)
        checks = list(batch.checks)
        failed = batch.failed
        if rows is not None:
            rows, is_broadcastable = shapes.broadcast(shapes.Source("mask", rows), shapes.sizes_of(batch.logits, 1))
            rows = tf.logical_and(rows, is_broadcastable)
            failed = [each._replace(rows=tf.logical_and(each.rows, rows)) for each in failed]
        kept = None
        if self.drops_invalid:
            short = failed[-1]
            kept = tf.logical_not(short.rows)
            self._count(tf.math.count_nonzero(short.rows))
            failed = [*failed[:-1], short._replace(rows=tf.zeros_like(short.rows))]
        checks += [(tf.logical_not(tf.reduce_any(each.rows)), _first(each)) for each in failed]
        return kept, [Check(text, found, ok) for text, (ok, found) in zip(_TEXTS, checks)]

    def _count(self, number: tf.Tensor) -> None:
        if self._left_out is None:
            self._left_out = replica_variable([], tf.int64)
        self._left_out.assign_add(number)

    @tf.autograph.experimental.do_not_convert
    def left_out(self, *, backend: Any = None) -> int:
        """Return the number of sequences that all replicas left out since this object was made.

        Args:
          backend: see ``distpad.backends.resolve``; None: detected.

        Returns: an integer, equal on all workers.

        Collective among workers: all workers call this outside the step, the same number of times.
        """
        resolved = backends.resolve(backend, function=f"{_NAME}.left_out")
        mine = [] if self._left_out is None else resolved.local_results(self._left_out)
        return int(resolved.host_sum(np.array(sum(map(int, mine)), np.int64)))

    def get_config(self) -> dict[str, Any]:
        """As in Keras."""
        names = ("blank_index", "too_long", "frames_per_step", "inputs")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CTC:
        return cls(**config)


def frames_in_fit(
    owner: Any, function: str, y_pred: Any, weights: Any, frames_per_step: int | None, inputs: Any
) -> tf.Tensor:
    """Return the frames of each row of the logits, ``[batch]``.

    Args:
      owner: warns once where a layer dropped the Keras mask that would tell the frames.
      weights: the sample weights of ``for_keras``, which carry the lengths; other weights tell none.
      frames_per_step, inputs: see ``CTC``.

    Raises: ValueError: no lengths, or those of several features.
    """
    lengths = getattr(weights, "lengths", {})
    name = str(inputs) if inputs is not None else getattr(weights, "inputs", "")
    mask = keras_masks.of(y_pred) if frames_per_step is None else None
    pre = getattr(weights, "pre", ())
    if pre and (name in pre or not name) and (mask is not None or frames_per_step is not None):
        rule = "side='post': the first frames of a row are those of its input"
        raise ValueError(errors.sentence(function, "the padding of the inputs", f"Pad(side='pre') of {pre}", rule))
    if frames_per_step is None:
        if mask is not None:
            return tf.math.count_nonzero(mask, axis=1, dtype=tf.int32)
        effect = f"{function}: all frames of the logits count, those of padding too."
        keras_masks.warn_unmasked(owner, y_pred, effect, "Write frames_per_step=, the product of the model's strides.")
        return tf.fill([tf.shape(y_pred)[0]], tf.shape(y_pred)[1])
    if name not in lengths:
        remedy = f"Write inputs=, one of {sorted(lengths)}." if lengths else "Give the weights of for_keras."
        found = f"{frames_per_step} without the lengths of {'the inputs' if inputs is None else errors.shown(inputs)}"
        raise ValueError(errors.sentence(function, "frames_per_step", found, "those of one padded feature", remedy))
    return -(-lengths[name] // frames_per_step)


# -- the checks -------------------------------------------------------------------------------------------------------

_ROW = "(found: the first such row, {}; -1: none)"
_TEXTS = (
    "y_true and y_pred have different numbers of rows, expected the same (found: the rows of labels, label lengths, "
    "frames and logits)",
    "blank_index is no class of the logits, expected -1 to their last class (found: blank_index, and the number of "
    "classes)",
    "a label length is out of range, expected 0 to the width of the labels "
    + _ROW.format("its label length, and that width"),
    "frames are out of range, expected 0 to the frames of the logits "
    + _ROW.format("its frames, and those of the logits"),
    "a label holds a class that the logits do not have, expected at least 0 and less than their number of classes "
    + _ROW.format("the class, and the number of classes"),
    "a label holds the blank, which stands for no label, expected other classes only "
    + _ROW.format("the position in the label, and the blank"),
    "a label needs more frames than the logits have, expected at most those "
    + _ROW.format("the frames that its label needs, and those that it has")
    + ". CTC(too_long='leave_out') leaves such rows out",
)


class _Failed(NamedTuple):
    """The rows that fail one check, bool ``[batch]``, and the two numbers of each row as evidence, ``[batch]``."""

    rows: tf.Tensor
    found: tf.Tensor
    allowed: tf.Tensor


class _Batch(NamedTuple):
    """A batch with lengths and frames clipped to their range, and its checks; integers are int64."""

    labels: tf.Tensor
    lengths: tf.Tensor
    frames: tf.Tensor
    logits: tf.Tensor
    blank: tf.Tensor
    checks: list[tuple[Any, tuple]]  # of the whole batch: whether it holds, and the evidence
    failed: list[_Failed]


def _batch(y_true: Any, y_pred: Any, blank_index: int) -> _Batch:
    """Broadcast all parts to the rows of the logits, and compute every check."""
    labels, lengths, frames, logits = _parts(y_true, y_pred)
    rows = tuple(tf.shape(part)[0] for part in (labels, lengths, frames, logits))
    parts, same = [], [True]
    for name, part in (("labels", labels), ("label lengths", lengths), ("frames", frames)):
        sizes = shapes.sizes_with_rows(logits, part)
        try:
            part, is_broadcastable = shapes.broadcast(shapes.Source(name, part), sizes)
        except ValueError as error:
            raise ValueError(f"{_NAME}: {error}, the number of rows of the logits.") from error
        parts.append(part)
        same.append(is_broadcastable)
    labels, lengths, frames = parts
    count, time, classes = tf.unstack(tf.shape(logits, tf.int64))
    width = tf.shape(labels, tf.int64)[1]
    blank = tf.constant(blank_index, tf.int64) if blank_index >= 0 else classes - 1
    each = lambda number: tf.fill([count], number)
    long = tf.logical_or(lengths < 0, lengths > width)
    far = tf.logical_or(frames < 0, frames > time)
    failed = [_Failed(long, lengths, each(width)), _Failed(far, frames, each(time))]
    lengths, frames = tf.clip_by_value(lengths, 0, width), tf.clip_by_value(frames, 0, time)
    real = tf.sequence_mask(lengths, width)
    unknown, position = _first_of_rows(tf.logical_and(real, tf.logical_or(labels < 0, labels >= classes)))
    found = tf.gather(tf.pad(labels, [[0, 0], [0, 1]]), position, batch_dims=1)
    failed.append(_Failed(unknown, found, each(classes)))
    blanks, position = _first_of_rows(tf.logical_and(real, labels == blank))
    failed.append(_Failed(blanks, position, each(blank)))
    repeats = tf.logical_and(labels[:, 1:] == labels[:, :-1], real[:, 1:])
    needed = lengths + tf.math.count_nonzero(repeats, axis=1)
    failed.append(_Failed(tf.logical_and(needed > frames, _passed(failed)), needed, frames))
    checks = [(tf.reduce_all(tf.stack(same)), rows), (blank < classes, (blank_index, classes))]
    return _Batch(labels, lengths, frames, logits, tf.minimum(blank, classes - 1), checks, failed)


def _parts(y_true: Any, y_pred: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return labels, label lengths and frames as int64, and the logits as float32 or float64."""
    if not isinstance(y_true, (tuple, list)) or len(y_true) != 3:
        raise TypeError(errors.sentence(_NAME, "y_true", type(y_true).__name__, "(labels, label lengths, frames)"))
    parts = []
    for name, part, rank in zip(("labels", "label lengths", "frames", "logits"), (*y_true, y_pred), (2, 1, 1, 3)):
        if isinstance(part, (tf.RaggedTensor, tf.SparseTensor)):
            kind, remedy = f"a {type(part).__name__}", "Use distpad.pad."
            raise TypeError(errors.sentence(_NAME, name, kind, "a padded tensor", remedy))
        part = precision.to_tensor(part, f"{_NAME}: {name}")
        kind = "floats" if rank == 3 else "integers"
        if part.shape.rank != rank or not (part.dtype.is_floating if rank == 3 else part.dtype.is_integer):
            found = f"of shape {part.shape} and dtype {part.dtype.name}"
            raise ValueError(errors.sentence(_NAME, name, found, f"{kind} of rank {rank}"))
        parts.append(tf.cast(part, tf.int64 if rank < 3 else part.dtype))
    return *parts[:3], parts[3] if parts[3].dtype == tf.float64 else tf.cast(parts[3], tf.float32)


def _first_of_rows(bad: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return which rows of bool ``[batch, length]`` have a True position, and its first index, or the length."""
    width = tf.shape(bad, tf.int64)[1]
    positions = tf.where(bad, tf.range(width), width)
    return tf.reduce_any(bad, axis=1), tf.minimum(tf.reduce_min(positions, axis=1), width)


def _passed(failed: list[_Failed]) -> tf.Tensor:
    """Return the rows that fail none of these checks, bool ``[batch]``."""
    return tf.logical_not(tf.reduce_any(tf.stack([each.rows for each in failed]), axis=0))


def _first(check: _Failed) -> tuple[tf.Tensor, ...]:
    """Return the first row that fails a check, with its two numbers; -1 if no row fails."""
    count = tf.shape(check.rows, tf.int64)[0]
    row = tf.reduce_min(tf.concat([tf.where(check.rows, tf.range(count), count), [count]], 0))
    columns = (tf.range(count), check.found, check.allowed)
    return tuple(tf.concat([column, [-1]], 0)[row] for column in columns)


# -- the recursion ----------------------------------------------------------------------------------------------------


def _int32(tensor: tf.Tensor) -> tf.Tensor:
    return tf.cast(tensor, tf.int32)


def _negative_log_likelihood(
    log_odds: tf.Tensor, labels: tf.Tensor, lengths: tf.Tensor, frames: tf.Tensor, blank: tf.Tensor
) -> tf.Tensor:
    """Return ``-log p(label)`` of each row, ``[batch]``, from log probabilities ``[batch, frames, classes]``.

    A label of n classes has 2n + 1 states: blank, class, blank, class ... blank. The forward variable of a state is the
    log probability of all paths to the state, the backward variable that of all paths from the state. The backward
    variable equals the forward variable of the reversed sequence. So one loop over the frames computes both, with a
    batch of twice the size. XLA compiles the loop. XLA does not compile tf.nn.ctc_loss for sparse labels; for dense
    labels its transition matrix of states by states takes 4 to 30 times as long.
    """
    count, time, classes = tf.unstack(tf.shape(log_odds))
    last = 2 * lengths  # the last state of each row
    states = tf.stack([tf.fill(tf.shape(labels), blank), labels], axis=2)
    width = 2 * tf.shape(labels)[1]
    states = tf.pad(tf.reshape(states, [count, width]), [[0, 0], [0, 1]])
    order = tf.range(width + 1)
    states = tf.where(order < last[:, tf.newaxis], states, blank)  # [batch, states]
    turned = tf.maximum(last[:, tf.newaxis] - order, 0)  # the index of each state in the reversed sequence
    turned_frames = tf.maximum(frames[:, tf.newaxis] - 1 - tf.range(time), 0)

    @tf.custom_gradient
    def likelihood(log_odds: tf.Tensor) -> Any:
        both = tf.concat([log_odds, tf.gather(log_odds, turned_frames, batch_dims=1)], axis=0)
        both_states = tf.concat([states, tf.gather(states, turned, batch_dims=1)], axis=0)
        zero = tf.cast(_ZERO, both.dtype)
        emitted = tf.gather(tf.transpose(both, [0, 2, 1]), both_states, batch_dims=1)  # [2 batch, states, frames]
        emitted = tf.transpose(tf.where(emitted < _ZERO, zero, emitted), [2, 0, 1])
        paths = _paths(emitted, both_states, blank)  # [frames + 1, 2 batch, states]
        ends = tf.gather_nd(paths, tf.stack([frames, tf.range(count)], axis=1))  # [batch, states]
        finals = [tf.gather(ends, tf.maximum(last - back, 0), batch_dims=1) for back in (0, 1)]
        finals[1] = tf.where(last > 0, finals[1], _ZERO)
        log_likelihood = tf.reduce_logsumexp(tf.stack(finals), axis=0)

        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            forward, backward = (tf.transpose(part, [1, 0, 2]) for part in tf.split(paths[1:], 2, axis=1))
            backward = tf.gather(backward, turned_frames, batch_dims=1)
            backward = tf.gather(backward, turned, axis=2, batch_dims=1)
            through = forward + backward - tf.transpose(emitted[:, :count], [1, 0, 2])
            inside = (order <= last[:, tf.newaxis])[:, tf.newaxis]
            odds = tf.nn.softmax(tf.where(inside, through, _ZERO))  # of each state at each frame
            counts = tf.logical_and(tf.sequence_mask(frames, time), (log_likelihood > _ZERO / 2)[:, tf.newaxis])
            odds = tf.where(counts[..., tf.newaxis], odds, 0) * -upstream[:, tf.newaxis, tf.newaxis]
            segments = states + classes * tf.range(count)[:, tf.newaxis]
            of_classes = tf.math.unsorted_segment_sum(tf.transpose(odds, [0, 2, 1]), segments, count * classes)
            return tf.transpose(tf.reshape(of_classes, [count, classes, time]), [0, 2, 1])

        impossible = log_likelihood < _ZERO / 2  # only with a logit of -inf, since each label here has enough frames
        return -tf.where(impossible, tf.cast(-np.inf, log_likelihood.dtype), log_likelihood), gradient

    return likelihood(log_odds)


def _paths(emitted: tf.Tensor, states: tf.Tensor, blank: tf.Tensor) -> tf.Tensor:
    """Return the forward variables before the first frame and after each frame, ``[frames + 1, batch, states]``."""
    skips = tf.logical_and(states != blank, states != tf.pad(states, [[0, 0], [2, 0]])[:, :-2])
    closed = tf.where(skips, tf.zeros([], emitted.dtype), _ZERO)
    begin = tf.where(tf.range(tf.shape(states)[1]) > 0, tf.fill(tf.shape(closed), tf.cast(_ZERO, closed.dtype)), 0)
    time = tf.shape(emitted)[0]
    shape = [None, None]
    read = tf.TensorArray(emitted.dtype, time, element_shape=shape).unstack(emitted)
    written = tf.TensorArray(emitted.dtype, time + 1, element_shape=shape).write(0, begin)

    def step(frame: tf.Tensor, before: tf.Tensor, written: tf.TensorArray) -> tuple:
        shifted = tf.pad(before, [[0, 0], [2, 0]], constant_values=_ZERO)
        next_to, skipped = shifted[:, 1:-1], shifted[:, :-2] + closed
        largest = tf.maximum(tf.maximum(before, next_to), skipped)
        odds = tf.exp(before - largest) + tf.exp(next_to - largest) + tf.exp(skipped - largest)
        after = largest + tf.math.log(odds) + read.read(frame)
        return frame + 1, after, written.write(frame + 1, after)

    *_, written = tf.while_loop(lambda frame, *_: frame < time, step, (0, begin, written), maximum_iterations=time)
    return written.stack()
