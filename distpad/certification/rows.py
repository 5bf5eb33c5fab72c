"""Rows of a batch, dealt out in many ways: unevenly, with what counts of them drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import losses

_A_REPLICA = 3  # so many rows a replica has in a case, on average
_FURTHER = 5  # positions of padding that are added to see what the model makes of them

Fields = dict[str, Any]  # arrays or nests of them by name, rows along the first axis of each


def kinds(fields: Fields, loss: Any, *, is_step: bool) -> list[str]:
    """What is varied, as far as the batch and the loss allow it: a DistributedLoss always takes masks and weights."""
    shape = None if is_step else _mask_shape(fields, loss)
    masked = "mask" in _said(fields) or shape is not None
    weighted = "sample_weight" in _said(fields) or shape is not None
    there = {
        "uneven rows": True,
        "random lengths": "lengths" in _said(fields),
        "random masks": masked,
        "sample weights": weighted,
        "an empty replica": True,
        "all padding": masked or weighted or "lengths" in _said(fields),
        "accumulation": not is_step and isinstance(loss, losses.DistributedLoss),
    }
    return [kind for kind, can_be in there.items() if can_be]


def _mask_shape(fields: Fields, loss: Any) -> tuple[int, ...] | None:
    """The shape of a mask that a DistributedLoss can be given though the batch has none; None where nothing tells."""
    if not isinstance(loss, losses.DistributedLoss):
        return None
    y = fields["y"]
    if loss.per == "sequence":
        return tf.nest.flatten(y)[0].shape[:1]
    return y.shape[:2] if isinstance(y, np.ndarray) and y.ndim > 1 else None


def sizes_of_parts(parts: int, replicas: int, seed: Sequence[int]) -> list[int]:
    """How many rows each part of a case has: none is empty, and no two replicas' shapes are alike for long."""
    random = np.random.default_rng(seed)
    sizes = 1 + random.multinomial(max(_A_REPLICA * replicas - parts, 0), np.full(parts, 1 / parts))
    if parts > 1 and len(set(sizes)) == 1:
        sizes[0], sizes[-1] = sizes[0] + 1, max(sizes[-1] - 1, 1)
    return [int(size) for size in sizes]


def draw(fields: Fields, loss: Any, kind: str, number: int, seed: Sequence[int], *, is_step: bool) -> Fields:
    """``number`` rows of the batch in random order, again and again where it has fewer, varied as ``kind`` says."""
    random = np.random.default_rng(seed)
    picked = np.resize(random.permutation(number_of(fields)), number)
    rows: Fields = tf.nest.map_structure(lambda array: array[picked], fields)
    shape = None if is_step else _mask_shape(rows, loss)
    if kind == "random lengths":
        drawn = random.integers(0, rows["lengths"].astype(np.int64) + 1)
        drawn[0] = rows["lengths"][0]  # so that seldom all are 0
        rows["lengths"] = drawn.astype(rows["lengths"].dtype)
    elif kind == "random masks":
        given = rows.get("mask", np.ones(shape or (), bool))
        rows["mask"] = ((random.random(given.shape) < 0.6) & given.astype(bool)).astype(given.dtype)
    elif kind == "sample weights":
        given = rows.get("sample_weight", np.ones(shape or ()))
        rows["sample_weight"] = (random.choice([0.0, 0.5, 1.0, 3.0], given.shape) * (given != 0)).astype(given.dtype)
    elif kind in ("all padding", "an empty replica"):
        if shape and not _said(rows):
            rows["mask"] = np.ones(shape, bool)
        rows = rows if kind == "an empty replica" else _nothing(rows)
    return rows


def filling(rows: Fields) -> Fields:
    """One row, which does not count, for a replica that can do with no less."""
    return _nothing(first(rows, 1))


def _nothing(rows: Fields) -> Fields:
    """The same rows, none of which counts."""
    return rows | {name: np.zeros_like(rows[name]) for name in _said(rows)[:1]}


def _said(rows: Fields) -> list[str]:
    """What there is that can say of rows that they do not count."""
    return [name for name in ("lengths", "mask", "sample_weight") if isinstance(rows.get(name), np.ndarray)]


def split(rows: Fields, sizes: Sequence[int]) -> list[Fields]:
    """The rows in parts of these sizes, one behind the other."""
    ends = np.cumsum(sizes)
    return [tf.nest.map_structure(lambda a, e=e, n=n: a[e - n : e], rows) for e, n in zip(ends, sizes)]


def joined(parts: Sequence[Fields]) -> Fields:
    """The rows of all parts, one behind the other."""
    return tf.nest.map_structure(lambda *arrays: np.concatenate(arrays), *parts)


def number_of(fields: Fields) -> int:
    return len(tf.nest.flatten(fields)[0])


def first(fields: Fields, number: int = 8) -> Fields:
    """The first rows, as many as show what a batch is."""
    return tf.nest.map_structure(lambda array: array[:number], fields)


def padded_further(fields: Fields, loss: Any) -> Fields | None:
    """The same rows with a few more positions of padding behind each; None where nothing says that they are padding."""
    y, x = fields.get("y"), fields.get("x")
    per_sequence = isinstance(loss, losses.DistributedLoss) and loss.per == "sequence"
    if not isinstance(y, np.ndarray) or x is None or (y.ndim < 2 and not per_sequence):
        return None
    further = dict(fields)
    width = 0 if per_sequence else y.shape[1]
    if not per_sequence:
        shape = _mask_shape(fields, loss)
        if shape is not None and "mask" not in fields:
            further["mask"] = np.ones(shape, bool)
        if not {"lengths", "mask", "sample_weight"} & set(further):
            return None
        filling = getattr(loss, "padding_value", None)
        further["y"] = _longer(y, 0 if filling is None else filling)
        for name in ("mask", "sample_weight"):
            if name in further and further[name].ndim > 1:
                further[name] = _longer(further[name], 0)
    further["x"] = tf.nest.map_structure(
        lambda leaf: (
            _longer(leaf, 0)
            if leaf.ndim > (2 if per_sequence else 1) and (per_sequence or leaf.shape[1] == width)
            else leaf
        ),
        x,
    )
    return further


def _longer(array: np.ndarray, filling: Any) -> np.ndarray:
    behind = [(0, 0), (0, _FURTHER), *[(0, 0)] * (array.ndim - 2)]
    return np.pad(array, behind, constant_values=filling)
