"""pad_to_global_max and gather: nests of tensors padded alike on all replicas, after one all-gather of lengths."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import backends, errors, precision
from distpad.collectives import checked, dataset, nests, shapes
from distpad.padding import Padded, on_tensorflow
from distpad.padding.buckets import Buckets

_MOST_INNER_AXES = nests.MOST_AXES - 2  # all axes but the rows and the padded axis


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
    r"""Pad each replica's tensors at the end, to the longest of all replicas.

    The padded length is :math:`L = \max_r L_r` over all replicas r, rounded up by ``buckets``. So gathers and compiled
    functions that follow have one shape on all replicas. A replica may have no rows, or length 0.

    Args:
      tensors: a tensor ``[batch, length, ...]`` of any dtype and of rank 8 at most, or a nest of tensors.
      axis: the axis to pad, an integer or a nest of integers like ``tensors``.
      value: the padding value, a scalar of the tensor's dtype or a nest of scalars.
      lengths: the valid length of each row, ``[batch]`` integers from 0 to the size of ``axis``, or a nest of them.
        None: each row is valid as a whole.
      buckets: a ``distpad.Buckets``, which rounds the global length up to a boundary; None: no rounding.
      backend: see ``distpad.backends.resolve``; None: detected.

    Returns:
      ``Padded(values, lengths, mask)`` of nests like ``tensors``: values with size L on ``axis``, lengths ``[batch]``
      int32, and mask, bool of the shape of values up to and including ``axis``. L is equal on all replicas; the rows
      are those of this replica.

    Raises:
      ValueError: on all replicas: ranks or dtypes differ between replicas, an axis is out of range, lengths have
        another number of rows or are out of range, or L is above the last boundary of the buckets. Inside a
        ``tf.function`` a ``tf.errors.InvalidArgumentError``.
      TypeError: ``tensors`` holds no tensor, ``value`` is not of its dtype, or ``buckets`` is no Buckets.

    Collective: all replicas call this the same number of times; one all-reduce for any number of tensors.

    >>> labels = tf.constant([[1, 2], [3, 0]])
    >>> padded = pad_to_global_max({"label": labels}, lengths={"label": [2, 1]}, buckets=Buckets([4]))
    >>> padded.values["label"].numpy().tolist(), padded.mask["label"].numpy().tolist()[1]
    ([[1, 2, 0, 0], [3, 0, 0, 0]], [True, False, False, False])
    """
    function = "pad_to_global_max"
    resolved = backends.resolve(backend, function=function)
    if not isinstance(buckets, (Buckets, type(None))):
        raise TypeError(errors.sentence(function, "buckets", errors.shown(buckets), "a distpad.Buckets"))
    leaves, argument_error = nests.leaves_of(function, tensors, axis, value, lengths)
    longest, *_ = _gather_shapes(resolved, function, leaves, argument_error, buckets, rows=None, gathers=False)
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
    """Gather the rows of all replicas, padded alike; with ``indices``, the rows of many steps in data set order.

    Without ``indices``, each replica calls this in the step, and gets the rows of this step in replica order. With
    ``indices``, each worker calls this after its loop, with lists of one item a step. The steps then need no collective
    of their own, and their lengths may differ.

    Args:
      tensors: as in ``pad_to_global_max``, but of numbers or bools; with ``indices`` a list of them, one a step, as
        ``strategy.run`` returned them. With ``indices``, tensors ``[batch]`` are gathered unpadded, with lengths of 1.
      axis, value, backend: as in ``pad_to_global_max``; ``axis`` is at least 1.
      lengths: as in ``pad_to_global_max``; with ``indices`` a list of them, one a step.
      rows: the number of leading rows of this replica to gather, a scalar integer from 0 to ``batch``; None: all rows.
      indices: a list of ``[batch]`` integers, one a step, such as ``Batch.indices``: the example index of each row.
        Rows of index -1 are filler rows, which are dropped. Rows of several workers with the same index follow in
        worker order. So the rows of ``dataset.shard(num_workers, worker_index)`` return to the order of ``dataset``. If
        all workers read the whole data set (``replicated=True``), write ``backend="local"``.

    Returns: ``Padded(values, lengths, mask)`` of nests like ``tensors``, ``[rows of all replicas, ...]``, equal on all
      replicas. With ``indices``, padded to the longest row, and equal on all workers.

    Raises:
      ValueError: as ``pad_to_global_max``; ``rows`` is out of range. With ``indices``, on all workers: no steps;
        different numbers of tensors, lengths and indices; an index twice; dtypes or inner axes that differ between
        workers.
      TypeError: as ``pad_to_global_max``; tensors of strings, which no engine gathers; ``rows`` is no integer.

    Collective: all replicas call this the same number of times; one all-reduce of lengths, then two all-gathers for
    each tensor, of values and of lengths. With ``indices``, among workers: an all-gather of sizes, and one of rows.

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
            raise ValueError(
                errors.sentence(function, "rows", "given", "none with indices, where -1 marks a filler row")
            )
        return dataset.assemble(function, resolved, tensors, axis, value, lengths, indices)
    leaves, argument_error = nests.leaves_of(function, tensors, axis, value, lengths, numbers=True)
    if argument_error is None and any(leaf.axis == 0 for leaf in leaves):
        expected = "an axis after the first, which holds the rows"
        argument_error = ValueError(errors.sentence(function, "axis", axis, expected))
    longest, kept, total = _gather_shapes(resolved, function, leaves, argument_error, None, rows, gathers=True)
    gathered = []
    for leaf, to in zip(leaves, longest):
        padded = _pad(leaf, to)
        values = _gather_rows(resolved, padded.values[:kept], total)
        counts = _gather_rows(resolved, padded.lengths[:kept], total)
        gathered.append(Padded(values, counts, on_tensorflow.mask_of(tf, values, leaf.axis, counts)))
    return _packed(tensors, gathered)


def _gather_shapes(
    backend: backends.Backend,
    function: str,
    leaves: list[nests.Leaf],
    argument_error: Exception | None,
    buckets: Buckets | None,
    rows: Any,
    gathers: bool,
) -> tuple[list[tf.Tensor], Any, tf.Tensor]:
    """Gather the shapes of all leaves at once, and check them.

    Returns: the padded length of each leaf; the number of rows to keep on this replica; its sum over all replicas.
    """
    checks, columns = [], []
    for leaf in leaves:
        rank, axis = leaf.tensor.shape.rank, leaf.axis
        in_range = 0 <= axis < rank
        size = tf.shape(leaf.tensor)[axis] if in_range else 0
        count, as_many = _count(leaf)
        inner = [tf.shape(leaf.tensor)[i] for i in range(1, rank) if i != axis] if gathers else []
        # the same number of sizes for any rank, since all replicas send payloads of one size
        inner = [*inner, *[-1] * _MOST_INNER_AXES][:_MOST_INNER_AXES]
        columns.append([size, rank, leaf.tensor.dtype.as_datatype_enum, in_range, *inner])
        text = f"lengths of tensors{leaf.where} are not as many as the rows, expected one a row"
        checks.append(checked.Check(text, count, as_many))
        checks += shapes.length_checks(leaf.lengths, None if leaf.lengths is None else size)
    first = tf.shape(leaves[0].tensor)[0] if leaves[0].tensor.shape.rank else 0
    for leaf in leaves[1:] if gathers else ():
        count = tf.shape(leaf.tensor)[0] if leaf.tensor.shape.rank else first
        text = f"tensors{leaf.where} have other numbers of rows than the first tensor, expected the same in all"
        checks.append(checked.Check(text, (count, first), tf.equal(count, first)))
    try:
        rows = first if rows is None else _integer(function, rows)
    except TypeError as error:
        rows, argument_error = first, argument_error or error
    text = "rows are out of range, expected 0 to the rows of this replica"
    checks.append(checked.Check(text, rows, _within(rows, first)))
    table = checked.all_gather(backend, function, [*itertools.chain(*columns), rows], checks, argument_error)
    tables = tf.reshape(table[:, :-1], [-1, len(leaves), len(columns[0])])
    gathered = []
    for i, leaf in enumerate(leaves):
        name, found = f"tensors{leaf.where}", tables[:, i]
        text = f"{name} have inner axes that differ, expected the same on all replicas (found: sizes; -1: no axis)"
        gathered += [
            checked.equal_check(f"{name} have ranks that differ, expected the same on all replicas", found[:, 1:2]),
            checked.equal_check(f"{name} have dtypes that differ, expected the same on all", found[:, 2:3]),
            checked.Check(
                f"axis of {name} is out of range for their rank", found[:, 1:2], tf.reduce_all(found[:, 3] > 0)
            ),
            checked.equal_check(text, found[:, 4:]),
        ]
    ok = checked.check_gathered(function, gathered)
    if ok is not True:  # all that follows waits for the assertion; NaN inside XLA, which drops it
        tables = tf.where(ok, tables, tf.constant(np.nan, tf.float64))
    longest = [_bucketed(backend, function, tf.reduce_max(tables[:, i, 0]), buckets) for i in range(len(leaves))]
    return longest, rows, tf.cast(tf.reduce_sum(table[:, -1]), tf.int32)


def _count(leaf: nests.Leaf) -> tuple[Any, Any]:
    """Return the number of lengths of a leaf, and whether it is the number of its rows."""
    if leaf.lengths is None or not leaf.tensor.shape.rank:
        return 0, True
    count = tf.shape(leaf.lengths)[0]
    return count, tf.equal(count, tf.shape(leaf.tensor)[0])


def _integer(function: str, rows: Any) -> tf.Tensor:
    rows = precision.to_tensor(rows, f"{function}: rows")
    if rows.shape.rank != 0 or not rows.dtype.is_integer:
        given = f"of shape {tuple(rows.shape)} and dtype {rows.dtype.name}"
        raise TypeError(errors.sentence(function, "rows", given, "one integer"))
    return rows


def _gather_rows(backend: backends.Backend, values: tf.Tensor, total: tf.Tensor) -> tf.Tensor:
    """Gather the rows of all replicas, ``total`` rows; a dtype that no engine carries travels as another dtype.

    Rows travel as ``[rows, elements]``. If no replica has rows, one row of one element travels, since TensorFlow's
    gather crashes among workers that send no rows.
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
    """Return the smallest boundary that is at least ``length``, in a graph too.

    A length of NaN, from a check that fails inside XLA, gives -1, to which no tensor can be padded.
    """
    length = tf.cast(tf.where(tf.math.is_nan(length), tf.constant(-1, length.dtype), length), tf.int32)
    if buckets is None:
        return length
    listed = buckets.boundaries
    if buckets.beyond == "quarters":  # all boundaries of int32, since a graph computes none
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
    tensor, axis, lengths = leaf.tensor, leaf.axis, leaf.lengths
    if not 0 <= axis < tensor.shape.rank:  # only while tracing: the checks refuse this axis in the run
        return Padded(tensor, tf.zeros([0], tf.int32), tf.zeros([0], tf.bool))
    if lengths is not None and axis > 0:
        lengths = shapes.broadcast(shapes.Source("lengths", lengths), shapes.sizes_of(tensor, 1))[0]
    return Padded(*on_tensorflow.pad_axis(tf, tensor, axis, to, leaf.value, lengths))


def _packed(like: Any, padded: list[Padded]) -> Padded:
    """Pack a list of Padded into one Padded of nests."""
    return Padded(*(tf.nest.pack_sequence_as(like, list(column)) for column in zip(*padded)))
