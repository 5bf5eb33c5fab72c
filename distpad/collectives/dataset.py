"""Assembly: the rows of all steps of all workers, in the order of the data set."""

from __future__ import annotations

import io
import json
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors
from distpad.backends import messages
from distpad.collectives import nests
from distpad.padding import Padded, columns


class _Rows(NamedTuple):
    """A worker's rows.

    Attributes:
      indices: the example index of each row, int64.
      columns: the real elements of each tensor of the nest; none on a worker with an argument error.
      leaves: the arguments, on this worker alone.
    """

    indices: np.ndarray
    columns: list[columns.Column]
    leaves: list[nests.Leaf]


def assemble(
    function: str, backend: backends.Backend, steps: Any, axis: Any, value: Any, lengths: Any, indices: Any
) -> Padded:
    """``gather`` with indices. Errors of one worker travel in the all-gather, so that all workers raise together."""
    argument_error: Exception | None = None
    mine = _Rows(np.zeros(0, np.int64), [], [])
    try:
        mine = _rows(function, backend, steps, axis, value, lengths, indices)
    except Exception as error:  # any error, so that no other worker waits for this one
        argument_error = error
    headers, parts = zip(*map(_unpacked, backend.host_all_gather_bytes(_packed(mine, argument_error))))
    if argument_error is not None:
        raise argument_error
    for worker, header in enumerate(headers):
        if header["argument_error"]:
            message = header["argument_error"].removeprefix(f"{function}: ")
            raise ValueError(f"{function}: worker {worker} refused its arguments: {message}")
        if header["columns"] != headers[0]["columns"]:
            found = f"{header['columns']} on worker {worker}"
            expected = f"{headers[0]['columns']}, as on worker 0"
            raise ValueError(errors.sentence(function, "dtypes and inner axes of tensors", found, expected))
    workers = np.repeat(np.arange(len(parts)), [len(part.indices) for part in parts])
    order = np.lexsort((workers, np.concatenate([part.indices for part in parts])))
    padded = []
    for i, leaf in enumerate(mine.leaves):
        padded.append(_padded(leaf, columns.concatenate([part.columns[i] for part in parts]).take(order)))
    return Padded(*(tf.nest.pack_sequence_as(steps[0], list(column)) for column in zip(*padded)))


def _rows(
    function: str, backend: backends.Backend, steps: Any, axis: Any, value: Any, lengths: Any, indices: Any
) -> _Rows:
    """Return this worker's rows, without filler rows. Raises: TypeError, ValueError."""
    lengths = [None] * len(steps) if lengths is None and isinstance(steps, (list, tuple)) else lengths
    for name, given in (("tensors", steps), ("lengths", lengths), ("indices", indices)):
        if not isinstance(given, (list, tuple)):
            raise TypeError(errors.sentence(function, name, f"a {type(given).__name__}", "a list with one item a step"))
        if len(given) != len(steps) or not given:
            expected = f"{len(steps) or 'at least one'}, one a step"
            raise ValueError(errors.sentence(function, f"the number of {name}", len(given), expected))
    found, pieces = [], []
    leaves: list[nests.Leaf] = []
    for each in zip(steps, lengths, indices):
        if errors.is_deep(each):
            raise ValueError(
                errors.sentence(function, "an item", "nested more than 32 times", "a short nest of tensors")
            )
        tensors, lengths_here, indices_here = (_on_replicas(backend, item) for item in each)
        lengths_here = lengths_here or [None] * len(tensors)
        if not len(tensors) == len(lengths_here) == len(indices_here):
            sizes = f"of {len(tensors)}, {len(lengths_here)} and {len(indices_here)} replicas"
            remedy = "Give the results of strategy.run, and the batch's own lengths and indices."
            raise ValueError(errors.sentence(function, "tensors, lengths and indices", sizes, "of as many", remedy))
        for nest, counts, own in zip(tensors, lengths_here, indices_here):
            leaves, argument_error = nests.leaves_of(function, nest, axis, value, counts, numbers=True)
            if argument_error is not None:
                raise argument_error
            own = _indices(function, own)
            found.append(own[own >= 0])
            pieces.append([_cut(function, leaf, own) for leaf in leaves])
    kept = np.concatenate(found)
    unique, times = np.unique(kept, return_counts=True)
    if np.any(times > 1):
        twice = f"{unique[times > 1][0]} in several rows of worker {backend.worker_index}"
        raise ValueError(errors.sentence(function, "indices", twice, "each once", "Gather one epoch at a time."))
    return _Rows(kept, [*map(columns.concatenate, zip(*pieces))], leaves)


def _on_replicas(backend: backends.Backend, item: Any) -> list[Any]:
    return [] if item is None else backend.local_results(item)


def _indices(function: str, given: Any) -> np.ndarray:
    indices = np.asarray(given)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        found = f"of shape {indices.shape} and dtype {indices.dtype.name}"
        raise TypeError(errors.sentence(function, "an item of indices", found, "[batch] integers"))
    return indices.astype(np.int64)


def _cut(function: str, leaf: nests.Leaf, indices: np.ndarray) -> columns.Column:
    """Return the real elements of the rows that are no filler rows, with the padded axis first."""
    values, name = leaf.tensor.numpy(), f"tensors{leaf.where}"
    if values.ndim == 0 or len(values) != len(indices):
        raise ValueError(errors.sentence(function, f"the shape of {name}", values.shape, f"[{len(indices)}, ...]"))
    if values.ndim == 1:
        return columns.Column(values[indices >= 0], (np.arange(np.sum(indices >= 0) + 1),))
    if not 1 <= leaf.axis < values.ndim:
        raise ValueError(errors.sentence(function, f"axis of {name}", leaf.axis, f"1 to {values.ndim - 1}"))
    values = np.moveaxis(values, leaf.axis, 1)
    lengths = _lengths(leaf, values.shape[:2])
    if np.any((lengths < 0) | (lengths > values.shape[1])):
        expected = f"0 to {values.shape[1]}, the size of the axis"
        raise ValueError(errors.sentence(function, f"lengths of {name}", lengths.tolist(), expected))
    lengths = np.where(indices >= 0, lengths, 0)
    real = columns.real(lengths, values.shape[1])
    return columns.Column(values[real], (columns.offsets(lengths[indices >= 0]),))


def _lengths(leaf: nests.Leaf, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape[0], shape[1], np.int64) if leaf.lengths is None else leaf.lengths.numpy().astype(np.int64)


def _padded(leaf: nests.Leaf, column: columns.Column) -> Padded:
    """Return all rows, padded to the longest."""
    lengths = np.diff(column.splits[0])
    lengths_in_order = tf.constant(lengths, tf.int32)
    if leaf.tensor.shape.rank == 1:
        return Padded(tf.constant(column.values), lengths_in_order, tf.ones([len(lengths)], tf.bool))
    shape = (lengths.max(initial=0), *column.values.shape[1:])
    values = columns.blank(len(lengths), shape, leaf.value.numpy(), column.values.dtype)
    columns.fill(values, column)
    mask = np.expand_dims(columns.mask(column, values.shape[:2]), tuple(range(1, leaf.axis)))
    values = np.moveaxis(values, 1, leaf.axis)
    return Padded(
        tf.constant(values), lengths_in_order, tf.constant(np.broadcast_to(mask, values.shape[: leaf.axis + 1]))
    )


def _packed(rows: _Rows, argument_error: Exception | None) -> bytes:
    """Encode rows as bytes, with TensorFlow's names of dtypes, since NumPy cannot read the bfloat16 that it writes."""
    shapes = [[tf.as_dtype(column.values.dtype).name, list(column.values.shape[1:])] for column in rows.columns]
    header = json.dumps({"argument_error": str(argument_error or ""), "columns": shapes})
    arrays = {"header": np.frombuffer(header.encode(), np.uint8), "indices": rows.indices}
    for i, (values, (splits,)) in enumerate(rows.columns):
        arrays |= {f"values{i}": np.frombuffer(values.tobytes(), np.uint8), f"splits{i}": splits}
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type] # mypy takes the names for options of savez
    return file.getvalue()


def _unpacked(given: bytes) -> tuple[dict[str, Any], _Rows]:
    """Decode a worker's header and rows."""
    with messages.checked("the rows"):
        arrays = np.load(io.BytesIO(given), allow_pickle=False)
        header = json.loads(arrays["header"].tobytes())
        found = []
        for i, (dtype, inner) in enumerate(header["columns"]):
            values = np.frombuffer(arrays[f"values{i}"].tobytes(), tf.as_dtype(dtype).as_numpy_dtype)
            splits = arrays[f"splits{i}"]
            found.append(columns.Column(values.reshape([int(splits[-1]), *inner]), (splits,)))
        return header, _Rows(arrays["indices"], found, [])
