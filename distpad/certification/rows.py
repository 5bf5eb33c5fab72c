"""The rows of a case: which kinds of case a batch allows, how rows are drawn, and how replicas get them."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import losses

_ROWS_PER_REPLICA = 3  # on average
_PROBE_ROWS = 8  # enough to build a model, or to see the effect of padding
_EXTRA_POSITIONS = 5  # of padding, to see its effect on the model
_SOURCES = ("lengths", "mask", "sample_weight")  # each can mark rows as padding

Fields = dict[str, Any]  # arrays or nests of arrays by name, with the rows along the first axis


class Kind(enum.Enum):
    """What a case varies: a number, which seeds the draws of its cases, and the text of its line."""

    UNEVEN_ROWS = 1, "uneven rows"
    RANDOM_LENGTHS = 2, "random lengths"
    RANDOM_MASKS = 3, "random masks"
    SAMPLE_WEIGHTS = 4, "sample weights"
    NAN_IN_PADDING = 5, "NaN in padding"
    EMPTY_REPLICA = 6, "an empty replica"
    ALL_PADDING = 7, "all padding"
    ACCUMULATION = 8, "accumulation"

    def __init__(self, number: int, text: str) -> None:
        self.number, self.text = number, text


def rank_of_mask(fields: Fields, loss: Any) -> int:
    """The rank of a mask, or of sample weights, that a loss takes although the batch has none; 0 for no such mask.

    A ``DistributedLoss`` takes a mask ``[batch, length]``, or ``[batch]`` where it has one value a sequence.
    """
    if not isinstance(loss, losses.DistributedLoss):
        return 0
    if loss.per == "sequence":
        return 1
    y = fields["y"]
    return 2 if isinstance(y, np.ndarray) and y.ndim > 1 else 0


def kinds(fields: Fields, mask_rank: int, *, takes_no_rows: bool, accumulates: bool) -> list[Kind]:
    """The kinds of case that the batch and the loss allow.

    An empty replica needs a step that takes no rows, or a row that can be marked as padding.
    """
    sources = _sources(fields)
    can_be_padding = bool(sources or mask_rank)
    allowed = {
        Kind.UNEVEN_ROWS: True,
        Kind.RANDOM_LENGTHS: "lengths" in sources,
        Kind.RANDOM_MASKS: "mask" in sources or mask_rank > 0,
        Kind.SAMPLE_WEIGHTS: "sample_weight" in sources or mask_rank > 0,
        Kind.EMPTY_REPLICA: takes_no_rows or can_be_padding,
        Kind.ALL_PADDING: can_be_padding,
        Kind.ACCUMULATION: accumulates,
    }
    return [kind for kind, is_allowed in allowed.items() if is_allowed]


def sizes_of_parts(parts: int, replicas: int, seed: Sequence[int]) -> list[int]:
    """The number of rows of each part of a case: at least one each, and not the same number in all parts."""
    random = np.random.default_rng(seed)
    sizes = 1 + random.multinomial(max(_ROWS_PER_REPLICA * replicas - parts, 0), np.full(parts, 1 / parts))
    if parts > 1 and len(set(sizes)) == 1:
        sizes[0], sizes[-1] = sizes[0] + 1, max(sizes[-1] - 1, 1)
    return [int(size) for size in sizes]


def draw(
    fields: Fields, kind: Kind, number: int, seed: Sequence[int], *, mask_rank: int = 0, takes_no_rows: bool = True
) -> Fields:
    """Draw ``number`` rows of the batch in random order, repeated where the batch has fewer, and vary them by kind.

    Args:
      fields: the batch.
      kind: what is varied.
      number: the number of rows.
      seed: the seed of the draws.
      mask_rank: the rank of a mask, or of weights, for a batch that has none; 0 for no such mask.
      takes_no_rows: whether the empty replica has no rows. Otherwise it gets the last row, as padding.
    """
    random = np.random.default_rng(seed)
    picked = np.resize(random.permutation(number_of(fields)), number)
    rows: Fields = tf.nest.map_structure(lambda array: array[picked], fields)
    shape = tf.nest.flatten(rows["y"])[0].shape[:mask_rank] if mask_rank else ()
    if kind is Kind.RANDOM_LENGTHS:
        lengths = random.integers(0, rows["lengths"].astype(np.int64) + 1)
        lengths[0] = rows["lengths"][0]  # few cases are all padding
        rows["lengths"] = lengths.astype(rows["lengths"].dtype)
    elif kind is Kind.RANDOM_MASKS:
        mask = rows.get("mask", np.ones(shape, bool))
        rows["mask"] = ((random.random(mask.shape) < 0.6) & mask.astype(bool)).astype(mask.dtype)
    elif kind is Kind.SAMPLE_WEIGHTS:
        weight = rows.get("sample_weight", np.ones(shape))
        rows["sample_weight"] = (random.choice([0.0, 0.5, 1.0, 3.0], weight.shape) * (weight != 0)).astype(weight.dtype)
    elif kind is Kind.ALL_PADDING or (kind is Kind.EMPTY_REPLICA and not takes_no_rows):
        if mask_rank and not _sources(rows):
            rows["mask"] = np.ones(shape, bool)
        padding = slice(None) if kind is Kind.ALL_PADDING else slice(-1, None)
        rows[_sources(rows)[0]][padding] = 0
    return rows


def _sources(fields: Fields) -> list[str]:
    """The fields that can mark rows as padding."""
    return [name for name in _SOURCES if isinstance(fields.get(name), np.ndarray)]


def split(rows: Fields, sizes: Sequence[int]) -> list[Fields]:
    """The rows in consecutive parts of these sizes."""
    ends = np.cumsum(sizes)
    return [tf.nest.map_structure(lambda a, e=e, n=n: a[e - n : e], rows) for e, n in zip(ends, sizes)]


def joined(parts: Sequence[Fields]) -> Fields:
    """The rows of all parts, concatenated."""
    return tf.nest.map_structure(lambda *arrays: np.concatenate(arrays), *parts)


def number_of(fields: Fields) -> int:
    return len(tf.nest.flatten(fields)[0])


def first(fields: Fields, number: int = _PROBE_ROWS) -> Fields:
    """The first rows of the batch, at most ``number``."""
    return tf.nest.map_structure(lambda array: array[:number], fields)


def padded_further(fields: Fields, loss: Any) -> Fields | None:
    """The same rows with a few more positions of padding after each row; None where no field can mark them as padding.

    The predictions of a loss with one value a sequence are padded, and its labels are not.
    """
    y, x = fields.get("y"), fields.get("x")
    per_sequence = isinstance(loss, losses.DistributedLoss) and loss.per == "sequence"
    if not isinstance(y, np.ndarray) or x is None or (y.ndim < 2 and not per_sequence):
        return None
    if per_sequence:
        return {**fields, "x": tf.nest.map_structure(lambda leaf: _longer(leaf, 0) if leaf.ndim > 2 else leaf, x)}
    further, width = dict(fields), y.shape[1]
    rank = rank_of_mask(fields, loss)
    if rank and "mask" not in fields:
        further["mask"] = np.ones(y.shape[:rank], bool)
    if not set(_SOURCES) & set(further):
        return None
    padding_value = getattr(loss, "padding_value", None)
    further["y"] = _longer(y, 0 if padding_value is None else padding_value)
    for name in ("mask", "sample_weight"):
        if name in further and further[name].ndim > 1:
            further[name] = _longer(further[name], 0)
    has_positions = lambda leaf: leaf.ndim > 1 and leaf.shape[1] == width
    further["x"] = tf.nest.map_structure(lambda leaf: _longer(leaf, 0) if has_positions(leaf) else leaf, x)
    return further


def _longer(array: np.ndarray, value: Any) -> np.ndarray:
    widths = [(0, 0), (0, _EXTRA_POSITIONS), *[(0, 0)] * (array.ndim - 2)]
    return np.pad(array, widths, constant_values=value)
