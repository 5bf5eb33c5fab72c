"""The batch that a user certifies with: checked, the same on all workers, and handed back in the form it had."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors, precision
from distpad.certification import rows
from distpad.collectives import shapes
from distpad.losses import weights
from distpad.losses.counts import Counts, LossInputs

_KERAS = ("x", "y", "sample_weight")  # the places of a tuple, as in fit
_PIPELINE = ("data", "lengths", "rows", "counts", "indices", "loss_inputs")  # of a distpad.Batch


class Given(NamedTuple):
    """A batch as fields; ``form`` gives them the form it had, after ``counted`` said of a case what is in all of it."""

    fields: rows.Fields
    form: Callable[[rows.Fields], Any]
    counted: Callable[[rows.Fields], rows.Fields] = dict


def checked(batch: Any, needed: Sequence[str], backend: backends.Backend) -> Given:
    """``batch`` as a ``Given``; ValueError or TypeError on all workers where one of them has no such batch, or another.

    Collective among workers: one maximum.
    """
    argument_error: Exception | None = None
    given, mark = None, 0
    try:
        given = _read(batch, needed)
        for leaf in tf.nest.flatten(given.fields):
            mark = zlib.crc32(repr(leaf.tolist()).encode() if leaf.dtype == object else leaf.tobytes(), mark)
        mark = zlib.crc32(repr(tf.nest.map_structure(lambda a: (a.shape, a.dtype), given.fields)).encode(), mark)
    except (ValueError, TypeError) as error:
        argument_error = error
    refused, most, least = backend.host_max(np.array([argument_error is not None, mark, -mark], np.int64))
    if argument_error is not None:
        raise argument_error
    if refused or given is None:
        raise ValueError(errors.sentence("certify", "batch", "refused by another worker", "one that all can use"))
    if most != -least:
        remedy = "Draw it from one seed, or give the same rows to all: certify deals them out."
        raise ValueError(errors.sentence("certify", "batch", "not the same on all workers", "the same", remedy))
    return given


def _read(batch: Any, needed: Sequence[str]) -> Given:
    if getattr(batch, "_fields", ()) == _PIPELINE:
        return _of_pipeline(batch, needed)
    fields: rows.Fields
    form: Callable[[rows.Fields], Any] = dict
    if isinstance(batch, Mapping):
        fields = dict(batch)
    elif hasattr(batch, "_asdict"):
        fields, form = batch._asdict(), lambda fields: batch._replace(**fields)
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        fields, form = dict(zip(_KERAS, batch)), lambda fields: tuple(fields[name] for name in _KERAS if name in fields)
    else:
        remedy = 'Write {"x": ..., "y": ..., "lengths": ...}.'
        raise TypeError(errors.sentence("certify", "batch", type(batch).__name__, "arrays by name", remedy))
    fields = {name: _arrays(name, value) for name, value in fields.items() if value is not None}
    return _checked(Given(fields, form), needed)


def _checked(given: Given, needed: Sequence[str]) -> Given:
    fields = given.fields
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
    if not rows.number_of(fields):
        raise ValueError(errors.sentence("certify", "batch", "of no rows", "at least one row"))
    for name, check in (("lengths", shapes.check_lengths), ("mask", weights.check_mask)):
        if needed and name in fields:  # a step may mean something else by them
            try:
                check(fields[name])
            except (ValueError, TypeError) as error:
                raise type(error)(f"certify: batch: {error}.") from error
    return given


def _of_pipeline(batch: Any, needed: Sequence[str]) -> Given:
    """What ``PaddedBatches`` hands over: its filling is left out, and its counts are those of each case."""
    counts, real = batch.counts, slice(0, int(batch.rows))
    if type(counts) is not Counts:
        kind = type(counts).__name__
        raise TypeError(errors.sentence("certify", "batch.counts", f"a {kind}", "Counts", "Give a mapping of arrays."))
    data = {name: _arrays(str(name), value) for name, value in dict(batch.data).items()}
    lengths = {name: np.asarray(value) for name, value in batch.lengths.items()}
    mine = [n for n, own in lengths.items() if (own.sum(), (own > 0).sum()) == (counts.tokens, counts.sequences)]
    if not mine:
        remedy = "Make it by PaddedBatches(..., accumulation_steps=1, backend='local')."
        raise ValueError(errors.sentence("certify", "batch.counts", counts, "those of its own rows", remedy))
    tokens = mine[0]
    fields = {"data": data, "features": lengths, "lengths": lengths[tokens], "indices": np.asarray(batch.indices)}
    fields.update({name: data[name] for name in ("x", "y", "sample_weight") if needed and name in data})

    def counted(case: rows.Fields) -> rows.Fields:
        every = np.ones(rows.number_of(case))  # carried by each row, to be with it on whichever replica
        totals = {"tokens": case["lengths"].sum() * every, "sequences": (case["lengths"] > 0).sum() * every}
        return {**case, "totals": totals}

    def form(case: rows.Fields) -> Any:
        mine = tf.cast([tf.reduce_sum(case["lengths"]), tf.reduce_sum(tf.sign(case["lengths"]))], tf.float64)
        totals = Counts(case["totals"]["tokens"][0], case["totals"]["sequences"][0], mine)
        own = {**case["features"], tokens: case["lengths"]}
        inputs = LossInputs(case["lengths"], (), totals)
        return type(batch)(case["data"], own, tf.shape(case["indices"])[0], totals, case["indices"], inputs)

    return _checked(Given(tf.nest.map_structure(lambda a: a[real], fields), form, counted), needed)


def _arrays(name: str, value: Any) -> Any:
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        kind = type(value).__name__
        raise TypeError(errors.sentence("certify", f"batch[{name!r}]", f"a {kind}", "an array", "Use distpad.pad."))
    arrays = tf.nest.map_structure(np.asarray, precision.as_tensor(value, widen=False))
    for array in tf.nest.flatten(arrays):
        if array.dtype == object and not all(isinstance(item, (str, bytes)) for item in array.flat):
            remedy = "Under a strategy, give what all replicas have together."
            raise TypeError(errors.sentence("certify", f"batch[{name!r}]", type(value).__name__, "an array", remedy))
    return arrays
