"""Backend: the operations of an engine that distpad uses, and their defaults."""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from distpad import precision
from distpad.backends import tensors

_Result = TypeVar("_Result")


class Backend(abc.ABC):
    """One engine, used by a replica (a device's copy of the model) or by a worker (a process).

    An engine implements the abstract methods. The other methods have defaults that use the sum; an engine overrides
    them with faster operations. Every method that communicates is collective: all replicas (or workers) call it in the
    same order, with the same shapes and dtypes.

    Attributes:
      name: the engine's name in messages.
      gradient_reduction: how the engine's training loop reduces the replicas' gradients: "sum" or "mean".
      num_replicas: number of replicas over all workers.
      num_workers, worker_index: number of processes, and the index of this one.
      is_elastic: whether the number of workers may change while the job runs.
      strategy: the ``tf.distribute.Strategy`` of a strategy's backend, else None.
    """

    name: str
    gradient_reduction: str
    num_replicas: int
    num_workers: int
    worker_index: int
    is_elastic: bool = False
    strategy: Any = None

    # -- in the step: called where a replica's code runs, eagerly or in a tf.function ---------------------------------

    def in_replica(self) -> bool:
        """Whether the caller runs in a replica's code."""
        return True

    def replica_count(self) -> Any:
        """``num_replicas`` for use in a step: a number, or a scalar tensor if it can change after tracing."""
        return self.num_replicas

    @abc.abstractmethod
    def replica_index(self) -> tf.Tensor:
        """This replica's index among all replicas, an int32 scalar."""

    @abc.abstractmethod
    def all_reduce(self, tensor: tf.Tensor) -> tf.Tensor:
        """The sum over all replicas, the same on each. Collective: one all-reduce."""

    @abc.abstractmethod
    def all_gather_rows(self, tensor: tf.Tensor) -> tf.Tensor:
        """All replicas' rows, in replica order. The size of the first axis may differ between replicas. Collective."""

    def all_gather(self, tensor: tf.Tensor) -> tf.Tensor:
        """Each replica's tensor, ``[replicas, *shape]``, the same on each. Collective: one all-reduce.

        Each replica writes its tensor to its own slot of zeros. The slots are selected, not multiplied, so that NaN
        stays in its slot.
        """
        count = self.replica_count()
        if isinstance(count, int) and count == 1:
            return tensor[tf.newaxis]
        mine = tf.one_hot(self.replica_index(), tf.cast(count, tf.int32), on_value=True, off_value=False, dtype=tf.bool)
        mine = tf.reshape(mine, [-1] + [1] * tensor.shape.rank)
        return self.all_reduce(tf.where(mine, tensor[tf.newaxis], tf.zeros([], tensor.dtype)))

    def total_of(self, variable: Any) -> tf.Tensor:
        """The sum over all replicas of a variable of which each replica has its own part, made in ``scope``.

        May also be called between steps, outside a replica's code. Collective: one all-reduce.
        """
        return self.all_reduce(tf.convert_to_tensor(variable))

    @property
    def gradient_scale(self) -> Any:
        """The factor on a replica's local contribution to the global mean: the engine's reduction cancels it.

        A number or a scalar tensor, as ``replica_count``.
        """
        return 1 if self.gradient_reduction == "sum" else self.replica_count()

    # -- between steps: called once by each worker, with NumPy arrays -------------------------------------------------

    @abc.abstractmethod
    def host_sum(self, array: np.ndarray) -> np.ndarray:
        """The sum over all workers. Collective among workers."""

    @abc.abstractmethod
    def host_max(self, array: np.ndarray) -> np.ndarray:
        """The maximum over all workers. Collective among workers."""

    def host_merge(
        self, maxima: np.ndarray, sums: np.ndarray, limit_s: float, channel: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The maximum of one vector and the sum of another over all workers, in one call; both float64.

        Calls on one channel are matched in their order. Calls on channels above 0, which serve Keras's fit, may run in
        any thread, in any order relative to the engine's other collectives.

        Raises TimeoutError if another worker does not call it within ``limit_s`` seconds, or passes other shapes. An
        engine without time limits ignores ``limit_s``. Collective among workers.
        """
        return self.host_max(maxima), self.host_sum(sums)

    def host_all_gather(self, array: np.ndarray) -> np.ndarray:
        """Each worker's array, ``[workers, *shape]``. Collective among workers."""
        slots = np.zeros((self.num_workers, *array.shape), array.dtype)
        slots[self.worker_index] = array
        return self.host_sum(slots)

    def host_all_gather_bytes(self, given: bytes) -> list[bytes]:
        """Each worker's bytes, of any size, in worker order. Collective among workers."""
        sizes = self.host_all_gather(np.array(len(given), np.int64))
        words = np.zeros(-(-int(sizes.max()) // 4), np.int32)  # no engine sums bytes
        words.view(np.uint8)[: len(given)] = np.frombuffer(given, np.uint8)
        return [row.tobytes()[:size] for row, size in zip(self.host_all_gather(words), sizes)]

    @property
    def replicas_here(self) -> int:
        """The number of replicas on this worker."""
        return self.num_replicas // self.num_workers

    def to_device(self, values: Sequence[Any]) -> Any:
        """Move nests of NumPy arrays, one for each replica of this worker, to the replicas' devices.

        Returns the argument of the engine's step. No collective: any thread may call it.
        """
        return tensors.as_tensors(values[0], shares=tensors.shares_memory("CPU:0"))

    def local_results(self, value: Any) -> list[Any]:
        """A step's result, or a variable, as a list of nests: one for each replica of this worker."""
        for leaf in tf.nest.flatten(value):
            if isinstance(leaf, tf.distribute.DistributedValues):
                raise ValueError(
                    f"distpad: a value is a {type(leaf).__name__}, but no strategy is in scope. Write backend=strategy."
                )
        return [value]

    # -- steps: called by each worker ---------------------------------------------------------------------------------

    def run(self, function: Callable[[Any], Any], given: Callable[[int], Any]) -> list[Any]:
        """Call ``function(given(r))`` in a graph for each replica r of this worker, in one step.

        Returns the results in replica order. Collective if ``function`` is.
        """
        return self.graph(function)(given)

    def graph(self, function: Callable[[Any], Any]) -> Callable[[Callable[[int], Any]], list[Any]]:
        """``run`` for repeated use: the function is traced once for each structure and shape of its argument."""
        traced = tf.function(function)
        return lambda given: [traced(tf.nest.map_structure(tf.convert_to_tensor, given(self.worker_index)))]

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """The scope for making models: their variables belong to the engine, and detection finds the engine."""
        return contextlib.nullcontext()

    def close(self) -> None:  # noqa: B027 (the default has nothing to close)
        """Close the engine before the process exits. All workers call it and leave together.

        If a worker does not call it, the others wait for a limited time.
        """

    # -- gradients and variables --------------------------------------------------------------------------------------

    def reduce_gradients(self, gradients: Sequence[Any]) -> list[Any]:
        """The gradients for the optimiser. Unchanged under strategies, whose optimisers reduce them."""
        return list(gradients)

    def reduce_in_optimizer(self, gradients: Sequence[Any]) -> list[Any]:
        """The reduction that the engine's optimiser applies to the result of ``reduce_gradients``."""
        return list(gradients)

    def reduced_gradients(self, gradients: Sequence[Any]) -> list[Any]:
        """The global gradients, in a form that the engine's own later reduction does not change. Collective.

        For an optimiser that reads the gradients before the engine reduces them.
        """
        return self.reduce_gradients(gradients)

    def keras_2_optimizer(self, optimizer: Any) -> Any:
        """A Keras 2 optimiser that reduces as the engine does. Keras's own optimisers do so under strategies."""
        return optimizer

    def broadcast(self, variables: Sequence[tf.Variable], root: int) -> None:  # noqa: B027 (the default is complete)
        """Assign the values of worker ``root`` on all workers. Strategies keep their copies equal themselves."""

    def reduce_loss(self, value: Any) -> tf.Tensor:
        """The global value of the replicas' local contributions: their sum, or under "mean" their mean. Collective."""
        if isinstance(value, tf.distribute.DistributedValues):
            raise ValueError(
                f"global_value: loss is a {type(value).__name__}, but no strategy is in scope. Write backend=strategy, "
                "or use the loss's own global_value."
            )
        value = precision.to_tensor(value, "global_value: loss")
        if not value.dtype.is_floating:
            raise TypeError(f"global_value: loss has dtype {value.dtype.name}, expected the floats of a loss.")
        total = self.all_reduce(value)
        return total / tf.cast(self.gradient_scale, total.dtype)


def within(limit_s: float, collective: Callable[[], _Result]) -> _Result:
    """Return the result of a collective of an engine without time limits, which runs in a new thread.

    Raises TimeoutError if the collective is not done within the limit, or fails.
    """
    done: list[Any] = []

    def run() -> None:
        try:
            done.append(collective())
        except Exception as error:
            done.append(error)

    waiting = threading.Thread(target=run, daemon=True, name="distpad-collective")
    waiting.start()
    waiting.join(min(limit_s, threading.TIMEOUT_MAX))
    if not done:
        raise TimeoutError(f"the other workers did not come within {limit_s:g} s")
    if isinstance(done[0], Exception):
        raise TimeoutError(str(done[0])) from done[0]
    return done[0]
