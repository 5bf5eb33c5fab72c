"""Padding ahead: planned steps become batches on their devices, in a thread beside the training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distpad import backends, errors
from distpad.data import plan, reader
from distpad.data.config import Config
from distpad.data.schema import Features, Name, Row, collate
from distpad.data.stats import PaddingStats
from distpad.losses.counts import Counts, LossInputs, WeightedCounts

_AHEAD = 4  # batches that are padded and on their devices before their step


class Batch(NamedTuple):
    """What one replica gets for one step, as tensors; under a strategy every leaf holds a value for each replica.

    Attributes:
      data: in the structure of an example, each feature ``[batch_size, *shape]``, padded where it is ragged.
      lengths: for each padded feature ``[batch_size]`` int32, of the first of its ragged axes.
      rows: int32 scalar: so many rows are real, those behind them are filling.
      counts: ``Counts`` over all replicas and all micro-batches of the optimiser step, float64 scalars: the loss's
        ``denominator``. A mapping of them where ``tokens`` is one.
      indices: ``[batch_size]`` int64, each row's place in the source, -1 for filling.
      loss_inputs: ``LossInputs``, what the loss needs of the batch beside labels and predictions. A mapping of them
        where ``tokens`` is one.

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
    """A step to be made; ``batch_size`` is for a worker without examples."""

    micro: reader.MicroBatch | None  # None where this worker has no more examples
    step: plan.StepPlan
    features: Features
    batch_size: int


class Padder:
    """Makes the batches that are ordered, a few ahead of those that are taken, in a thread that ends with ``close``.

    Args:
      to_device: makes what is taken of the replicas' batches in NumPy.
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
        """The next batch in order. Raises what making it raised."""
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
        # for a thread of tf.data's that waits for a batch of a loop that another has replaced
        self._made.put(errors.DistpadError("PaddedBatches: this loop was left, and another has begun"))

    def _run(self) -> None:
        while True:
            self._room.acquire()
            order = self._orders.get()
            if order is None or self._stopped.is_set():
                return
            try:
                self._made.put(self._make(order))
            except BaseException as error:  # the training's thread raises it
                self._made.put(error)

    def _make(self, order: Order) -> Any:
        micro, replicas = order.micro, self._backend.replicas_here
        size = micro.batch_size if micro else order.batch_size
        sizes: dict[Name, list[int]] = {}
        for (name, _), agreed in zip(self._config.axes, order.step.sizes):
            sizes.setdefault(name, []).append(agreed)
        replicas_of_all = np.float64(self._backend.num_replicas)
        batches = []
        for replica in range(replicas):
            rows = micro.rows[replica] if micro else []
            self._last[replica] = last = rows[-1] if rows else self._last[replica] or order.features.blank_row()
            emptied = frozenset(self._config.tokens.values())
            values, lengths = collate(order.features.features, rows, sizes, size, last, emptied)
            indices = np.full([size], -1, np.int64)
            indices[: len(rows)] = micro.places[replica] if micro else []
            local = micro.local[replica] if micro else np.zeros([len(self._config.tokens), 2])
            counts = self._counts(order.step, local, replicas_of_all)
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
            self._book(order, rows, size)
        return self._to_device(order.features, batches)

    def _counts(self, step: plan.StepPlan, local: np.ndarray, replicas: np.float64) -> dict[Any, Counts]:
        counts = {}
        for i, (loss, name) in enumerate(self._config.tokens.items()):
            is_weighted = loss in self._config.weights or len(self._config.counted_axes(name)) > 1
            kind = WeightedCounts if is_weighted else Counts
            counts[loss] = kind(np.float64(step.tokens[i]), np.float64(step.sequences[i]), local[i], replicas)
        return counts

    def _weights(self, loss: Any, features: Features, rows: Sequence[Row], arrays: Mapping[Name, np.ndarray]) -> Any:
        """The sample weights of a replica's batch as its loss takes them, beside lengths; ``()`` where lengths do."""
        name = self._config.tokens[loss]
        axes, weights = self._config.counted_axes(name), self._config.weights.get(loss)
        given = None if weights is None else arrays[weights]
        shape = [len(arrays[name]), *(arrays[name].shape[1 + axis] for axis in axes)]
        if given is not None and given.ndim > 1:
            given = _fitted(given, shape)
        if len(axes) == 1:
            return () if given is None else given
        column = features.names.index(name)
        mask = np.zeros(shape, np.float32)
        for place, row in zip(mask, rows):
            place[tuple(slice(row[column].shape[axis]) for axis in axes)] = 1
        if given is None:
            return mask
        given = given.reshape([len(given), *[1] * (len(shape) - given.ndim), *given.shape[1:]])
        return np.where(mask > 0, given, 0).astype(np.float32)  # chosen, not multiplied: padding may be NaN

    def _book(self, order: Order, rows: Sequence[Row], size: int) -> None:
        padded = [(i, feature) for i, feature in enumerate(order.features.features) if feature.pad]
        by_name = {f.name: np.array([f.sizes(row[i]) for row in rows], np.int64) for i, f in padded}
        tables = [by_name[name].reshape(len(rows), len(pad.axes)) for name, pad in self._config.padding.items()]
        self._stats.add_replica(tables, order.step.agreed, order.step.sizes, size)


def _fitted(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Cut or filled with zeros: weights may be padded to another boundary than what they weigh."""
    if list(array.shape) == list(shape):
        return array
    fitted = np.zeros(shape, array.dtype)
    common = tuple(map(slice, np.minimum(array.shape, shape)))
    fitted[common] = array[common]
    return fitted
