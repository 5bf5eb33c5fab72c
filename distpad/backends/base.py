"""Backend: what distpad asks of an engine, and what follows from that."""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

_Result = TypeVar("_Result")


class Backend(abc.ABC):
    """One engine, seen from a replica (a device's copy of the model) or from a worker (a process).

    An engine must sum a tensor over all replicas. All the rest has a default that is built on the sum, which an engine
    replaces where it has something better. Every method that communicates is collective: all replicas (or workers)
    call it in the same order, with the same shapes and dtypes.

    Attributes:
      name: for messages.
      gradient_reduction: how the engine's training loop joins the replicas' gradients: "sum" or "mean".
      num_replicas: over all workers.
      num_workers, worker_index: processes, and which of them this is.
    """

    name: str
    gradient_reduction: str
    num_replicas: int
    num_workers: int
    worker_index: int

    # -- in the step: called where a replica's code runs, eagerly or in a tf.function ---------------------------------

    def in_replica(self) -> bool:
        """Whether the caller stands where a replica's code runs."""
        return True

    def replica_count(self) -> Any:
        """``num_replicas`` for use in a step: a number, or a scalar tensor where it can change behind a trace."""
        return self.num_replicas

    @abc.abstractmethod
    def replica_index(self) -> tf.Tensor:
        """This replica's number among all, an int32 scalar."""

    @abc.abstractmethod
    def all_reduce(self, tensor: tf.Tensor) -> tf.Tensor:
        """The sum over all replicas, the same on each. Collective: one all-reduce."""

    @abc.abstractmethod
    def all_gather_rows(self, tensor: tf.Tensor) -> tf.Tensor:
        """All replicas' rows, in replica order. The first axis may differ between them. Collective."""

    def all_gather(self, tensor: tf.Tensor) -> tf.Tensor:
        """What each replica holds, ``[replicas, *shape]``, the same on each. Collective: one all-reduce.

        Each replica adds its own slot to zeros, so that one small sum carries maxima, sums and the evidence for an
        error. Slots are chosen, not multiplied: NaN in one stays there.
        """
        count = self.replica_count()
        if isinstance(count, int) and count == 1:
            return tensor[tf.newaxis]
        mine = tf.one_hot(self.replica_index(), tf.cast(count, tf.int32), on_value=True, off_value=False, dtype=tf.bool)
        mine = tf.reshape(mine, [-1] + [1] * tensor.shape.rank)
        return self.all_reduce(tf.where(mine, tensor[tf.newaxis], tf.zeros([], tensor.dtype)))

    def total_of(self, variable: Any) -> tf.Tensor:
        """The sum of what each replica has added to a variable that it has its own part of, made in ``scope``; also
        called where no replica's code runs, between steps. Collective: one all-reduce."""
        return self.all_reduce(tf.convert_to_tensor(variable))

    @property
    def gradient_scale(self) -> Any:
        """What a replica's share of the global mean is multiplied by, so that the engine's reduction restores it; a
        number or a scalar tensor, as ``replica_count``."""
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
        """The maximum of one vector and the sum of another over all workers, in one exchange; both float64.

        Exchanges of one channel meet in their order. Where fit can be fed, those of a channel above 0 may come from any
        thread, whatever the others do meanwhile.

        Raises TimeoutError where the others did not come within ``limit_s`` seconds, or came with something else; an
        engine that cannot tell waits as long as it always does. Collective among workers.
        """
        return self.host_max(maxima), self.host_sum(sums)

    def host_all_gather(self, array: np.ndarray) -> np.ndarray:
        """What each worker holds, ``[workers, *shape]``. Collective among workers."""
        slots = np.zeros((self.num_workers, *array.shape), array.dtype)
        slots[self.worker_index] = array
        return self.host_sum(slots)

    def host_all_gather_bytes(self, given: bytes) -> list[bytes]:
        """What each worker gives, of any size, in worker order. Collective among workers."""
        sizes = self.host_all_gather(np.array(len(given), np.int64))
        words = np.zeros(-(-int(sizes.max()) // 4), np.int32)  # no engine sums bytes
        words.view(np.uint8)[: len(given)] = np.frombuffer(given, np.uint8)
        return [row.tobytes()[:size] for row, size in zip(self.host_all_gather(words), sizes)]

    @property
    def replicas_here(self) -> int:
        """How many replicas this worker has."""
        return self.num_replicas // self.num_workers

    def to_device(self, values: Sequence[Any]) -> Any:
        """One nest of NumPy arrays for each replica of this worker, as tensors on its device, in the form that the
        engine's step takes. No collective: any thread may call it."""
        return tf.nest.map_structure(tf.convert_to_tensor, values[0])

    def local_results(self, value: Any) -> list[Any]:
        """What each replica of this worker holds of what a step gave back, or of a variable; a nest each."""
        for leaf in tf.nest.flatten(value):
            if isinstance(leaf, tf.distribute.DistributedValues):
                raise ValueError(
                    f"distpad: a value is a {type(leaf).__name__}, but no strategy is in scope. Write backend=strategy."
                )
        return [value]

    # -- all together -------------------------------------------------------------------------------------------------

    def run(self, function: Callable[[Any], Any], given: Callable[[int], Any]) -> list[Any]:
        """Call ``function(given(r))`` in a graph for each replica r of this worker, all of them one step together.

        Returns the results in replica order. Collective where ``function`` is.
        """
        return self.graph(function)(given)

    def graph(self, function: Callable[[Any], Any]) -> Callable[[Callable[[int], Any]], list[Any]]:
        """``run`` for a function that is run often: traced once for each structure and shape of what is given."""
        traced = tf.function(function)
        return lambda given: [traced(tf.nest.map_structure(tf.convert_to_tensor, given(self.worker_index)))]

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Where models are made: their variables are then the engine's, and the engine is found by detection."""
        return contextlib.nullcontext()

    def close(self) -> None:  # noqa: B027 (nothing is right)
        """End what the engine keeps running here, before the process exits: all workers come to it, and leave together.

        A worker that never comes holds up the others for a limited time, and breaks nothing.
        """

    # -- gradients and variables --------------------------------------------------------------------------------------

    def reduce_gradients(self, gradients: Sequence[Any]) -> list[Any]:
        """Gradients as the optimiser should get them. Strategies reduce inside the optimiser, so nothing is done."""
        return list(gradients)

    def reduce_in_optimizer(self, gradients: Sequence[Any]) -> list[Any]:
        """What the engine's optimiser then does with the gradients that ``reduce_gradients`` returned."""
        return list(gradients)

    def reduced_gradients(self, gradients: Sequence[Any]) -> list[Any]:
        """The global gradient, for an optimiser that looks at it before the engine's own reduction, which must leave it
        as it is. Collective."""
        return self.reduce_gradients(gradients)

    def keras_2_optimizer(self, optimizer: Any) -> Any:
        """An optimiser of Keras 2 that reduces as the engine does; its own do that for strategies, before all else."""
        return optimizer

    def broadcast(self, variables: Sequence[tf.Variable], root: int) -> None:  # noqa: B027 (nothing is right)
        """Give all workers the values of worker ``root``. Strategies keep copies alike by themselves."""

    def reduce_loss(self, value: Any) -> tf.Tensor:
        """The global value of a replica's share: the sum, or under "mean" the mean. Collective."""
        if isinstance(value, tf.distribute.DistributedValues):
            raise ValueError(
                f"global_value: loss is a {type(value).__name__}, but no strategy is in scope. Write backend=strategy, "
                "or use the loss's own global_value."
            )
        total = self.all_reduce(tf.convert_to_tensor(value))
        return total / tf.cast(self.gradient_scale, total.dtype)


def within(limit_s: float, exchange: Callable[[], _Result]) -> _Result:
    """What a collective of an engine without limits gives: it waits in a thread of its own, and the caller beside it.

    Raises TimeoutError where the others did not come in time, or the collective failed.
    """
    done: list[Any] = []

    def run() -> None:
        try:
            done.append(exchange())
        except Exception as error:
            done.append(error)

    waiting = threading.Thread(target=run, daemon=True, name="distpad-exchange")
    waiting.start()
    waiting.join(min(limit_s, threading.TIMEOUT_MAX))
    if not done:
        raise TimeoutError(f"the other workers did not come within {limit_s:g} s")
    if isinstance(done[0], Exception):
        raise TimeoutError(str(done[0])) from done[0]
    return done[0]
