"""Collation: the padder, which makes batches of planned steps in a thread and moves them to their devices."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distpad import backends, errors
from distpad.data import plan, reader
from distpad.data.config import Config
from distpad.data.schema import Feature, Features, Name, Row, TupleIndex
from distpad.data.stats import PaddingStats
from distpad.losses.counts import Counts, LossInputs, WeightedCounts

_AHEAD = 4  # batches that are on their devices before their step


class Batch(NamedTuple):
    """One replica's input for one step, as tensors. Under a strategy every leaf holds a value for each replica.

    Attributes:
      data: the features in the structure of an example, each ``[batch_size, *shape]``, padded on ragged axes.
      lengths: for each padded feature ``[batch_size]`` int32, along its first ragged axis.
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
        self._last: list[Row | None] = [None] * backend.replicas_here
        self._orders: queue.Queue[Order | None] = queue.Queue()
        self._made: queue.Queue[Any] = queue.Queue()
        self._room = threading.Semaphore(_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="distpad-padder")
        self._thread.start()

    def order(self, order: Order) -> None:
        self._orders.put(order)

    def take(self) -> Any:
        """Return the next batch in order, or raise the error that making it raised."""
        made = self._made.get()
        self._room.release()
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._orders.put(None)
        self._room.release()
        self._thread.join()
        # A thread of tf.data may wait for a batch of a loop that another loop has replaced.
        self._made.put(errors.DistpadError("PaddedBatches: this loop was left, and another has begun"))

    def _run(self) -> None:
        while True:
            self._room.acquire()
            order = self._orders.get()
            if order is None or self._stopped.is_set():
                return
            try:
                self._made.put(self._make(order))
            except BaseException as error:  # take raises it in the thread of the training
                self._made.put(error)

    def _make(self, order: Order) -> Any:
        micro, replicas = order.micro, self._backend.replicas_here
        size = micro.batch_size if micro else order.batch_size
        sizes: dict[Name, list[int]] = {}
        for (name, _), size_of_axis in zip(self._config.axes, order.step.sizes):
            sizes.setdefault(name, []).append(size_of_axis)
        num_replicas = np.float64(self._backend.num_replicas)
        batches = []
        for replica in range(replicas):
            rows = micro.rows[replica] if micro else []
            self._last[replica] = last = rows[-1] if rows else self._last[replica] or order.features.blank_row()
            counted = frozenset(self._config.tokens.values())
            values, lengths = collate(order.features.features, rows, sizes, size, last, counted)
            indices = np.full([size], -1, np.int64)
            indices[: len(rows)] = micro.indices[replica] if micro else []
            local = micro.local[replica] if micro else np.zeros([len(self._config.tokens), 2])
            counts = self._counts(order.step, local, num_replicas)
            named = dict(zip(order.features.names, values))
            inputs = {
                loss: LossInputs(lengths[name], self._weights(loss, order.features, rows, named), counts[loss])
                for loss, name in self._config.tokens.items()
            }
            batches.append(
                Batch(
                    order.features.pack(values),
                    lengths,
                    np.int32(len(rows)),
                    counts.get(None, counts),
                    indices,
                    inputs.get(None, inputs),
                )
            )
            self._add_to_stats(order, rows, size)
        return self._to_device(order.features, batches)

    def _counts(self, step: plan.StepPlan, local: np.ndarray, replicas: np.float64) -> dict[Any, Counts]:
        counts = {}
        for i, (loss, name) in enumerate(self._config.tokens.items()):
            is_weighted = loss in self._config.weights or len(self._config.counted_axes(name)) > 1
            kind = WeightedCounts if is_weighted else Counts
            counts[loss] = kind(np.float64(step.tokens[i]), np.float64(step.sequences[i]), local[i], replicas)
        return counts

    def _weights(self, loss: Any, features: Features, rows: Sequence[Row], arrays: Mapping[Name, np.ndarray]) -> Any:
        """A replica's sample weights for its loss; ``()`` if lengths alone define the valid positions."""
        name = self._config.tokens[loss]
        axes, weights = self._config.counted_axes(name), self._config.weights.get(loss)
        given = None if weights is None else arrays[weights]
        shape = [len(arrays[name]), *(arrays[name].shape[1 + axis] for axis in axes)]
        if given is not None and given.ndim > 1:
            given = _resized(given, shape)
        if len(axes) == 1:
            return () if given is None else given
        column = features.names.index(name)
        mask = np.zeros(shape, np.float32)
        for mask_of_row, row in zip(mask, rows):
            mask_of_row[tuple(slice(row[column].shape[axis]) for axis in axes)] = 1
        if given is None:
            return mask
        given = given.reshape([len(given), *[1] * (len(shape) - given.ndim), *given.shape[1:]])
        return np.where(mask > 0, given, 0).astype(np.float32)  # not a product: padding may be NaN

    def _add_to_stats(self, order: Order, rows: Sequence[Row], size: int) -> None:
        padded = [(i, feature) for i, feature in enumerate(order.features.features) if feature.pad]
        by_name = {f.name: np.array([f.sizes(row[i]) for row in rows], np.int64) for i, f in padded}
        tables = [by_name[name].reshape(len(rows), len(pad.axes)) for name, pad in self._config.padding.items()]
        self._stats.add_replica(tables, order.step.agreed, order.step.sizes, size)


def _resized(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The array cut, or padded with zeros, to a shape: weights may have another boundary than their feature."""
    if list(array.shape) == list(shape):
        return array
    resized = np.zeros(shape, array.dtype)
    common = tuple(map(slice, np.minimum(array.shape, shape)))
    resized[common] = array[common]
    return resized


def collate(
    features: Sequence[Feature],
    rows: Sequence[Row],
    sizes: Mapping[Name, Sequence[int]],
    batch_size: int,
    last: Row,
    emptied: frozenset[Name],
) -> tuple[list[np.ndarray], dict[Name, np.ndarray]]:
    """Pad rows to a batch of static shape.

    Args:
      features: the features of the columns.
      rows: at most ``batch_size`` rows.
      sizes: the padded sizes of each feature's ragged axes.
      batch_size: rows of the batch.
      last: the row that filler rows repeat, cut to ``sizes``.
      emptied: features whose length is 0 in filler rows.

    Returns:
      For each feature ``[batch_size, *shape]``, and for each padded feature its lengths ``[batch_size]`` int32.
    """
    values, lengths = [], {}
    for column, feature in enumerate(features):
        ragged = dict(zip(feature.pad.axes if feature.pad else (), sizes.get(feature.name, ())))
        shape = [ragged.get(axis, size or 0) for axis, size in enumerate(feature.shape)]
        real = [row[column] for row in rows]
        fillers = batch_size - len(rows)
        filler = last[column][tuple(slice(size) for size in shape)]
        if feature.pad is None:
            values.append(_stacked([*real, *[filler] * fillers], shape, feature.dtype))
            continue
        axis = feature.pad.axes[0]
        if feature.name in emptied:
            filler = filler[tuple(slice(0) if at == axis else slice(None) for at in range(filler.ndim))]
        batch = np.full([batch_size, *shape], feature.padding_value, feature.dtype)
        arrays = [*real, *[filler] * fillers]
        for padded, array in zip(batch, arrays):
            padded[tuple(map(slice, array.shape))] = array
        values.append(batch)
        lengths[feature.name] = np.array([array.shape[axis] for array in arrays], np.int32)
    return values, {TupleIndex(name) if isinstance(name, int) else name: found for name, found in lengths.items()}


def _stacked(arrays: Sequence[np.ndarray], shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    batch = np.empty([len(arrays), *shape], dtype)
    for i, array in enumerate(arrays):
        batch[i, ...] = array  # the ellipsis also assigns an object, such as a string
    return batch
