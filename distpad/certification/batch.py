"""The user's batch: read into fields, checked on all workers, and given to a step in its original form."""

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

_KERAS = ("x", "y", "sample_weight")  # the items of a tuple, as in fit
_PIPELINE = ("data", "lengths", "rows", "counts", "indices", "loss_inputs")  # of a distpad.Batch


class Given(NamedTuple):
    """A batch as fields.

    Attributes:
      fields: arrays by name.
      form: from the fields of a replica to the form of the user's batch.
      counted: from the fields of a case to the same fields with the counts of the case, where the form has counts.
    """

    fields: rows.Fields
    form: Callable[[rows.Fields], Any]
    counted: Callable[[rows.Fields], rows.Fields] = dict


def checked(batch: Any, needed: Sequence[str], backend: backends.Backend) -> Given:
    """Read ``batch``; all workers raise where one of them has no valid batch, or another batch than the others.

    Collective among workers: one maximum.
    """
    argument_error: Exception | None = None
    given, checksum = None, 0
    try:
        given = _read(batch, needed)
        checksum = _checksum(given.fields)
    except (ValueError, TypeError) as error:
        argument_error = error
    refused, most, least = backend.host_max(np.array([argument_error is not None, checksum, -checksum], np.int64))
    if argument_error is not None:
        raise argument_error
    if refused or given is None:
        raise ValueError(errors.sentence("certify", "batch", "refused by another worker", "a valid batch on all"))
    if most != -least:
        remedy = "Draw the batch from one seed, or pass the same rows on all workers: certify distributes the rows."
        raise ValueError(errors.sentence("certify", "batch", "not the same on all workers", "the same", remedy))
    return given


def _checksum(fields: rows.Fields) -> int:
    """A checksum of values, names, shapes and dtypes."""
    checksum = zlib.crc32(repr(tf.nest.map_structure(lambda array: (array.shape, array.dtype), fields)).encode())
    for leaf in tf.nest.flatten(fields):
        checksum = zlib.crc32(repr(leaf.tolist()).encode() if leaf.dtype == object else leaf.tobytes(), checksum)
    return checksum


def _read(batch: Any, needed: Sequence[str]) -> Given:
    if getattr(batch, "_fields", ()) == _PIPELINE:
        return _read_pipeline(batch, needed)
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
    _check(fields, needed)
    return Given(fields, form)


def _check(fields: rows.Fields, needed: Sequence[str]) -> None:
    """Check names and numbers of rows, and lengths and mask as a loss does. A step may use the names otherwise."""
    missing = [name for name in needed if name not in fields]
    if missing:
        known = ", ".join(fields)
        raise ValueError(errors.sentence("certify", "batch", f"without {missing[0]!r} (it has {known})", "x and y"))
    sizes = {name: {leaf.shape[:1] for leaf in tf.nest.flatten(value)} for name, value in fields.items()}
    if len(set().union(*sizes.values())) != 1 or () in set().union(*sizes.values()):
        found = "of leading axes " + ", ".join(f"{name} {sorted(map(str, shapes))}" for name, shapes in sizes.items())
        raise ValueError(errors.sentence("certify", "batch", found, "the same number of rows in all arrays"))
    if not rows.number_of(fields):
        raise ValueError(errors.sentence("certify", "batch", "of no rows", "at least one row"))
    for name, check in (("lengths", shapes.check_lengths), ("mask", weights.check_mask)):
        if needed and name in fields:
            try:
                check(fields[name])
            except (ValueError, TypeError) as error:
                raise type(error)(f"certify: batch: {error}.") from error


def _read_pipeline(batch: Any, needed: Sequence[str]) -> Given:
    """A ``Batch`` of ``PaddedBatches``: filler rows are left out, and each case has counts of its own."""
    counts, real = batch.counts, slice(0, int(batch.rows))
    if type(counts) is not Counts:
        kind = type(counts).__name__
        raise TypeError(errors.sentence("certify", "batch.counts", f"a {kind}", "Counts", "Give a mapping of arrays."))
    if any(isinstance(value, shapes.PreLengths) for value in batch.lengths.values()):
        remedy = 'Give {"x": ..., "y": ..., "mask": ...}.'
        raise TypeError(errors.sentence("certify", "batch", "with pre-padded features", "post-padded ones", remedy))
    data = {name: _arrays(str(name), value) for name, value in dict(batch.data).items()}
    lengths = {name: np.asarray(value) for name, value in batch.lengths.items()}
    counted_features = [
        name for name, own in lengths.items() if (own.sum(), (own > 0).sum()) == (counts.tokens, counts.sequences)
    ]
    if not counted_features:
        remedy = "Make it by PaddedBatches(..., accumulation_steps=1, backend='local')."
        raise ValueError(errors.sentence("certify", "batch.counts", counts, "those of its own rows", remedy))
    tokens = counted_features[0]
    fields = {"data": data, "features": lengths, "lengths": lengths[tokens], "indices": np.asarray(batch.indices)}
    fields.update({name: data[name] for name in ("x", "y", "sample_weight") if needed and name in data})

    def counted(case: rows.Fields) -> rows.Fields:
        every = np.ones(rows.number_of(case))  # on each row, so that all replicas have the counts
        totals = {"tokens": case["lengths"].sum() * every, "sequences": (case["lengths"] > 0).sum() * every}
        return {**case, "totals": totals}

    def form(case: rows.Fields) -> Any:
        own = tf.cast([tf.reduce_sum(case["lengths"]), tf.reduce_sum(tf.sign(case["lengths"]))], tf.float64)
        totals = Counts(case["totals"]["tokens"][0], case["totals"]["sequences"][0], own)
        inputs = LossInputs(case["lengths"], (), totals)
        lengths = {**case["features"], tokens: case["lengths"]}
        return type(batch)(case["data"], lengths, tf.shape(case["indices"])[0], totals, case["indices"], inputs)

    fields = tf.nest.map_structure(lambda array: array[real], fields)
    _check(fields, needed)
    return Given(fields, form, counted)


def _arrays(name: str, value: Any) -> Any:
    """A field as an array or a nest of arrays."""
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        kind = type(value).__name__
        raise TypeError(errors.sentence("certify", f"batch[{name!r}]", f"a {kind}", "an array", "Use distpad.pad."))
    arrays = tf.nest.map_structure(np.asarray, precision.as_tensor(value, widen=False))
    for array in tf.nest.flatten(arrays):
        if array.dtype == object and not all(isinstance(item, (str, bytes)) for item in array.flat):
            remedy = "Under a strategy, give the rows of all replicas together."
            raise TypeError(errors.sentence("certify", f"batch[{name!r}]", type(value).__name__, "an array", remedy))
    return arrays
