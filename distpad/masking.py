"""Which positions count: masks and weights from every source, and the cleaning of what stands where none count."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad.exchange import Rule

# What stands at padded places of the predictions while the loss looks at them: as a probability, a logit or a
# regression value it gives finite losses. The result does not depend on it; it keeps NaN checkers quiet.
_NEUTRAL = 0.5


class Valid(NamedTuple):
    """Which positions are valid, and how much each counts.

    Attributes:
      mask: bool, a prefix of the loss's shape; None: all are valid.
      weight: floating, broadcasts to the mask's shape from the left; None: one each.
      rank: how many leading axes of the loss are positions; None: all of them.
      tokens: for losses with one value a sequence: the positions of each sequence, ``[batch]``; else None.
    """

    mask: tf.Tensor | None
    weight: tf.Tensor | None
    rank: int | None
    tokens: tf.Tensor | None = None


def as_tensor(value: Any) -> Any:
    """A tensor from an array, a variable or lists of numbers. A nest of tensors, or a composite one, stays as it is."""
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        return value
    is_list = isinstance(value, list) and all(np.isscalar(leaf) for leaf in tf.nest.flatten(value))
    is_nest = isinstance(value, (dict, list, tuple)) and not is_list
    return value if is_nest else tf.convert_to_tensor(value)


def widen(tensor: tf.Tensor, rank: int) -> tf.Tensor:
    """Add trailing axes of size one up to ``rank``, so that a prefix of a shape broadcasts to all of it."""
    missing = rank - tensor.shape.rank
    return tf.reshape(tensor, tf.concat([tf.shape(tensor), [1] * missing], 0)) if missing > 0 else tensor


@tf.autograph.experimental.do_not_convert
def of_positions(
    y_true: Any, y_pred: Any, *, mask: Any, lengths: Any, padding_value: Any, keras_mask: Any, sample_weight: Any
) -> tuple[Valid, list[Rule]]:
    """The valid positions of a loss with one value a position: all sources combined with AND.

    Raises ValueError or TypeError for sources of wrong rank, dtype or static shape.
    """
    rules = length_rules()
    sources = []
    if lengths is not None:
        lengths = _rows_like(y_pred, "lengths", check_lengths(lengths))
        limit = _length_axis(y_true, y_pred)
        rules = length_rules(lengths, limit)
        lengths = _nothing_unless(rules, lengths)
        sources.append(tf.sequence_mask(lengths, limit))
    if mask is not None:
        sources.append(check_mask(mask))
    if padding_value is not None:
        sources.append(_not_padding(y_true, y_pred, padding_value))
    if keras_mask is not None:
        sources.append(tf.cast(keras_mask, tf.bool))
    ranks = [source.shape.rank for source in sources]
    weight = None
    if sample_weight is not None:
        weight = _rows_like(y_pred, "sample_weight", check_weight(sample_weight))
        sources.append(tf.not_equal(weight, 0))  # what weighs nothing is looked at no more than padding is
        ranks += [weight.shape.rank] if weight.shape.rank > 1 else []  # [batch] says nothing of positions
    return Valid(_all_of(sources), weight, max(ranks, default=None)), rules


@tf.autograph.experimental.do_not_convert
def of_sequences(
    y_true: Any, *, mask: Any, lengths: Any, padding_value: Any, keras_mask: Any, sample_weight: Any
) -> tuple[Valid, tf.Tensor | None, list[Rule]]:
    """The rows that count in a loss with one value a sequence, and the mask of their labels' positions, if known.

    The positions of each row come from ``lengths``, from the padding value, or from a mask with a length axis; a label
    tensor without any of them is all valid.
    """
    rules = length_rules()
    width = tf.shape(y_true)[1] if isinstance(y_true, tf.Tensor) and y_true.shape.rank > 1 else None
    rows, positions = [], []
    tokens = None
    if lengths is not None:
        lengths = check_lengths(lengths)
        rules = length_rules(lengths, width)
        lengths = _nothing_unless(rules, lengths)
        rows.append(lengths > 0)
        tokens = tf.cast(lengths, tf.float64)
        if width is not None:
            positions.append(tf.sequence_mask(lengths, width))
    if mask is not None:
        mask = check_mask(mask)
        (rows if mask.shape.rank == 1 else positions).append(mask)
    if padding_value is not None:
        positions.append(_not_padding(y_true, None, padding_value))
    position_mask = _all_of(positions)
    if position_mask is not None:
        tokens = tf.reduce_sum(tf.cast(position_mask, tf.float64), axis=list(range(1, position_mask.shape.rank)))
        rows.append(tokens > 0)
    elif tokens is None and width is not None and mask is None:
        tokens = tf.fill([tf.shape(y_true)[0]], tf.cast(width, tf.float64))
    if keras_mask is not None:  # of a prediction's frames, which are not the label's positions
        keras_mask = tf.cast(keras_mask, tf.bool)
        rows.append(tf.reduce_any(keras_mask, axis=list(range(1, keras_mask.shape.rank))))
    weight = None
    if sample_weight is not None:
        weight = check_weight(sample_weight)
        if weight.shape.rank == 2 and weight.shape[1] == 1:
            weight = tf.squeeze(weight, 1)
        if weight.shape.rank != 1:
            raise ValueError(f"sample_weight has shape {tuple(weight.shape)}, expected [batch], one a sequence")
        rows.append(tf.not_equal(weight, 0))
    return Valid(_all_of(rows), weight, 1, tokens), position_mask, rules


@tf.autograph.experimental.do_not_convert
def clean(tensor: Any, mask: tf.Tensor | None, *, prediction: bool) -> Any:
    """Replace what stands at invalid places, so that neither the value nor the gradient can depend on it.

    ``tf.where`` chooses also in its gradient: towards replaced places it is exactly zero, whatever the loss gives.
    A tensor that the mask is no prefix of, and all but the leaves of predictions, is handed on.
    """
    if mask is None:
        return tensor
    if not isinstance(tensor, tf.Tensor):
        return tf.nest.map_structure(lambda leaf: clean(leaf, mask, prediction=True), tensor) if prediction else tensor
    if tensor.dtype == tf.string or tensor.shape.rank is None or tensor.shape.rank < mask.shape.rank:
        return tensor
    if not tensor.shape[: mask.shape.rank].is_compatible_with(mask.shape):
        return tensor
    filling = tf.cast(_NEUTRAL if prediction and tensor.dtype.is_floating else 0, tensor.dtype)
    return tf.where(widen(mask, tensor.shape.rank), tensor, filling)


def check_lengths(lengths: Any) -> tf.Tensor:
    """``[batch]`` whole numbers."""
    lengths = tf.convert_to_tensor(lengths)
    if not lengths.dtype.is_integer:
        raise TypeError(f"lengths have dtype {lengths.dtype.name}, expected whole numbers")
    if lengths.shape.rank != 1:
        raise ValueError(f"lengths have shape {tuple(lengths.shape)}, expected [batch]")
    return lengths


def length_rules(lengths: tf.Tensor | None = None, limit: Any = None) -> list[Rule]:
    """Lengths are 0 to ``limit``. Always two rules, since all replicas must report alike; no lengths: both hold."""
    lengths = tf.zeros([0], tf.int64) if lengths is None else tf.cast(lengths, tf.int64)
    lowest = tf.reduce_min(tf.concat([lengths, [0]], 0))
    longest = tf.reduce_max(tf.concat([lengths, [0]], 0))
    limit = longest if limit is None else tf.cast(limit, tf.int64)
    return [
        Rule("lengths hold a value below 0, expected at least 0", lowest, lowest >= 0),
        Rule("lengths hold a value above the size of axis 1, expected at most that", longest, longest <= limit),
    ]


def _nothing_unless(rules: list[Rule], lengths: tf.Tensor) -> tf.Tensor:
    """Lengths that break a rule make nothing valid, so that the loss gets as far as the exchange, which raises."""
    return tf.where(tf.reduce_all([rule.ok for rule in rules]), lengths, tf.zeros_like(lengths))


def check_mask(mask: Any) -> tf.Tensor:
    mask = tf.convert_to_tensor(mask)
    if mask.dtype.is_floating:
        raise TypeError(f"mask has dtype {mask.dtype.name}, expected bool. Weights go to sample_weight")
    if not mask.shape.rank:
        raise ValueError(f"mask has rank {mask.shape.rank}, expected [batch, ...]")
    return tf.cast(mask, tf.bool)


def check_weight(sample_weight: Any) -> tf.Tensor:
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
        real = tf.not_equal(y_true, tf.constant(padding_value, y_true.dtype))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"padding_value is {padding_value!r}, expected a {y_true.dtype.name}, as y_true holds"
        ) from error
    rank = y_true.shape.rank
    # labels with as many axes as the predictions are vectors; with one less they are classes
    vectors = rank > 2 and (not isinstance(y_pred, tf.Tensor) or y_pred.shape.rank == rank)
    return tf.reduce_any(real, axis=-1) if vectors else real


def _all_of(sources: list[tf.Tensor]) -> tf.Tensor | None:
    """The AND of masks, each a prefix (or a broadcasting prefix) of the largest."""
    if not sources:
        return None
    rank = max(source.shape.rank for source in sources)
    result = widen(sources[0], rank)
    for source in sources[1:]:
        source = widen(source, rank)
        try:
            tf.broadcast_static_shape(result.shape, source.shape)
        except ValueError as error:
            raise ValueError(
                f"masks, lengths and weights have shapes {[tuple(s.shape) for s in sources]}, expected prefixes of one"
            ) from error
        result = tf.logical_and(result, source)
    return result
