"""StrategyBackend: synchronous tf.distribute strategies (Mirrored, MultiWorkerMirrored, OneDevice)."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.backends import base, expected_gpus, keras_fit, tensors
from distpad.launcher import topology

# dtypes that the collectives do not support, and the dtypes to which they are cast for the transfer
_CARRIED = {
    tf.bool: tf.int32,
    tf.uint8: tf.int32,
    tf.int8: tf.int32,
    tf.uint16: tf.int32,
    tf.int16: tf.int32,
    tf.uint32: tf.int64,
    tf.bfloat16: tf.float32,
}

_GROUPS = 1 << 20  # first group key of channels; the strategy's own group keys begin at 1
LEAVE_WITHIN_S = 60.0  # how long a worker that closes its backend waits for the others


class StrategyBackend(base.Backend):
    """The replicas of a ``tf.distribute.Strategy``; its optimisers sum their gradients.

    Args:
      strategy: a synchronous strategy. One thread of a worker calls all collectives, except for ``host_merge``.

    Raises:
      TypeError: not a strategy.
      ValueError: a parameter server strategy, whose steps are not synchronous.
      DistpadError: the strategy differs from the launcher's expected topology.
    """

    name = "strategy"
    gradient_reduction = "sum"

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        if not isinstance(strategy, tf.distribute.Strategy):
            raise TypeError(
                errors.sentence("StrategyBackend", "strategy", type(strategy).__name__, "a tf.distribute.Strategy")
            )
        if isinstance(strategy, tf.distribute.experimental.ParameterServerStrategy):
            raise ValueError(
                errors.sentence("StrategyBackend", "strategy", type(strategy).__name__, "a synchronous strategy")
            )
        self.strategy = strategy
        self.num_replicas = strategy.num_replicas_in_sync
        self.num_workers, self.worker_index, hosts = _workers(strategy)
        _check_topology(strategy, self.num_workers, hosts)
        keras_fit.enable()

    def in_replica(self) -> bool:
        """Whether the caller is inside this strategy's ``run``, not in the context of the default strategy."""
        context = tf.distribute.get_replica_context()
        return context is not None and context.strategy is self.strategy

    def _context(self) -> Any:
        if not self.in_replica():
            raise ValueError(
                f"distpad: called outside {type(self.strategy).__name__}.run, expected inside it, where a replica's "
                "code runs. Call it in the function that you give to strategy.run."
            )
        return tf.distribute.get_replica_context()

    def replica_index(self) -> tf.Tensor:
        return tf.convert_to_tensor(self._context().replica_id_in_sync_group)

    def all_reduce(self, tensor: tf.Tensor) -> tf.Tensor:
        # identity: an unchanged argument of a function has no device for the result
        return self._context().all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(tensor))

    def all_gather_rows(self, tensor: tf.Tensor) -> tf.Tensor:
        context = self._context()
        if self.num_replicas == 1:
            return tensor
        carried = _CARRIED.get(tensor.dtype, tensor.dtype)
        return tf.cast(context.all_gather(tf.cast(tf.identity(tensor), carried), axis=0), tensor.dtype)

    def total_of(self, variable: Any) -> tf.Tensor:
        # outside replicas, reading a variable that is synchronised on read sums its parts
        read = tf.convert_to_tensor(variable)
        return self.all_reduce(read) if self.in_replica() else read

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return self.strategy.scope()

    def reduce_loss(self, value: Any) -> tf.Tensor:
        if self.in_replica():
            return super().reduce_loss(value)
        return self.strategy.reduce(tf.distribute.ReduceOp.SUM, value, axis=None)

    def reduce_in_optimizer(self, gradients: Sequence[Any]) -> list[Any]:
        # identity: as above; a constant has no device either
        placed = tf.nest.map_structure(tf.identity, list(gradients), expand_composites=True)
        return self._context().all_reduce(tf.distribute.ReduceOp.SUM, placed)

    def reduced_gradients(self, gradients: Sequence[Any]) -> list[Any]:
        """The sum on the first replica, and zeros on the others, so that the strategy's own sum does not change it.

        Elements that are not finite are NaN on the other replicas, for a check of finiteness there. Of a sparse
        gradient the other replicas hold only such rows, since the strategy concatenates the rows of all replicas.
        """
        if self.num_replicas == 1:
            return list(gradients)
        first = self.replica_index() == 0

        def of_first(gradient: Any) -> Any:
            if isinstance(gradient, tf.IndexedSlices):
                inner = list(range(1, gradient.values.shape.rank))
                kept = first | ~tf.reduce_all(tf.math.is_finite(gradient.values), axis=inner)
                values, indices = (tf.boolean_mask(x, kept) for x in (of_first(gradient.values), gradient.indices))
                return tf.IndexedSlices(values, indices, gradient.dense_shape)
            # not a product with 0, which TensorFlow 2.15 folds to 0 also for NaN
            nothing = tf.where(tf.math.is_finite(gradient), tf.cast(0, gradient.dtype), tf.cast(np.nan, gradient.dtype))
            return tf.where(first, gradient, nothing)

        return [of_first(gradient) for gradient in self.reduce_in_optimizer(gradients)]

    def graph(self, function: Callable[[Any], Any]) -> Callable[[Callable[[int], Any]], list[Any]]:
        traced = tf.function(lambda values: self.strategy.run(function, args=(values,)))

        def run(given: Callable[[int], Any]) -> list[Any]:
            arguments = self.strategy.experimental_distribute_values_from_function(
                lambda context: tf.nest.map_structure(tf.convert_to_tensor, given(context.replica_id_in_sync_group))
            )
            return self.local_results(traced(arguments))

        return run

    def local_results(self, value: Any) -> list[Any]:
        leaves = tf.nest.flatten(value)
        columns = [self.strategy.experimental_local_results(leaf) for leaf in leaves]
        columns = [column * self.replicas_here if leaf is None else column for leaf, column in zip(leaves, columns)]
        if len({len(column) for column in columns}) > 1:
            raise ValueError(
                f"distpad: some values hold one component for each of {self.replicas_here} replicas, others a single "
                "component, expected a result of strategy.run."
            )
        return [tf.nest.pack_sequence_as(value, list(row)) for row in zip(*columns)]

    def host_sum(self, array: np.ndarray) -> np.ndarray:
        return self.host_all_gather(array).sum(axis=0)

    def host_max(self, array: np.ndarray) -> np.ndarray:
        return self.host_all_gather(array).max(axis=0)

    def host_merge(
        self, maxima: np.ndarray, sums: np.ndarray, limit_s: float, channel: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """From any thread, while steps run: each channel is a collective group that the strategy does not use."""
        if self.num_workers == 1:
            return maxima, sums
        host = tf.DeviceSpec.from_string(self.strategy.extended.worker_devices[0])

        def reduced(array: np.ndarray, operation: str) -> np.ndarray:
            return tf.raw_ops.CollectiveReduceV2(
                input=tf.constant(array, tf.float64),
                group_size=self.num_workers,
                group_key=_GROUPS + channel,
                instance_key=2 * len(array) + (operation == "Max"),  # one for each shape, since TensorFlow keeps them
                ordering_token=[],
                merge_op=operation,
                final_op="Id",
            ).numpy()

        def merge() -> tuple[np.ndarray, np.ndarray]:
            with tf.device(host.replace(device_type="CPU", device_index=0).to_string()):
                return reduced(maxima, "Max"), reduced(sums, "Add")

        # TensorFlow's own time limit keeps a thread asleep until it expires, and aborts all collectives of the process.
        return base.within(limit_s, merge)

    def close(self) -> None:
        # A worker that exits after its last result resets connections, over which other workers still receive this
        # result. No worker completes this exchange before all workers have all earlier results. An error means only
        # that another worker has already exited.
        with contextlib.suppress(TimeoutError):
            self.host_merge(np.zeros(1), np.zeros(1), LEAVE_WITHIN_S)

    def to_device(self, values: Sequence[Any]) -> Any:
        devices, local = self.strategy.extended.worker_devices, iter(range(len(values)))

        def of_next(_: Any) -> Any:
            i = next(local)
            with tf.device(devices[i]):
                return tensors.as_tensors(values[i], shares=tensors.shares_memory(devices[i]))

        return self.strategy.experimental_distribute_values_from_function(of_next)

    def host_all_gather(self, array: np.ndarray) -> np.ndarray:
        array = np.asarray(array)
        if self.num_workers == 1:
            return array[np.newaxis]
        # the first replica of a worker adds the worker's slot, the others add zeros
        slots = np.zeros((self.num_workers, *array.shape), array.dtype)
        slots[self.worker_index] = array
        local = iter([slots])
        given = self.strategy.experimental_distribute_values_from_function(
            lambda _: tf.constant(next(local, np.zeros_like(slots)))
        )
        return self.strategy.experimental_local_results(self._sum(given))[0].numpy()

    @functools.cached_property
    def _sum(self) -> Callable[[Any], Any]:
        """The sum over all replicas, as a graph: an eager sum takes over twice as long, and TensorFlow warns of it."""

        def add(mine: tf.Tensor) -> tf.Tensor:
            return self._context().all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(mine))

        return tf.function(lambda given: self.strategy.run(add, args=(given,)), autograph=False)


def _workers(strategy: tf.distribute.Strategy) -> tuple[int, int, int]:
    """The number of workers, the index of this one (a chief comes first), and the number of hosts."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 1, 0, 1
    resolver = strategy.cluster_resolver
    cluster = resolver.cluster_spec().as_dict() if resolver else {}
    chiefs, workers = cluster.get("chief", []), cluster.get("worker", [])
    if not chiefs + workers:
        return 1, 0, 1
    hosts = {address.rpartition(":")[0] for address in chiefs + workers}
    index = resolver.task_id + (len(chiefs) if resolver.task_type == "worker" else 0)
    return len(chiefs + workers), index, len(hosts)


def _check_topology(strategy: tf.distribute.Strategy, workers: int, hosts: int) -> None:
    """Check a strategy against the launcher's expected topology.

    A strategy of a single worker is checked only if the launcher started a MirroredStrategy: else the user means it.
    """
    several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    mirrored = isinstance(strategy, tf.distribute.MirroredStrategy) and os.environ.get("DISTPAD_BACKEND") == "mirrored"
    if several or mirrored:
        expected_gpus.check()
        name = "MultiWorkerMirroredStrategy" if several else "MirroredStrategy"  # the class has another name
        replicas = strategy.num_replicas_in_sync
        topology.check(topology.Report(name, workers=workers, replicas=replicas, hosts=hosts))
