"""pad_to_global_max and gather: nests of tensors made alike on all replicas, over one exchange of their lengths."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import backends, errors
from distpad.collectives import checked, dataset, nests, shapes
from distpad.padding import Padded
from distpad.padding.buckets import Buckets

_MOST_INNER_AXES = nests.MOST_AXES - 2  # all but the rows and the axis that is padded


@tf.autograph.experimental.do_not_convert
def pad_to_global_max(
    tensors: Any,
    *,
    axis: Any = 1,
    value: Any = 0,
    lengths: Any = None,
    buckets: Buckets | None = None,
    backend: Any = None,
) -> Padded:
    """Pad each replica's tensors to the longest of all replicas, behind what is there.

    Every replica gets the same padded length, so that what follows (gathers, compiled functions) has one shape
    everywhere. A replica without rows, or of length 0, takes part like the others.

    Args:
      tensors: a tensor ``[batch, length, ...]`` or a nest of them.
      axis: the axis that is padded, an int or a nest of them like ``tensors``.
      value: what it is padded with, a number or a nest of them.
      lengths: the real length of each row, ``[batch]`` integers, or a nest of them (None: all of that tensor is
        real).
      buckets: rounds the agreed length up to a boundary.
      backend: left out, it is detected (``distpad.backends.resolve``).

    Returns:
      ``Padded(values, lengths, mask)`` of nests like ``tensors``: values with the global length on ``axis``, lengths
      ``[batch]`` int32, mask bool of the shape of values up to and including ``axis``. The padded length is the same
      on all replicas.

    Raises:
      ValueError: on all replicas, when ranks or dtypes differ between them, an axis is out of range, a length is
        negative or above the tensor's own, or the agreed length is above the buckets' last boundary. Inside a
        ``tf.function`` the same is a ``tf.errors.InvalidArgumentError``.
      TypeError: ``value`` does not fit a tensor's dtype.

    Collective: all replicas call this the same number of times; one all-reduce, however many tensors.

    >>> labels = tf.constant([[1, 2], [3, 0]])
    >>> padded = pad_to_global_max({"label": labels}, lengths={"label": [2, 1]}, buckets=Buckets([4]))
    >>> padded.values["label"].numpy().tolist(), padded.mask["label"].numpy().tolist()[1]
    ([[1, 2, 0, 0], [3, 0, 0, 0]], [True, False, False, False])
    """
    function = "pad_to_global_max"
    resolved = backends.resolve(backend, function=function)
    if not isinstance(buckets, (Buckets, type(None))):
        raise TypeError(errors.sentence(function, "buckets", repr(buckets), "a distpad.Buckets"))
    leaves, argument_error = nests.leaves_of(function, tensors, axis, value, lengths)
    longest, *_ = _agree(resolved, function, leaves, argument_error, buckets, rows=None, gathers=False)
    return _packed(tensors, [_pad(leaf, to) for leaf, to in zip(leaves, longest)])


@tf.autograph.experimental.do_not_convert
def gather(
    tensors: Any,
    *,
    axis: Any = 1,
    value: Any = 0,
    lengths: Any = None,
    rows: Any = None,
    indices: Any = None,
    backend: Any = None,
) -> Padded:
    """Gather all replicas' rows, padded alike; with ``indices``, those of many steps in the order of the data set.

    Without ``indices`` it is called in the step, and returns the step's rows in replica order. With them it is called
    by each worker behind its loop, with lists of what the steps took and returned: steps need no collective of their
    own, and may differ in length.

    Args:
      tensors: as in ``pad_to_global_max``; with ``indices`` a list of them, one a step, as ``strategy.run`` returned
        them. Tensors ``[batch]`` may then be among them, which nothing is padded of: their lengths are 1.
      axis, value, backend: as in ``pad_to_global_max``; ``axis`` is at least 1.
      lengths: as in ``pad_to_global_max``; with ``indices`` a list of them, one a step.
      rows: how many leading rows of this replica are real, an integer; the others are dropped. None: all.
      indices: a list of ``[batch]`` integers, one a step, such as ``Batch.indices``: the place of each row in the
        data set. Rows of index -1 are filling, and are dropped. Rows that several workers hold at the same place come
        in worker order, so that a data set that was dealt by ``dataset.shard(num_workers, worker_index)`` is in its own
        order again. Where all workers read all of it (``replicated=True``), write ``backend="local"``.

    Returns: ``Padded(values, lengths, mask)`` of nests like ``tensors``, ``[rows of all replicas, ...]``, the same on
      all replicas. With ``indices`` padded to the longest row, the same on all workers.

    Raises: as ``pad_to_global_max``, and when ``rows`` is negative or above the rows that are there; TypeError for
      tensors of strings, which no engine gathers. With ``indices``
      ValueError or TypeError on all workers, when on one of them there are no steps, or not as many of tensors, lengths
      and indices; an index twice; or other dtypes or inner axes than elsewhere.

    Collective: one all-reduce for the lengths, then a gather of values and one of lengths for each tensor. With
    ``indices``, among workers: an exchange of sizes, and one of all rows.

    >>> gather(tf.constant([[1, 2], [3, 4]]), rows=1).values.numpy().tolist()
    [[1, 2]]
    >>> steps = [tf.constant([[5, 5, 5], [6, 0, 0]]), tf.constant([[7, 8], [0, 0]])]
    >>> gather(steps, lengths=[[3, 1], [2, 0]], indices=[[2, 0], [1, -1]]).values.numpy().tolist()
    [[6, 0, 0], [7, 8, 0], [5, 5, 5]]
    """
    function = "gather"
    resolved = backends.resolve(backend, function=function)
    if indices is not None:
        if rows is not None:
            raise ValueError(errors.sentence(function, "rows", "given", "none with indices, where -1 is filling"))
        return dataset.assemble(function, resolved, tensors, axis, value, lengths, indices)
    leaves, argument_error = nests.leaves_of(function, tensors, axis, value, lengths, numbers=True)
    if argument_error is None and any(leaf.axis == 0 for leaf in leaves):
        expected = "an axis behind the first, which holds the rows that are gathered"
        argument_error = ValueError(errors.sentence(function, "axis", axis, expected))
    longest, kept, total = _agree(resolved, function, leaves, argument_error, None, rows, gathers=True)
    gathered = []
    for leaf, to in zip(leaves, longest):
        padded = _pad(leaf, to)
        values = _gather_rows(resolved, padded.values[:kept], total)
        counts = _gather_rows(resolved, padded.lengths[:kept], total)
        gathered.append(Padded(values, counts, _mask(values, leaf.axis, counts)))
    return _packed(tensors, gathered)


def _agree(
    backend: backends.Backend,
    function: str,
    leaves: list[nests.Leaf],
    argument_error: Exception | None,
    buckets: Buckets | None,
    rows: Any,
    gathers: bool,
) -> tuple[list[tf.Tensor], Any, tf.Tensor]:
    """Exchange all lengths at once; returns the padded length of each leaf, the rows to keep of this replica, and their
    sum over all replicas."""
    checks, columns = [], []
    for leaf in leaves:
        rank, axis = leaf.tensor.shape.rank, leaf.axis
        in_range = 0 <= axis < rank
        size = tf.shape(leaf.tensor)[axis] if in_range else 0
        count, as_many = _count(leaf)
        inner = [tf.shape(leaf.tensor)[i] for i in range(1, rank) if i != axis] if gathers else []
        # as many numbers for any rank, since the payloads of all replicas have the same size
        inner = [*inner, *[-1] * _MOST_INNER_AXES][:_MOST_INNER_AXES]
        columns.append([size, rank, leaf.tensor.dtype.as_datatype_enum, in_range, *inner])
        text = f"lengths of tensors{leaf.where} are expected to be as many as their rows"
        checks.append(checked.Check(text, count, as_many))
        checks += shapes.length_checks(leaf.lengths, None if leaf.lengths is None else size)
    first = tf.shape(leaves[0].tensor)[0] if leaves[0].tensor.shape.rank else 0
    try:
        rows = first if rows is None else _whole_number(function, rows)
    except TypeError as error:
        rows, argument_error = first, argument_error or error
    text = "rows are expected to be from 0 to the rows that are there"
    checks.append(checked.Check(text, rows, _within(rows, first)))
    table = checked.all_gather(backend, function, [*itertools.chain(*columns), rows], checks, argument_error)
    tables = tf.reshape(table[:, :-1], [-1, len(leaves), len(columns[0])])
    gathered = []
    for i, leaf in enumerate(leaves):
        what, found = f"tensors{leaf.where}", tables[:, i]
        text = f"{what} have inner axes that differ, expected the same on all replicas (found: sizes; -1: no axis)"
        gathered += [
            checked.alike(f"{what} have ranks that differ, expected the same on all replicas", found[:, 1:2]),
            checked.alike(f"{what} have dtypes that differ, expected the same on all", found[:, 2:3]),
            checked.Check(
                f"axis of {what} is out of range for their rank", found[:, 1:2], tf.reduce_all(found[:, 3] > 0)
            ),
            checked.alike(text, found[:, 4:]),
        ]
    ok = checked.check_gathered(function, gathered)
    if ok is not True:  # what follows waits for the assertion; XLA has none
        tables = tf.where(ok, tables, tf.constant(np.nan, tf.float64))
    longest = [_bucketed(backend, function, tf.reduce_max(tables[:, i, 0]), buckets) for i in range(len(leaves))]
    return longest, rows, tf.cast(tf.reduce_sum(table[:, -1]), tf.int32)


def _count(leaf: nests.Leaf) -> tuple[Any, Any]:
    """How many lengths a leaf has, and whether it has as many rows."""
    if leaf.lengths is None or not leaf.tensor.shape.rank:
        return 0, True
    count = tf.shape(leaf.lengths)[0]
    return count, tf.equal(count, tf.shape(leaf.tensor)[0])


def _whole_number(function: str, rows: Any) -> tf.Tensor:
    rows = tf.convert_to_tensor(rows)
    if rows.shape.rank != 0 or not rows.dtype.is_integer:
        given = f"of shape {tuple(rows.shape)} and dtype {rows.dtype.name}"
        raise TypeError(errors.sentence(function, "rows", given, "one integer"))
    return rows


def _gather_rows(backend: backends.Backend, values: tf.Tensor, total: tf.Tensor) -> tf.Tensor:
    """All replicas' rows, ``total`` of them, of any dtype: those that no engine carries travel as another.

    They travel as ``[rows, elements]``; where no replica has any, one row of one element travels, since TensorFlow's
    gather crashes among workers that have nothing to send.
    """
    if values.dtype.is_complex:
        parts = tf.stack([tf.math.real(values), tf.math.imag(values)], axis=-1)
        return tf.complex(*tf.unstack(_gather_rows(backend, parts, total), num=2, axis=-1))
    signed = {tf.uint32: tf.int32, tf.uint64: tf.int64}.get(values.dtype)
    if signed is not None:
        return tf.bitcast(_gather_rows(backend, tf.bitcast(values, signed), total), values.dtype)
    shape, total = tf.shape(values, tf.int64), tf.cast(total, tf.int64)
    size = tf.reduce_prod(shape[1:])
    flat = tf.reshape(values, [shape[0], size])[:, : tf.where(total > 0, size, tf.minimum(size, 1))]
    more = [[0, tf.cast(total == 0, tf.int32)], [0, tf.cast(size == 0, tf.int32)]]
    rows = backend.all_gather_rows(tf.pad(flat, more))[:total, :size]
    rows = tf.reshape(rows, tf.concat([[total], shape[1:]], axis=0))
    return tf.ensure_shape(rows, [None, *values.shape[1:]])


def _within(rows: Any, limit: Any) -> tf.Tensor:
    rows = tf.cast(rows, tf.int64)
    return tf.logical_and(rows >= 0, rows <= tf.cast(limit, tf.int64))


def _bucketed(backend: backends.Backend, function: str, length: tf.Tensor, buckets: Buckets | None) -> tf.Tensor:
    """The boundary at or above an agreed length, in the graph too. -1, which no tensor can be padded to, where a check
    failed whose assertion XLA dropped."""
    length = tf.cast(tf.where(tf.math.is_nan(length), tf.constant(-1, length.dtype), length), tf.int32)
    if buckets is None:
        return length
    listed = buckets.boundaries
    if buckets.beyond == "quarters":  # as far as int32 goes: a graph has no loop for the rest
        listed = tuple(itertools.takewhile(lambda size: size < 2**31, map(buckets.boundary, itertools.count())))
    boundaries, last = tf.constant(listed), listed[-1]
    above = -(-length // last) * last
    if buckets.beyond != "multiples":
        above = tf.constant(-1)
        check = checked.Check(
            f"length is above the last boundary of the buckets, expected at most {last}", length, length <= last
        )
        checked.check_locally(backend, function, [check])
    at = tf.minimum(tf.searchsorted(boundaries, [length])[0], len(listed) - 1)
    return tf.where(length < 0, -1, tf.where(length <= last, boundaries[at], above))


def _pad(leaf: nests.Leaf, to: tf.Tensor) -> Padded:
    tensor, axis = leaf.tensor, leaf.axis
    if not 0 <= axis < tensor.shape.rank:  # being traced; the exchange has refused it
        return Padded(tensor, tf.zeros([0], tf.int32), tf.zeros([0], tf.bool))
    shape = tf.shape(tensor)
    behind = tf.one_hot(axis, tensor.shape.rank, on_value=to - shape[axis], off_value=0, dtype=tf.int32)
    values = tf.pad(tensor, tf.stack([tf.zeros_like(behind), behind], axis=1), constant_values=leaf.value)
    values.set_shape([None if i == axis else size for i, size in enumerate(tensor.shape)])
    lengths = leaf.lengths
    if lengths is None:
        lengths = tf.fill(shape[: min(axis, 1)], shape[axis])
    elif axis > 0:
        lengths = shapes.broadcast(shapes.Source("lengths", lengths), shapes.sizes_of(tensor, 1))[0]
    lengths = tf.cast(lengths, tf.int32)
    return Padded(values, lengths, _mask(values, axis, lengths))


def _mask(values: tf.Tensor, axis: int, lengths: tf.Tensor) -> tf.Tensor:
    """True on real elements: the shape of values up to and including ``axis``."""
    shape = tf.shape(values)
    mask = tf.sequence_mask(lengths, shape[axis])
    middle = [1] * (axis - 1)
    mask = tf.reshape(mask, tf.concat([shape[: min(axis, 1)], middle, [shape[axis]]], 0))
    return tf.broadcast_to(mask, shape[: axis + 1])


def _packed(like: Any, padded: list[Padded]) -> Padded:
    """A list of Padded as one Padded of nests."""
    return Padded(*(tf.nest.pack_sequence_as(like, list(column)) for column in zip(*padded)))
