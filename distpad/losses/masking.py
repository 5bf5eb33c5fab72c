"""Which positions count: masks and weights from every source, and the cleaning of what stands where none count."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad.collectives import shapes
from distpad.collectives.checked import Check
from distpad.losses.gate import Gate

# What stands at padded places of the predictions while the loss looks at them: as a probability, a logit or a
# regression value it gives finite losses. The result does not depend on it; it keeps NaN checkers quiet.
_NEUTRAL = 0.5


class Valid(NamedTuple):
    """Which positions are valid, and how much each counts.

    Attributes:
      mask: bool, a prefix of the loss's shape; None: all are valid.
      weight: floating, a prefix of the loss's shape, in which an axis but the first may have size one; None: one each.
      rank: how many leading axes of the loss are positions; None: all of them.
      tokens: for losses with one value a sequence: the positions of each sequence, ``[batch]``; else None.
      is_broadcastable: whether the shapes of all sources go together, a tensor where only a run can tell.
    """

    mask: tf.Tensor | None
    weight: tf.Tensor | None
    rank: int | None
    tokens: tf.Tensor | None = None
    is_broadcastable: Any = True

    @property
    def effective_mask(self) -> tf.Tensor | None:
        """The mask of what the loss looks at: what weighs nothing is replaced like padding."""
        if self.weight is None:
            return self.mask
        return shapes.all_of(
            [shapes.Source("sample_weight", tf.not_equal(self.weight, 0), True), shapes.Source("mask", self.mask)]
        )[0]


def as_tensor(value: Any) -> Any:
    """A tensor from an array, a variable or lists of numbers. A nest of tensors, or a composite one, stays as it is."""
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        return value
    is_list = isinstance(value, list) and all(np.isscalar(leaf) for leaf in tf.nest.flatten(value))
    is_nest = isinstance(value, (dict, list, tuple)) and not is_list
    return value if is_nest else tf.convert_to_tensor(value)


def keras_mask(y_pred: Any) -> tf.Tensor | None:
    """The mask that Keras layers hand along with their output.

    Private: neither Keras 2 nor 3 has a public way to read it; tests/replicas/test_keras.py notices when it changes.
    """
    mask = getattr(y_pred, "_keras_mask", None)
    return mask if isinstance(mask, tf.Tensor) else None


@tf.autograph.experimental.do_not_convert
def of_positions(
    y_true: Any, y_pred: Any, *, mask: Any, lengths: Any, padding_value: Any, keras_mask: Any, sample_weight: Any
) -> tuple[Valid, list[Check]]:
    """The valid positions of a loss with one value a position: all sources combined with AND.

    Raises ValueError or TypeError for sources of wrong rank, dtype or static shape.
    """
    checks: list[Check] = []
    sources = []
    if lengths is not None:
        lengths = _rows_like(y_pred, "lengths", shapes.check_lengths(lengths))
        limit = _length_axis(y_true, y_pred)
        checks = shapes.length_checks(lengths, limit)
        sources.append(shapes.Source("lengths", tf.sequence_mask(lengths, limit)))
    if mask is not None:
        sources.append(shapes.Source("mask", _rows_like(y_pred, "mask", check_mask(mask))))
    if padding_value is not None:
        sources.append(shapes.Source("padding_value", _not_padding(y_true, y_pred, padding_value)))
    if keras_mask is not None:
        sources.append(shapes.Source("Keras's mask", tf.cast(keras_mask, tf.bool)))
    weight = None
    if sample_weight is not None:
        weight = _rows_like(y_pred, "sample_weight", check_weight(sample_weight))
    combined, is_broadcastable = shapes.all_of(sources)
    ranks = [tensor.shape.rank for tensor in (combined, weight) if tensor is not None]
    if combined is None and weight is not None and weight.shape.rank == 1:
        ranks = []  # [batch] says nothing of positions
    return Valid(combined, weight, max(ranks, default=None), is_broadcastable=is_broadcastable), checks


@tf.autograph.experimental.do_not_convert
def counted_check(
    y_true: Any, y_pred: Any, *, mask: Any, lengths: Any, padding_value: Any, keras_mask: Any, sample_weight: Any
) -> Check:
    """What was counted by lengths beforehand is all valid: no other source may leave more out."""
    text = (
        "denominator holds Counts, but Keras's mask or padding_value leaves out positions within lengths, which were "
        "counted. Give the number instead (found: how many)"
    )
    if lengths is None or (padding_value is None and keras_mask is None):
        return Check(text, 0, True)
    nothing = {"mask": None, "sample_weight": None, "padding_value": None, "keras_mask": None}
    counted, _ = of_positions(y_true, y_pred, **{**nothing, "lengths": lengths})
    rest = {"padding_value": padding_value, "keras_mask": keras_mask}
    valid, _ = of_positions(y_true, y_pred, **{**nothing, **rest, "lengths": lengths})
    if counted.mask is None or valid.mask is None or counted.mask.shape.rank != valid.mask.shape.rank:
        return Check(text, 0, True)
    left_out = tf.math.count_nonzero(counted.mask) - tf.math.count_nonzero(valid.mask)
    return Check(text, left_out, left_out == 0)


@tf.autograph.experimental.do_not_convert
def of_sequences(
    y_true: Any, y_pred: Any = None, *, mask: Any, lengths: Any, padding_value: Any, keras_mask: Any, sample_weight: Any
) -> tuple[Valid, tf.Tensor | None, list[Check]]:
    """The rows that count in a loss with one value a sequence, and the mask of their labels' positions, if known.

    The positions of each row come from ``lengths``, from the padding value, or from a mask with a length axis; a label
    tensor without any of them is all valid.
    """
    checks: list[Check] = []
    width = tf.shape(y_true)[1] if has_positions(y_true, y_pred) else None
    rows, positions = [], []
    tokens = None
    said = mask is not None and check_mask(mask).shape.rank == 1  # then the lengths do not say which rows count
    if lengths is not None:
        lengths = shapes.check_lengths(lengths)
        checks = shapes.length_checks(lengths, width)
        rows += [] if said else [shapes.Source("lengths", lengths > 0)]
        tokens = tf.cast(lengths, tf.float64)
        if width is not None:
            positions.append(shapes.Source("lengths", tf.sequence_mask(lengths, width)))
    if mask is not None:
        (rows if said else positions).append(shapes.Source("mask", check_mask(mask)))
    if padding_value is not None:
        positions.append(shapes.Source("padding_value", _not_padding(y_true, None, padding_value)))
    position_mask, positions_fit = shapes.all_of(positions)
    if position_mask is not None:
        tokens = tf.reduce_sum(tf.cast(position_mask, tf.float64), axis=list(range(1, position_mask.shape.rank)))
        rows += [] if said else [shapes.Source("positions", tokens > 0)]
    elif tokens is None and width is not None and mask is None:
        tokens = tf.fill([tf.shape(y_true)[0]], tf.cast(width, tf.float64))
    if keras_mask is not None:  # of a prediction's frames, which are not the label's positions
        keras_mask = tf.cast(keras_mask, tf.bool)
        frames = tf.reduce_any(keras_mask, axis=list(range(1, keras_mask.shape.rank)))
        rows.append(shapes.Source("Keras's mask", frames))
    weight = None
    if sample_weight is not None:
        weight = check_weight(sample_weight)
        if weight.shape.rank == 2 and weight.shape[1] == 1:
            weight = tf.squeeze(weight, 1)
        if weight.shape.rank != 1:
            raise ValueError(f"sample_weight has shape {tuple(weight.shape)}, expected [batch], one a sequence")
    row_mask, rows_fit = shapes.all_of(rows)
    valid = Valid(row_mask, weight, 1, tokens, tf.logical_and(positions_fit, rows_fit))
    counted = [shapes.Source("mask", valid.effective_mask), *positions]
    return valid, shapes.all_of(counted)[0], checks


def of_rows(valid: Valid, losses: tf.Tensor) -> Valid:
    """Weights ``[batch, 1]`` of a loss ``[batch]``, which are how Keras 2 hands on those of rows, as ``[batch]``."""
    weight = valid.weight
    if losses.shape.rank != 1 or valid.mask is not None or weight is None or weight.shape[1:] != [1]:
        return valid
    return valid._replace(weight=tf.squeeze(weight, 1), rank=None)


def has_positions(y_true: Any, y_pred: Any) -> bool:
    """Whether labels of a loss with one value a sequence have an axis of positions. Those of one class a sequence,
    ``[batch, classes]`` beside as many scores or ``[batch, 1]``, have none, however long the sequences are."""
    if not isinstance(y_true, tf.Tensor) or y_true.shape.rank < 2:
        return False
    of_rows = isinstance(y_pred, tf.Tensor) and y_true.shape.rank == 2 and y_pred.shape.rank in (1, 2)
    return not (of_rows and y_true.shape[1] is not None and y_true.shape[1] in (1, *y_pred.shape[1:]))


@tf.autograph.experimental.do_not_convert
def clean(tensor: Any, mask: tf.Tensor | None, *, prediction: bool, gate: Gate | None = None) -> Any:
    """Replace what stands at invalid places, so that neither the value nor the gradient can depend on it.

    Towards replaced places the gradient is exactly zero, whatever the loss gives; NaN where a check of the ``gate``
    fails. Tensors whose leading dimensions do not match the mask are returned unchanged, and so are nests of labels.
    """
    if mask is None:
        return tensor
    if not isinstance(tensor, tf.Tensor):
        return (
            tf.nest.map_structure(lambda leaf: clean(leaf, mask, prediction=True, gate=gate), tensor)
            if prediction
            else tensor
        )
    if tensor.dtype == tf.string or tensor.shape.rank is None or tensor.shape.rank < mask.shape.rank:
        return tensor
    sizes = shapes.sizes_of(tensor, mask.shape.rank)
    try:
        mask, is_broadcastable = shapes.broadcast(shapes.Source("mask", mask, True), sizes)
    except ValueError:
        return tensor
    if is_broadcastable is not True:
        mask = tf.logical_or(mask, tf.logical_not(is_broadcastable))
    filling = _NEUTRAL if prediction and tensor.dtype.is_floating else 0
    return (gate or Gate()).choose(shapes.widen(mask, tensor.shape.rank), tensor, filling)


def broadcast_check(rows: Any, is_broadcastable: Any) -> Check:
    """Sources and loss have shapes that go together; found is the loss's number of rows."""
    text = (
        "mask, lengths or sample_weight do not fit the loss, expected its leading axes in each (found: the loss's rows)"
    )
    return Check(text, rows, is_broadcastable)


def check_mask(mask: Any) -> tf.Tensor:
    if isinstance(mask, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(f"mask is a {type(mask).__name__}, expected a bool tensor")
    mask = tf.convert_to_tensor(mask, tf.bool if shapes.is_empty(mask) else None)
    if mask.dtype.is_floating:
        raise TypeError(f"mask has dtype {mask.dtype.name}, expected bool. Weights go to sample_weight")
    if not mask.shape.rank:
        raise ValueError(f"mask has rank {mask.shape.rank}, expected [batch, ...]")
    return tf.cast(mask, tf.bool)


def check_weight(sample_weight: Any) -> tf.Tensor:
    if isinstance(sample_weight, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(f"sample_weight is a {type(sample_weight).__name__}, expected a tensor of numbers")
    weight = tf.convert_to_tensor(sample_weight)
    if not weight.shape.rank:
        raise ValueError(f"sample_weight has rank {weight.shape.rank}, expected [batch, ...]")
    return weight if weight.dtype == tf.float64 else tf.cast(weight, tf.float32)


def _length_axis(y_true: Any, y_pred: Any) -> tf.Tensor:
    for tensor in (*tf.nest.flatten(y_pred), *tf.nest.flatten(y_true)):
        if isinstance(tensor, tf.Tensor) and tensor.shape.rank and tensor.shape.rank > 1:
            return tf.shape(tensor)[1]
    raise ValueError("lengths were given, but y_pred has no axis 1 that they could count along")


def _rows_like(y_pred: Any, name: str, tensor: tf.Tensor) -> tf.Tensor:
    """Refuse an argument with another number of rows than the predictions, by its own name."""
    if (
        isinstance(y_pred, tf.Tensor)
        and y_pred.shape.rank
        and not y_pred.shape[:1].is_compatible_with(tensor.shape[:1])
    ):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {y_pred.shape[0]} rows, as y_pred has")
    return tensor


def _not_padding(y_true: Any, y_pred: Any, padding_value: Any) -> tf.Tensor:
    """True where a label is not ``padding_value``. Labels that are vectors are padding where all components are."""
    if not isinstance(y_true, tf.Tensor) or y_true.shape.rank is None or y_true.shape.rank < 2:
        raise ValueError("padding_value was given, but y_true is no tensor [batch, length, ...] to compare with it")
    try:
        padding = tf.constant(padding_value, y_true.dtype)
        is_nan = y_true.dtype.is_floating and np.isnan(padding_value)  # which is not equal to itself
        real = tf.math.logical_not(tf.math.is_nan(y_true)) if is_nan else tf.not_equal(y_true, padding)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"padding_value is {padding_value!r}, expected a {y_true.dtype.name}, as y_true holds"
        ) from error
    rank = y_true.shape.rank
    # labels with as many axes as the predictions are vectors; with one less they are classes
    vectors = rank > 2 and (not isinstance(y_pred, tf.Tensor) or y_pred.shape.rank == rank)
    return tf.reduce_any(real, axis=-1) if vectors else real
