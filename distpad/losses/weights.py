"""Weights: which positions count, and how much; and values at the other positions, replaced."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import precision
from distpad.collectives import shapes
from distpad.collectives.checked import Check

# The prediction that a loss sees at invalid positions: as a probability, a logit or a regression value it gives a
# finite loss. The result does not depend on it; checkers of numerics (tf.debugging) stay quiet.
_NEUTRAL = 0.5


class Weights(NamedTuple):
    """The weight of each position, the w of the averages: 0 where ``mask`` is False, else ``weight``.

    Attributes:
      mask: bool, leading axes of the loss; None: all positions are valid.
      weight: floating, leading axes of the loss, all but the first of which may have size 1; None: all weights are 1.
      rank: the number of leading axes of the loss that are positions; None: all axes.
      tokens: ``[batch]`` float64, the positions of each sequence, for a loss with one value a sequence; else None.
      is_broadcastable: whether the shapes of all sources agree; a bool scalar where only a run can tell.
    """

    mask: tf.Tensor | None
    weight: tf.Tensor | None
    rank: int | None
    tokens: tf.Tensor | None = None
    is_broadcastable: Any = True

    @property
    def effective_mask(self) -> tf.Tensor | None:
        """The mask, False also where the weight is 0."""
        if self.weight is None:
            return self.mask
        return shapes.all_of(
            [shapes.Source("sample_weight", tf.not_equal(self.weight, 0), True), shapes.Source("mask", self.mask)]
        )[0]

    def restrict(self, rows: tf.Tensor | None) -> Weights:
        """Return weights that are 0 also where ``rows`` is False; None: the same weights."""
        both = [shapes.Source("mask", self.mask), shapes.Source("mask", rows)]
        return self._replace(mask=shapes.all_of(both)[0])


def of_positions(
    y_true: Any, y_pred: Any, *, mask: Any, lengths: Any, padding_value: Any, keras_mask: Any, sample_weight: Any
) -> tuple[Weights, list[Check]]:
    """Combine all sources with AND, for a loss with one value a position.

    Raises: ValueError or TypeError: a source of wrong rank, dtype or static shape.
    """
    read = None if lengths is None else shapes.read_lengths(lengths)
    mask = None if mask is None else check_mask(mask)
    weight = None if sample_weight is None else check_weight(sample_weight)
    rows = y_pred.shape[:1] if isinstance(y_pred, tf.Tensor) and y_pred.shape.rank else tf.TensorShape(None)
    for name, given in (("lengths", read and read[0]), ("mask", mask), ("sample_weight", weight)):
        if given is not None and not rows.is_compatible_with(given.shape[:1]):
            raise ValueError(f"{name} has shape {tuple(given.shape)}, expected {rows[0]} rows, as y_pred has")
    checks: list[Check] = []
    sources = []
    if read is not None:
        lengths, mask_of = read
        leaves = [leaf for leaf in tf.nest.flatten([y_pred, y_true]) if isinstance(leaf, tf.Tensor)]
        limit = next((tf.shape(leaf)[1] for leaf in leaves if (leaf.shape.rank or 0) > 1), None)
        if limit is None:
            raise ValueError("lengths were given, but y_pred has no axis 1")
        checks = shapes.length_checks(lengths, limit)
        sources.append(shapes.Source("lengths", mask_of(limit)))
    sources.append(shapes.Source("mask", mask))
    if padding_value is not None:
        sources.append(shapes.Source("padding_value", _not_padding(y_true, y_pred, padding_value)))
    if keras_mask is not None:
        sources.append(shapes.Source("Keras's mask", tf.cast(keras_mask, tf.bool)))
    combined, is_broadcastable = shapes.all_of(sources)
    ranks = [tensor.shape.rank for tensor in (combined, weight) if tensor is not None]
    if combined is None and weight is not None and weight.shape.rank == 1:
        ranks = []  # weights [batch] do not tell which axes are positions
    return Weights(combined, weight, max(ranks, default=None), is_broadcastable=is_broadcastable), checks


def of_sequences(
    y_true: Any, y_pred: Any = None, *, mask: Any, lengths: Any, padding_value: Any, keras_mask: Any, sample_weight: Any
) -> tuple[Weights, tf.Tensor | None, list[Check]]:
    """Combine all sources to the weights of rows, for a loss with one value a sequence.

    The positions of each row come from ``lengths``, from the padding value, or from a mask with a length axis. Without
    any of them all positions of the labels are valid.

    Returns: the weights; the mask of the labels' positions, None where no source tells it; checks of the lengths.

    Raises: ValueError or TypeError: a source of wrong rank, dtype or static shape.
    """
    checks: list[Check] = []
    rows, positions, tokens = [], [], None
    width = tf.shape(y_true)[1] if has_positions(y_true, y_pred) else None
    mask = None if mask is None else check_mask(mask)
    is_of_rows = mask is not None and mask.shape.rank == 1  # then the mask alone decides which rows count
    if lengths is not None:
        lengths, mask_of = shapes.read_lengths(lengths)
        checks = shapes.length_checks(lengths, width)
        rows += [] if is_of_rows else [shapes.Source("lengths", lengths > 0)]
        tokens = tf.cast(lengths, tf.float64)
        positions += [] if width is None else [shapes.Source("lengths", mask_of(width))]
    if mask is not None:
        (rows if is_of_rows else positions).append(shapes.Source("mask", mask))
    if padding_value is not None:
        positions.append(shapes.Source("padding_value", _not_padding(y_true, None, padding_value)))
    position_mask, positions_fit = shapes.all_of(positions)
    if position_mask is not None:
        tokens = tf.reduce_sum(tf.cast(position_mask, tf.float64), axis=list(range(1, position_mask.shape.rank)))
        rows += [] if is_of_rows else [shapes.Source("positions", tokens > 0)]
    elif tokens is None and width is not None and mask is None:
        tokens = tf.fill([tf.shape(y_true)[0]], tf.cast(width, tf.float64))
    if keras_mask is not None:  # of the prediction's frames, which are not the label's positions
        frames = tf.reduce_any(tf.cast(keras_mask, tf.bool), axis=list(range(1, keras_mask.shape.rank)))
        rows.append(shapes.Source("Keras's mask", frames))
    weight = None if sample_weight is None else check_weight(sample_weight)
    if weight is not None and weight.shape.rank == 2 and weight.shape[1] == 1:
        weight = tf.squeeze(weight, 1)
    if weight is not None and weight.shape.rank != 1:
        raise ValueError(f"sample_weight has shape {tuple(weight.shape)}, expected [batch], one a sequence")
    row_mask, rows_fit = shapes.all_of(rows)
    w = Weights(row_mask, weight, 1, tokens, tf.logical_and(positions_fit, rows_fit))
    return w, shapes.all_of([shapes.Source("mask", w.effective_mask), *positions])[0], checks


def has_positions(y_true: Any, y_pred: Any) -> bool:
    """Whether labels of a loss with one value a sequence have an axis of positions.

    Labels of one class a sequence have none: ``[batch, classes]`` with as many scores, or ``[batch, 1]``.
    """
    if not isinstance(y_true, tf.Tensor) or y_true.shape.rank < 2:
        return False
    of_rows = isinstance(y_pred, tf.Tensor) and y_true.shape.rank == 2 and y_pred.shape.rank in (1, 2)
    return not (of_rows and y_true.shape[1] is not None and y_true.shape[1] in (1, *y_pred.shape[1:]))


def broadcast_to(function: str, losses: tf.Tensor, w: Weights) -> tuple[Weights, Check]:
    """Broadcast mask, weight and tokens to the loss; the mask becomes False where the weight is 0.

    Returns:
      Weights with a known rank, a mask of the shape of the loss's leading axes (None where all positions are valid) and
      a weight that broadcasts to them; and the check that all shapes agree, with the loss's number of rows.

    Raises: ValueError, in the name of the public ``function``: a mask or weight of another static shape.
    """
    mask, weight, rank = w.mask, w.weight, w.rank or losses.shape.rank
    if weight is not None and rank == losses.shape.rank + 1 and weight.shape[-1] == 1:
        # weights [batch, length, 1], as Keras allows them
        mask = None if mask is None else tf.squeeze(shapes.widen(mask, rank), -1)
        weight, rank = tf.squeeze(weight, -1), rank - 1
    if rank > losses.shape.rank:
        raise ValueError(
            f"{function}: mask or sample_weight has rank {rank}, expected at most {losses.shape.rank}, the rank "
            f"of the loss {tuple(losses.shape)}."
        )
    sizes, is_broadcastable = shapes.sizes_of(losses, rank), w.is_broadcastable
    masks = []
    for name, given in (("mask", mask), ("sample_weight", weight)):
        if given is None:
            continue
        try:
            given, fit = shapes.broadcast(shapes.Source(name, given, name == "sample_weight"), sizes)
        except ValueError as error:
            raise ValueError(
                f"{function}: {name} has shape {tuple(given.shape)}, expected {tuple(losses.shape[:rank])}, the "
                f"leading axes of the loss {tuple(losses.shape)}."
            ) from error
        is_broadcastable = fit if is_broadcastable is True else tf.logical_and(is_broadcastable, fit)
        given = shapes.widen(given, rank)
        if name == "sample_weight":
            weight, given = given, tf.not_equal(given, 0)
        masks.append(tf.broadcast_to(given, tf.shape(losses)[:rank]))
    mask = functools.reduce(tf.logical_and, masks) if masks else None
    tokens = w.tokens
    if tokens is not None:
        tokens = shapes.broadcast(shapes.Source("lengths", tokens), shapes.sizes_of(losses, 1))[0]
    text = "mask, lengths or sample_weight do not match the loss, expected its leading axes (found: the loss's rows)"
    check = Check(text, tf.shape(losses)[0], is_broadcastable)
    return Weights(mask, weight, rank, tokens, is_broadcastable), check


class Gate:
    """Replaces values, as ``tf.where`` does. The gradient towards a replaced value is 0, or NaN where a check failed:
    XLA drops assertions, and a 0 would look like the gradient of a step without errors.

    Attributes:
      ok: whether the checks hold, True or a bool scalar. It may be set after the calls, before gradients are traced.
      indices: the example indices of the rows, if they are known.

    >>> gate, x = Gate(), tf.constant([1.0, 2.0])
    >>> gate.where(tf.constant([True, False]), x, 0.5).numpy().tolist()
    [1.0, 0.5]
    """

    def __init__(self, indices: Any = None) -> None:
        self.ok: Any = True
        self.indices = indices

    def where(self, mask: tf.Tensor, tensor: tf.Tensor, neutral: Any) -> tf.Tensor:
        """``tensor`` where ``mask`` is True, else ``neutral``; the mask broadcasts to the tensor's shape."""
        neutral = tf.cast(neutral, tensor.dtype)
        if tf.executing_eagerly() or not tensor.dtype.is_floating:
            return tf.where(mask, tensor, neutral)

        @tf.custom_gradient
        def replaced(given: tf.Tensor) -> Any:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                zero_or_nan = 0.0 if self.ok is True else tf.where(self.ok, 0.0, np.nan)
                return tf.where(mask, upstream, tf.cast(zero_or_nan, upstream.dtype))

            return tf.where(mask, given, neutral), gradient

        return replaced(tensor)


def clean(tensor: Any, mask: tf.Tensor | None, *, prediction: bool, gate: Gate | None = None) -> Any:
    """Replace the values at invalid positions, so that neither the loss nor its gradient depends on them.

    The gradient towards replaced values is exactly zero, whatever the loss gives; NaN where a check of the ``gate``
    fails. Tensors whose leading dimensions do not match the mask are returned unchanged, and so are nests of labels.
    """
    if mask is None:
        return tensor
    if not isinstance(tensor, tf.Tensor):
        of_leaf = lambda leaf: clean(leaf, mask, prediction=True, gate=gate)
        return tf.nest.map_structure(of_leaf, tensor) if prediction and tf.nest.is_nested(tensor) else tensor
    if tensor.dtype == tf.string or tensor.shape.rank is None or tensor.shape.rank < mask.shape.rank:
        return tensor
    try:
        mask, is_broadcastable = shapes.broadcast(
            shapes.Source("mask", mask, True), shapes.sizes_of(tensor, mask.shape.rank)
        )
    except ValueError:
        return tensor
    if is_broadcastable is not True:
        mask = tf.logical_or(mask, tf.logical_not(is_broadcastable))
    neutral = _NEUTRAL if prediction and tensor.dtype.is_floating else 0
    return (gate or Gate()).where(shapes.widen(mask, tensor.shape.rank), tensor, neutral)


def check_mask(mask: Any) -> tf.Tensor:
    """Return the mask as a bool tensor of rank 1 at least. Raises: TypeError, ValueError."""
    if isinstance(mask, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(f"mask is a {type(mask).__name__}, expected a bool tensor")
    mask = precision.to_tensor(mask, "mask", tf.bool if shapes.is_empty(mask) else None)
    if not (mask.dtype.is_bool or mask.dtype.is_integer):
        raise TypeError(f"mask has dtype {mask.dtype.name}, expected bool. Weights go to sample_weight")
    if not mask.shape.rank:
        raise ValueError(f"mask has rank {mask.shape.rank}, expected [batch, ...]")
    return tf.cast(mask, tf.bool)


def check_weight(sample_weight: Any) -> tf.Tensor:
    """Return the weights as a float32 or float64 tensor of rank 1 at least. Raises: TypeError, ValueError."""
    if isinstance(sample_weight, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(f"sample_weight is a {type(sample_weight).__name__}, expected a tensor of numbers")
    weight = precision.to_tensor(sample_weight, "sample_weight")
    if not weight.shape.rank:
        raise ValueError(f"sample_weight has rank {weight.shape.rank}, expected [batch, ...]")
    if not (weight.dtype.is_floating or weight.dtype.is_integer or weight.dtype.is_bool):
        raise TypeError(f"sample_weight has dtype {weight.dtype.name}, expected numbers")
    return weight if weight.dtype == tf.float64 else tf.cast(weight, tf.float32)


def _not_padding(y_true: Any, y_pred: Any, padding_value: Any) -> tf.Tensor:
    """True where a label differs from ``padding_value``. A label that is a vector differs where any component does."""
    if not isinstance(y_true, tf.Tensor) or y_true.shape.rank is None or y_true.shape.rank < 2:
        raise ValueError("padding_value was given, but y_true is no tensor [batch, length, ...]")
    try:
        padding = tf.constant(padding_value, y_true.dtype)
        is_nan = y_true.dtype.is_floating and np.isnan(padding_value)  # NaN does not equal itself
        real = tf.math.logical_not(tf.math.is_nan(y_true)) if is_nan else tf.not_equal(y_true, padding)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"padding_value is {padding_value!r}, expected a {y_true.dtype.name}, the dtype of y_true"
        ) from error
    rank = y_true.shape.rank
    # labels with as many axes as the predictions are vectors; labels with one axis less are classes
    vectors = rank > 2 and (not isinstance(y_pred, tf.Tensor) or y_pred.shape.rank == rank)
    return tf.reduce_any(real, axis=-1) if vectors else real
