"""Collation: the padder, which makes batches of planned steps in a thread and moves them to their devices."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors
from distpad.collectives.shapes import PreLengths
from distpad.data import plan, reader, threads
from distpad.data.config import Config
from distpad.data.schema import Features, Pad
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
      element_of: makes an element for fit from the replicas' batches in NumPy; None: batches go to the devices.
    """

    def __init__(
        self,
        backend: backends.Backend,
        config: Config,
        stats: PaddingStats,
        element_of: Callable[[Sequence[Batch]], Any] | None,
    ) -> None:
        self._backend, self._config, self._stats, self._element_of = backend, config, stats, element_of
        self._last: list[LastRow | None] = [None] * backend.replicas_here
        # SimpleQueue takes a tenth of the time of Queue and Semaphore, which Python implements
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[None] = queue.SimpleQueue()  # an item for each batch that may be made
        for _ in range(_AHEAD):
            self._free.put(None)
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="distpad-padder")
        try:
            self._thread.start()
        except (RuntimeError, MemoryError) as error:
            self._fail(error)

    def order(self, order: Order) -> None:
        self._orders.put(order)

    def take(self) -> Any:
        """Return the next batch in order, or raise the error that making it raised."""
        limit_s = self._config.timeout_s
        try:
            made = threads.get(self._made, [self._thread], limit_s)
        except queue.Empty:
            raise errors.DistpadError(
                f"PaddedBatches: waited {limit_s:.0f} s for a batch to be padded, expected less than timeout_s."
            ) from None
        self._free.put(None)
        if isinstance(made, BaseException):
            raise made
        batch, counted = made
        self._stats.add(counted)  # now that the batch is consumed: a checkpoint counts no batch that is made ahead
        return batch

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._orders.put(None)
        self._free.put(None)
        if self._thread.is_alive():
            self._thread.join()
        # A thread of tf.data may wait for a batch of a loop that another loop has replaced.
        self._made.put(errors.DistpadError("PaddedBatches: this loop was left, and another has begun"))

    @property
    def error(self) -> BaseException | None:
        """The error that ended the thread, or why it could not be started; None while it runs, and after ``close``."""
        if self._error or self._thread.is_alive() or self._stopped.is_set():
            return self._error
        return threads.died(self._thread)

    def _fail(self, error: BaseException) -> None:
        """Let take raise the error in the thread of the training, and the next window sync on the other workers."""
        self._error = error
        self._made.put(error)

    def _run(self) -> None:
        try:
            while True:
                self._free.get()
                order = self._orders.get()
                if self._made.qsize() >= _AHEAD - 1:
                    time.sleep(_PAUSE_S)
                if order is None or self._stopped.is_set():
                    return
                self._made.put(self._make(order))
        except BaseException as error:
            self._fail(error)

    def _make(self, order: Order) -> tuple[Any, PaddingStats]:
        config, features, micro, batches, counted = self._config, order.features, order.micro, [], PaddingStats()
        if micro:
            counted.add_truncated(micro.lost)
        for replica in range(self._backend.replicas_here):
            rows = reader.ReplicaRows.none(config) if micro is None else micro.rows_of(replica)
            size = micro.batch_size if micro else order.batch_size
            counted.add_replica(rows.sizes.values(), order.step.agreed, order.step.sizes, size)
            made = make(config, features, order.step, size, rows, self._last[replica], self._backend.num_replicas)
            batches.append(made)
            if made.rows:
                self._last[replica] = last_row(features, made)
        if self._element_of:
            return self._element_of(batches), counted
        for batch in batches:
            blank_filler(config, features, batch)
        return self._backend.to_device(batches), counted


LastRow = list[tuple[np.ndarray, int]]  # of each feature ``[1, *shape]``, and its length


def last_row(features: Features, batch: Batch) -> LastRow:
    """The last real row of a batch."""
    last = int(batch.rows) - 1
    lengths = {name: int(getattr(found, "values", found)[last]) for name, found in batch.lengths.items()}
    arrays = features.by_name(batch.data)
    return [(array[last : last + 1], lengths.get(name, 0)) for name, array in arrays.items()]


def blank_row(features: Features) -> LastRow:
    """Ones (or empty strings) of length 1, for a replica that never had an example: zeros may be a model's padding."""
    shapes = [[1, *(1 if size is None else size for size in feature.shape)] for feature in features.features]
    for shape, feature in zip(shapes, features.features):
        errors.check_memory("an example", shape, feature.dtype)
    fillings = [b"" if feature.dtype == object else 1 for feature in features.features]
    return [(np.full(s, filling, f.dtype), 1) for s, filling, f in zip(shapes, fillings, features.features)]


def blank_filler(config: Config, features: Features, batch: Batch) -> None:
    """Write padding to the filler rows of counted features, in place: a loss may take its mask from the labels."""
    arrays = features.by_name(batch.data)
    for feature in features.features if batch.rows < len(batch.indices) else ():
        if feature.name in config.counted_axes:
            arrays[feature.name][batch.rows :] = feature.padding_value


def make(
    config: Config,
    features: Features,
    step: plan.StepPlan,
    size: int,
    rows: reader.ReplicaRows,
    last: LastRow | None,
    num_replicas: int,
) -> Batch:
    """Pad a replica's rows to a batch of ``size`` rows, in NumPy.

    Args:
      last: the row that filler rows repeat, cut to the step's sizes, if the replica has no rows; its last real row
        otherwise. None: a blank one.
    """
    sizes, real, values, lengths = dict(zip(config.axes, step.sizes)), len(rows.indices), [], {}
    padded, losses = len(config.padding), len(config.tokens)
    arena = memory.Arena((8 + 4 * padded) * size + (1 + padded + 2 * losses) * memory.ALIGNMENT)
    last = last or blank_row(features)
    for i, (feature, (filler, length)) in enumerate(zip(features.features, last)):
        name, pad = feature.name, feature.pad
        if pad is None and real == size:
            values.append(rows.columns[i].values)
            continue
        shape = [sizes.get((name, axis), fixed or 0) for axis, fixed in enumerate(feature.shape)]
        batch = columns.blank(size, shape, feature.padding_value, feature.dtype)
        values.append(batch)
        if real:
            column, at_end = pad.placed(rows.columns[i], shape[pad.axes[0]]) if pad else (rows.columns[i], False)
            columns.fill(batch, column, at_end=at_end)
        if real < size:
            _copy(batch[real:], batch[real - 1 : real] if real else filler, pad)
        if pad:
            found = arena.zeros([size], np.int32)
            found[:real] = rows.sizes[name][:, 0]
            if real < size and name not in config.counted_axes:
                found[real:] = found[real - 1] if real else min(length, shape[pad.axes[0]])
            lengths[name] = PreLengths(found) if pad.side == "pre" else found
    indices = arena.zeros([size], np.int64)
    indices[:real], indices[real:] = rows.indices, -1
    named, inputs = dict(zip(features.names, values)), {}
    for i, (loss, name) in enumerate(config.tokens.items()):
        kind = WeightedCounts if loss in config.weights or len(config.counted_axes[name]) > 1 else Counts
        # another number in each step, of which DLPack makes a tensor faster than convert_to_tensor
        tokens = arena.copy(step.tokens[i])
        counts = kind(tokens, step.sequences[i], arena.copy(rows.local[i]), np.float64(num_replicas))
        counted = rows.columns[features.names.index(name)] if real else None
        inputs[loss] = LossInputs(lengths[name], _weights(config, loss, counted, named), counts)
    by_key = {as_key(name): found for name, found in lengths.items()}
    every: dict[Any, Any] = {loss: each.counts for loss, each in inputs.items()}
    data = features.pack(values)
    return Batch(data, by_key, np.int32(real), every.get(None, every), indices, inputs.get(None, inputs))


def _copy(target: np.ndarray, source: np.ndarray, pad: Pad | None) -> None:
    """Copy the positions that the rows of two padded batches have in common."""
    at_end = pad.axes[0] if pad and pad.side == "pre" else None

    def box(sizes: Sequence[int], others: Sequence[int]) -> tuple[slice, ...]:
        each = enumerate(zip(sizes[1:], others[1:]))
        return slice(None), *(slice(max(0, n - m), n) if axis == at_end else slice(min(n, m)) for axis, (n, m) in each)

    target[box(target.shape, source.shape)] = source[box(source.shape, target.shape)]


def _weights(config: Config, loss: Any, counted: Column | None, arrays: Mapping[Name, np.ndarray]) -> Any:
    """A replica's sample weights for its loss; ``()`` if lengths alone define the valid positions.

    Args:
      counted: the column of the counted feature; None without rows.
      arrays: the features of the batch.
    """
    name = config.tokens[loss]
    axes, weights, pad = config.counted_axes[name], config.weights.get(loss), config.padding[name]
    given = None if weights is None else arrays[weights]
    shape = [len(arrays[name]), *(arrays[name].shape[1 + axis] for axis in axes)]
    if given is not None and given.ndim > 1 and [*given.shape] != shape:
        resized = np.zeros(shape, given.dtype)  # weights may have another boundary than their feature
        _copy(resized, given, pad)
        given = resized
    if len(axes) == 1:
        return () if given is None else given
    mask = np.zeros(shape, bool)
    if counted is not None:
        positions, at_end = pad.placed(Column(np.zeros(0), counted.splits[: len(axes)]), shape[1 + pad.axes[0]])
        mask[: counted.num_examples] = columns.mask(positions, [counted.num_examples, *shape[1:]], at_end=at_end)
    return masked(mask, np.float32(1) if given is None else given)


def masked(mask: np.ndarray, weights: Any) -> np.ndarray:
    """Weights per position or per row, of the shape of the mask: 0 where it is false."""
    shape = [*np.shape(weights), *[1] * (mask.ndim - np.ndim(weights))] if np.ndim(weights) else []
    return np.where(mask, np.reshape(weights, shape), 0).astype(np.float32)  # not a product: padding may be NaN


def spec_of(config: Config, features: Features, size: int | None, element_of: Callable[[Batch], Any]) -> Any:
    """The ``tf.TensorSpec`` of each part of what ``element_of`` makes of a replica's batch.

    Args:
      size: the rows of a batch; None if they vary.
    """

    def made(number: int) -> Any:
        """The element of an empty batch, each of whose unknown sizes is ``number``."""
        shapes = [tuple(number if size is None else size for size in feature.shape) for feature in features.features]
        fixed = [dataclasses.replace(each, shape=shape) for each, shape in zip(features.features, shapes)]
        counts, sizes = np.zeros([2, len(config.tokens)]), (number,) * len(config.axes)
        step, rows = plan.StepPlan(sizes, sizes, 0, *counts), reader.ReplicaRows.none(config)
        return element_of(make(config, Features(features.skeleton, fixed), step, size or number, rows, None, 1))

    def spec(one: Any, other: Any) -> tf.TensorSpec:
        shape = [a if a == b else None for a, b in zip(np.shape(one), np.shape(other))]
        return tf.TensorSpec(shape, tf.as_dtype(np.asarray(one).dtype))

    return tf.nest.map_structure(spec, made(1), made(2))
