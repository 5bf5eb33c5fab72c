"""Collation: the padder, which makes batches of planned steps in a thread and moves them to their devices."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from distpad import backends, errors
from distpad.collectives.shapes import PreLengths
from distpad.data import plan, reader
from distpad.data.config import Config
from distpad.data.schema import Feature, Features, Pad
from distpad.data.stats import PaddingStats
from distpad.data.structure import Name, as_key
from distpad.losses.counts import Counts, LossInputs, WeightedCounts
from distpad.padding import columns, memory
from distpad.padding.columns import Column

_AHEAD = 4  # batches that are on their devices before their step
# Between a step's batch and its launch the training needs Python's interpreter lock. While batches are ready, the
# padder waits until the step runs in C++, instead of competing for the lock.
_PAUSE_S = 0.0005


class Batch(NamedTuple):
    """One replica's input for one step, as tensors. Under a strategy every leaf holds a value for each replica.

    Attributes:
      data: the features in the structure of an example, each ``[batch_size, *shape]``, padded on ragged axes.
      lengths: for each padded feature ``[batch_size]`` int32, along its first ragged axis; of a pre-padded feature
        ``PreLengths``.
      rows: int32 scalar, the number of real rows; the rows after them are filler rows.
      counts: ``Counts`` over all replicas and all micro-batches of the optimiser step, float64 scalars: the loss's
        ``denominator``. A mapping by loss if ``tokens`` is a mapping.
      indices: ``[batch_size]`` int64, each row's example index in the source, -1 for filler rows.
      loss_inputs: ``LossInputs``, the lengths, weights and counts for the loss's ``batch`` argument. A mapping by loss
        if ``tokens`` is a mapping.

    >>> Batch(data={}, lengths={}, rows=0, counts=Counts(0.0, 0.0), indices=[]).rows
    0
    """

    data: Any
    lengths: Any
    rows: Any
    counts: Any
    indices: Any
    loss_inputs: Any = None


class Order(NamedTuple):
    """A planned step to make a batch of; ``batch_size`` is for a worker without examples."""

    micro: reader.MicroBatch | None  # None if this worker has no more examples
    step: plan.StepPlan
    features: Features
    batch_size: int


class Padder:
    """Makes ordered batches in a thread, a few ahead of the consumer. ``close`` ends the thread.

    Args:
      to_device: makes an element from the replicas' batches in NumPy.
    """

    def __init__(
        self,
        backend: backends.Backend,
        config: Config,
        stats: PaddingStats,
        to_device: Callable[[Features, Sequence[Batch]], Any],
    ) -> None:
        self._backend, self._config, self._stats, self._to_device = backend, config, stats, to_device
        self._last: list[list[Column] | None] = [None] * backend.replicas_here
        # SimpleQueue takes a tenth of the time of Queue and Semaphore, which Python implements
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[None] = queue.SimpleQueue()  # an item for each batch that may be made
        for _ in range(_AHEAD):
            self._free.put(None)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="distpad-padder")
        self._thread.start()

    def order(self, order: Order) -> None:
        self._orders.put(order)

    def take(self) -> Any:
        """Return the next batch in order, or raise the error that making it raised."""
        limit_s = self._config.timeout_s
        try:
            made = self._made.get(timeout=min(limit_s, threading.TIMEOUT_MAX))
        except queue.Empty:  # as in a process that was forked in the middle of an epoch, which has no threads
            raise errors.DistpadError(
                f"PaddedBatches: waited {limit_s:.0f} s for a batch to be padded, expected less than timeout_s."
            ) from None
        self._free.put(None)
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._orders.put(None)
        self._free.put(None)
        self._thread.join()
        # A thread of tf.data may wait for a batch of a loop that another loop has replaced.
        self._made.put(errors.DistpadError("PaddedBatches: this loop was left, and another has begun"))

    def _run(self) -> None:
        while True:
            self._free.get()
            order = self._orders.get()
            if self._made.qsize() >= _AHEAD - 1:
                time.sleep(_PAUSE_S)
            if order is None or self._stopped.is_set():
                return
            try:
                self._made.put(self._make(order))
            except BaseException as error:  # take raises it in the thread of the training
                self._made.put(error)

    def _make(self, order: Order) -> Any:
        if order.micro:
            self._stats.add_truncated(order.micro.lost)
        return self._to_device(order.features, [self._batch(order, r) for r in range(self._backend.replicas_here)])

    def _batch(self, order: Order, replica: int) -> Batch:
        """One replica's batch in NumPy."""
        micro, features, config = order.micro, order.features, self._config
        begin, end = micro.bounds[replica] if micro else (0, 0)
        rows, size = end - begin, micro.batch_size if micro else order.batch_size
        mine = [column.between(begin, end) for column in micro.columns] if micro and rows else []
        if rows:
            self._last[replica] = [column.between(rows - 1, rows) for column in mine]
        last = self._last[replica] or blank_row(features.features)
        sizes = dict(zip(config.axes, order.step.sizes))
        padded, losses = len(config.padding), len(config.tokens)
        arena = memory.Arena((8 + 4 * padded) * size + (1 + padded + losses) * memory.ALIGNMENT)
        counted = {*config.tokens.values()}
        tables = {
            name: micro.sizes[name][begin:end] if micro else np.zeros([0, len(pad.axes)], np.int64)
            for name, pad in config.padding.items()
        }
        values, lengths = collate(features.features, mine, tables, sizes, (rows, size), last, counted, arena)
        named = dict(zip(features.names, values))
        indices = arena.zeros([size], np.int64)
        indices[:rows], indices[rows:] = (micro.indices[replica] if micro else []), -1
        local = micro.local[replica] if micro else np.zeros([len(config.tokens), 2])
        counts = self._counts(order.step, local, arena)
        inputs = {
            loss: LossInputs(
                lengths[name],
                self._weights(loss, mine[features.names.index(name)] if mine else None, named),
                counts[loss],
            )
            for loss, name in config.tokens.items()
        }
        self._stats.add_replica(tables.values(), order.step.agreed, order.step.sizes, size)
        data = features.pack(values)
        return Batch(data, lengths, np.int32(rows), counts.get(None, counts), indices, inputs.get(None, inputs))

    def _counts(self, step: plan.StepPlan, local: np.ndarray, arena: memory.Arena) -> dict[Any, Counts]:
        counts = {}
        for i, (loss, name) in enumerate(self._config.tokens.items()):
            is_weighted = loss in self._config.weights or len(self._config.counted_axes[name]) > 1
            kind = WeightedCounts if is_weighted else Counts
            mine = arena.zeros([2], np.float64)
            mine[:] = local[i]
            counts[loss] = kind(step.tokens[i], step.sequences[i], mine, np.float64(self._backend.num_replicas))
        return counts

    def _weights(self, loss: Any, counted: Column | None, arrays: Mapping[Name, np.ndarray]) -> Any:
        """A replica's sample weights for its loss; ``()`` if lengths alone define the valid positions.

        Args:
          counted: the column of the counted feature; None without rows.
          arrays: the features of the batch.
        """
        name = self._config.tokens[loss]
        axes, weights = self._config.counted_axes[name], self._config.weights.get(loss)
        given = None if weights is None else arrays[weights]
        shape = [len(arrays[name]), *(arrays[name].shape[1 + axis] for axis in axes)]
        if given is not None and given.ndim > 1:
            given = _resized(given, shape, self._config.padding[name])
        if len(axes) == 1:
            return () if given is None else given
        mask = np.zeros(shape, np.float32)
        if counted is not None:
            pad = self._config.padding[name]
            positions, at_end = pad.placed(Column(np.zeros(0), counted.splits[: len(axes)]), shape[1 + pad.axes[0]])
            mask[: counted.num_examples] = columns.mask(positions, [counted.num_examples, *shape[1:]], at_end=at_end)
        if given is None:
            return mask
        given = given.reshape([len(given), *[1] * (len(shape) - given.ndim), *given.shape[1:]])
        return np.where(mask > 0, given, 0).astype(np.float32)  # not a product: padding may be NaN


def _resized(array: np.ndarray, shape: Sequence[int], pad: Pad) -> np.ndarray:
    """The array cut, or padded with zeros, to a shape: weights may have another boundary than their feature."""
    if list(array.shape) == list(shape):
        return array
    resized = np.zeros(shape, array.dtype)
    kept = np.minimum(array.shape[1:], shape[1:]).tolist()
    resized[_box(kept, shape[1:], pad)] = array[_box(kept, array.shape[1:], pad)]
    return resized


def _box(sizes: Sequence[int], shape: Sequence[int], pad: Pad | None) -> tuple[slice, ...]:
    """Where elements of these sizes stand in rows of a shape."""
    at_end = pad.axes[0] if pad and pad.side == "pre" else None
    each = enumerate(zip(sizes, shape))
    return slice(None), *(slice(size - n, None) if axis == at_end else slice(n) for axis, (n, size) in each)


def collate(
    features: Sequence[Feature],
    given: Sequence[Column],
    tables: Mapping[Name, np.ndarray],
    sizes: Mapping[tuple[Name, int], int],
    rows: tuple[int, int],
    last: Sequence[Column],
    counted: Set[Name],
    arena: memory.Arena,
) -> tuple[list[np.ndarray], dict[Name, Any]]:
    """Pad rows to a batch of static shape.

    Args:
      features: the features of the columns.
      given: the columns of a replica; none without rows.
      tables: the sizes of each padded feature's ragged axes in the rows, ``[rows, axes]``.
      sizes: the padded sizes of the ragged axes.
      rows: the real rows, and the rows of the batch.
      last: the row that filler rows repeat, cut to ``sizes``.
      counted: features whose length is 0 in filler rows.
      arena: memory of the lengths.

    Returns:
      For each feature ``[rows, *shape]``, and for each padded feature its lengths ``[rows]`` int32, or
      ``PreLengths`` of them.
    """
    values: list[np.ndarray] = []
    lengths: dict[Name, Any] = {}
    real, size = rows
    for i, feature in enumerate(features):
        shape = [sizes.get((feature.name, axis), fixed or 0) for axis, fixed in enumerate(feature.shape)]
        if feature.pad is None and real == size:
            values.append(given[i].values)
            continue
        batch = columns.blank(size, shape, feature.padding_value, feature.dtype)
        if real:
            _fill(batch, given[i], feature.pad)
        if real < size:
            one = columns.blank(1, _shape(last[i]), feature.padding_value, feature.dtype)
            columns.fill(one, last[i])  # of its own size: without padding along the first ragged axis
            kept = [*map(min, shape, one.shape[1:])]
            batch[real:][_box(kept, shape, feature.pad)] = one[_box(kept, kept, None)]
        values.append(batch)
        if feature.pad:
            axis = feature.pad.axes[0]
            found = arena.zeros([size], np.int32)
            found[:real] = tables[feature.name][:, 0]
            found[real:] = 0 if feature.name in counted else min(shape[axis], int(last[i].sizes()[0, axis]))
            lengths[feature.name] = PreLengths(found) if feature.pad.side == "pre" else found
    return values, {as_key(name): found for name, found in lengths.items()}


def _fill(batch: np.ndarray, column: Column, pad: Pad | None) -> None:
    """Copy the examples of a column to their side of the first rows of ``batch``."""
    column, at_end = pad.placed(column, batch.shape[1 + pad.axes[0]]) if pad else (column, False)
    columns.fill(batch, column, at_end=at_end)


def _shape(column: Column) -> list[int]:
    """The shape of the only example of a column."""
    sizes = column.sizes()[0].tolist() if column.splits else []
    return [*sizes, *column.values.shape[1:]]


def blank_filler(features: Features, batch: Batch, counted: Set[Name]) -> None:
    """Write padding to the filler rows of counted features, in place: a loss may take its mask from the labels."""
    if batch.rows == len(batch.indices):
        return
    arrays = features.by_name(batch.data)
    for feature in features.features:
        if feature.name in counted:
            arrays[feature.name][batch.rows :] = feature.padding_value


def blank_row(features: Sequence[Feature]) -> list[Column]:
    """Ones (or empty strings) of length 1, for a replica that never had an example: zeros may be a model's padding."""
    rows = [
        np.full([1 if size is None else size for size in f.shape], b"" if f.dtype == object else 1, f.dtype)
        for f in features
    ]
    return [columns.of_arrays([row], feature.depth) for row, feature in zip(rows, features)]
