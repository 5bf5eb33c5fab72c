"""The batch that a user certifies with: checked, the same on all workers, and its rows dealt out in many ways."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors, losses, masking

_A_REPLICA = 3  # so many rows a replica has in a case, on average
_FURTHER = 5  # positions of padding that are added to see what the model makes of them
_KERAS = ("x", "y", "sample_weight")  # the places of a tuple, as in fit

Fields = dict[str, Any]


class Given(NamedTuple):
    """A batch as arrays by name, rows along the first axis of each; ``form`` gives fields the form it had."""

    fields: Fields
    form: Callable[[Fields], Any]


def checked(batch: Any, needed: Sequence[str], backend: backends.Backend) -> Given:
    """``batch`` as a ``Given``; ValueError or TypeError on all workers where one of them has no such batch, or another.

    Collective among workers: one maximum.
    """
    complaint: Exception | None = None
    given, mark = None, 0
    try:
        given = _read(batch, needed)
        for leaf in tf.nest.flatten(given.fields):
            mark = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).tobytes(), mark)
        mark = zlib.crc32(repr(tf.nest.map_structure(lambda a: (a.shape, a.dtype), given.fields)).encode(), mark)
    except (ValueError, TypeError) as error:
        complaint = error
    refused, most, least = backend.host_max(np.array([complaint is not None, mark, -mark], np.int64))
    if complaint is not None:
        raise complaint
    if refused or given is None:
        raise ValueError(errors.sentence("certify", "batch", "refused by another worker", "one that all can use"))
    if most != -least:
        remedy = "Draw it from one seed, or give the same rows to all: certify deals them out."
        raise ValueError(errors.sentence("certify", "batch", "not the same on all workers", "the same", remedy))
    return given


def _read(batch: Any, needed: Sequence[str]) -> Given:
    fields: Fields
    form: Callable[[Fields], Any] = dict
    if isinstance(batch, Mapping):
        fields = dict(batch)
    elif hasattr(batch, "_asdict"):
        fields, form = batch._asdict(), lambda fields: type(batch)(**fields)
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        fields, form = dict(zip(_KERAS, batch)), lambda fields: tuple(fields[name] for name in _KERAS if name in fields)
    else:
        remedy = 'Write {"x": ..., "y": ..., "lengths": ...}.'
        raise TypeError(errors.sentence("certify", "batch", type(batch).__name__, "arrays by name", remedy))
    fields = {name: _arrays(name, value) for name, value in fields.items() if value is not None}
    missing = [name for name in needed if name not in fields]
    if missing:
        known = ", ".join(fields)
        raise ValueError(errors.sentence("certify", "batch", f"without {missing[0]!r} (it has {known})", "x and y"))
    sizes = {name: {leaf.shape[:1] for leaf in tf.nest.flatten(value)} for name, value in fields.items()}
    if len(set().union(*sizes.values())) != 1 or () in set().union(*sizes.values()):
        found = ", ".join(f"{name} {sorted(map(str, shapes))}" for name, shapes in sizes.items())
        raise ValueError(
            errors.sentence("certify", "batch", f"of leading axes {found}", "the same number of rows in all")
        )
    given = Given(fields, form)
    if not number_of(fields):
        raise ValueError(errors.sentence("certify", "batch", "of no rows", "at least one row"))
    for name, check in (("lengths", masking.check_lengths), ("mask", masking.check_mask)):
        if name in fields:
            try:
                check(fields[name])
            except (ValueError, TypeError) as error:
                raise type(error)(f"certify: batch: {error}.") from error
    return given


def _arrays(name: str, value: Any) -> Any:
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        kind = type(value).__name__
        raise TypeError(errors.sentence("certify", f"batch[{name!r}]", f"a {kind}", "an array", "Use distpad.pad."))
    arrays = tf.nest.map_structure(np.asarray, masking.as_tensor(value))
    for array in tf.nest.flatten(arrays):
        if array.dtype == object and not all(isinstance(item, (str, bytes)) for item in array.flat):
            remedy = "Under a strategy, give what all replicas have together."
            raise TypeError(errors.sentence("certify", f"batch[{name!r}]", type(value).__name__, "an array", remedy))
    return arrays


def kinds(fields: Fields, loss: Any, *, is_step: bool) -> list[str]:
    """What is varied, as far as the batch and the loss allow it: a DistributedLoss always takes masks and weights."""
    shape = None if is_step else _mask_shape(fields, loss)
    masked = "mask" in fields or shape is not None
    weighted = "sample_weight" in fields or shape is not None
    there = {
        "uneven rows": True,
        "random lengths": "lengths" in fields,
        "random masks": masked,
        "sample weights": weighted,
        "an empty replica": True,
        "all padding": masked or weighted or "lengths" in fields,
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
    return [name for name in ("lengths", "mask", "sample_weight") if name in rows]


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
