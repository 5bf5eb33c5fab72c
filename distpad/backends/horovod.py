"""HorovodBackend: one replica per rank. Making a backend imports Horovod; importing this module does not."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.backends import base, expected_gpus
from distpad.launcher import topology

# dtypes that Horovod does not broadcast, and the dtypes of the same width to which they are cast
_CARRIERS = {tf.bfloat16: tf.uint16, tf.uint32: tf.int32, tf.uint64: tf.int64, tf.complex64: tf.int64}


class HorovodBackend(base.Backend):
    """The ranks of an initialised Horovod, or of one of its process sets.

    The numbers of ranks are read from Horovod each time, since an elastic job can change them (see ``ElasticState``).

    Args:
      op: how gradients are reduced: "average" (Horovod's default) or "sum". If you keep Horovod's own tape or
        optimiser, give its operation. Adasum is an error, because it is neither a mean nor a sum.
      process_set: a ``hvd.ProcessSet`` that this rank belongs to; None for all ranks.
      compression: the compression of ``distpad.gradient``, such as ``hvd.Compression.fp16``; None for no compression.

    Raises:
      ValueError: an unknown ``op``, Adasum, Horovod not initialised, or a process set without this rank.
      ImportError: Horovod is not installed.
      DistpadError: Horovod's ranks differ from the launcher's expected topology.
    """

    name = "horovod"

    def __init__(self, op: str = "average", process_set: Any = None, compression: Any = None) -> None:
        _check_op(op)
        self._hvd = initialised()
        expected_gpus.check(has_chosen=True)
        topology.check(_report(self._hvd))
        everyone = self._hvd.global_process_set
        self.process_set = process_set or everyone
        self.compression = compression or self._hvd.Compression.none
        # The set of all ranks is not queried: right after init() it may still be empty (0.28.1 over MPI).
        if self.process_set is not everyone and not self.process_set.included():
            remedy = "Run this code only on the ranks of the set."
            raise ValueError(
                errors.sentence("HorovodBackend", "process_set", self.process_set, "a set with this rank", remedy)
            )
        self.gradient_reduction = {"average": "mean", "sum": "sum"}[op]

    @property
    def num_workers(self) -> int:  # type: ignore[override] # it can change in an elastic job
        return int(self._ranks().size())

    @property
    def num_replicas(self) -> int:  # type: ignore[override] # as above
        return self.num_workers

    @property
    def worker_index(self) -> int:  # type: ignore[override] # as above
        return int(self._ranks().rank())

    def _ranks(self) -> Any:
        """The object with ``size`` and ``rank``: Horovod itself for all ranks, for the reason in ``__init__``."""
        return self._hvd if self.has_all_ranks else self.process_set

    def replica_count(self) -> Any:
        return _membership()[0] if self.is_elastic else self.num_replicas

    def replica_index(self) -> tf.Tensor:
        return tf.cast(_membership()[1], tf.int32) if self.is_elastic else tf.constant(self.worker_index)

    @property
    def has_all_ranks(self) -> bool:
        """Whether the backend spans all ranks of the job."""
        return self.process_set is self._hvd.global_process_set

    @property
    def is_elastic(self) -> bool:  # type: ignore[override]
        return self.has_all_ranks and is_elastic()

    # Every collective has an explicit name. Horovod pairs tensors by name. TensorFlow's names depend on the operations
    # before them, which may differ between ranks if one of them reports an error.

    def all_reduce(self, tensor: tf.Tensor) -> tf.Tensor:
        return self._all_reduce(tensor, self._hvd.Sum, "distpad_sum")

    def all_gather_rows(self, tensor: tf.Tensor) -> tf.Tensor:
        carried = {tf.bfloat16: tf.float32}.get(tensor.dtype, tensor.dtype)
        rows = self._hvd.allgather(tf.cast(tensor, carried), name="distpad_rows", process_set=self.process_set)
        return tf.cast(rows, tensor.dtype)

    def host_sum(self, array: np.ndarray) -> np.ndarray:
        return self._on_host(array, self._hvd.Sum, "distpad_host_sum")

    def host_max(self, array: np.ndarray) -> np.ndarray:
        return self._on_host(array, self._hvd.Max, "distpad_host_max")

    def host_all_gather_bytes(self, given: bytes) -> list[bytes]:
        sizes = self.host_all_gather(np.array(len(given), np.int64))
        with tf.device("CPU:0"):
            mine = tf.constant(np.frombuffer(given, np.uint8))
            rows = self._hvd.allgather(mine, name="distpad_host_rows", process_set=self.process_set).numpy()
        return [part.tobytes() for part in np.split(rows, np.cumsum(sizes)[:-1])]

    def host_merge(
        self, maxima: np.ndarray, sums: np.ndarray, limit_s: float, channel: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        def merge() -> tuple[np.ndarray, np.ndarray]:
            merged = self._merged(tf.constant(maxima), tf.constant(sums), f"plan_{channel}")
            return merged[0].numpy(), merged[1].numpy()

        # Horovod has no time limit for a lost rank. It matches collectives by name, from any thread.
        return base.within(limit_s, merge)

    @functools.cached_property
    def _merged(self) -> Any:
        """Both reductions in one graph, so that they are submitted together, in one cycle of Horovod."""

        @tf.function(autograph=False, reduce_retracing=True)
        def merged(maxima: tf.Tensor, sums: tf.Tensor, name: str) -> tuple[tf.Tensor, tf.Tensor]:
            with tf.device("CPU:0"):
                return (
                    self._all_reduce(maxima, self._hvd.Max, f"distpad_{name}_max"),
                    self._all_reduce(sums, self._hvd.Sum, f"distpad_{name}_sum"),
                )

        return merged

    def reduce_gradients(self, gradients: Sequence[Any]) -> list[Any]:
        """Reduce all dense gradients in one fused group, and each sparse gradient by gathering; None stays None.

        Raises: ValueError: gradients that were summed before. (A mean of means over equal ranks changes nothing.)
        """
        op = self._hvd.Average if self.gradient_reduction == "mean" else self._hvd.Sum
        if self.gradient_reduction == "sum" and any(hasattr(gradient, "is_global") for gradient in gradients):
            found, rule = "already summed over the ranks, by distpad.gradient", "those of a tape"
            remedy = "Use distpad.gradient with Keras's optimizer, or tape.gradient with distpad.DistributedOptimizer."
            raise ValueError(errors.sentence("HorovodBackend(op='sum')", "gradients", found, rule, remedy))
        reduced = list(gradients)
        dense = [i for i, gradient in enumerate(reduced) if isinstance(gradient, tf.Tensor)]
        packed = [self.compression.compress(reduced[i]) for i in dense]
        named = [_named(tensor, f"distpad_gradient_{i}") for i, (tensor, _) in zip(dense, packed)]
        group = self._hvd.grouped_allreduce(named, op=op, process_set=self.process_set)
        for i, tensor, (_, context) in zip(dense, group, packed):
            reduced[i] = self.compression.decompress(tensor, context)
        for i, gradient in enumerate(reduced):
            # one by one, since grouped_allreduce of 0.28.1 confuses the shapes of sparse gradients among dense ones
            if isinstance(gradient, tf.IndexedSlices):
                values = _named(gradient.values, f"distpad_values_{i}")
                indices = _named(gradient.indices, f"distpad_indices_{i}")
                sparse = tf.IndexedSlices(values, indices, gradient.dense_shape)
                reduced[i] = self._hvd.allreduce(sparse, op=op, process_set=self.process_set)
            if gradient is not None:
                reduced[i].is_global = True
        return reduced

    def keras_2_optimizer(self, optimizer: Any) -> Any:
        """As Horovod's DistributedOptimizer, which reduces in ``minimize`` alone: here ``apply_gradients`` reduces."""
        scaling, backend = tf.keras.mixed_precision.LossScaleOptimizer, self
        if isinstance(optimizer, scaling):  # reduces by the inner optimiser before it checks the gradients
            settings = ("dynamic", "initial_scale", "dynamic_growth_steps")
            inner = self.keras_2_optimizer(optimizer.inner_optimizer)
            return scaling(inner, **{name: getattr(optimizer, name) for name in settings})

        def aggregate(_: Any, grads_and_vars: Any) -> list[Any]:
            gradients, variables = zip(*grads_and_vars)
            return list(zip(backend.reduce_gradients(gradients), variables))

        kind = type(optimizer)
        methods = {"aggregate_gradients": aggregate, "_aggregate_gradients": aggregate}  # the second: legacy optimisers
        # with the name of Keras's class, by which a saved model finds it
        reducing: Any = type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})
        return reducing.from_config(optimizer.get_config())

    def broadcast(self, variables: Sequence[tf.Variable], root: int) -> None:
        root_rank = self.process_set.ranks[root] if self.process_set.ranks else root

        @tf.function(autograph=False)  # one graph for all variables
        def assign_all() -> None:
            for i, variable in enumerate(variables):
                carrier = _CARRIERS.get(variable.dtype, variable.dtype)
                given = (
                    tf.bitcast(variable.read_value(), carrier) if carrier != variable.dtype else variable.read_value()
                )
                name = f"distpad_broadcast_{i}"
                value = self._hvd.broadcast(given, root_rank, name=name, process_set=self.process_set)
                variable.assign(tf.bitcast(value, variable.dtype) if carrier != variable.dtype else value)

        assign_all()

    def close(self) -> None:
        self._hvd.shutdown()

    def _all_reduce(self, tensor: tf.Tensor, op: Any, name: str) -> tf.Tensor:
        if not tf.executing_eagerly():
            # Horovod's operations are not marked as stateful: TensorFlow would evaluate operations of constants during
            # shape inference, and only on the ranks whose inputs are constants.
            tensor = tf.compat.v1.placeholder_with_default(tensor, tensor.shape)
        return self._hvd.allreduce(tensor, op=op, name=name, process_set=self.process_set)

    def _on_host(self, array: np.ndarray, op: Any, name: str) -> np.ndarray:
        with tf.device("CPU:0"):
            return self._all_reduce(tf.constant(np.asarray(array)), op, name).numpy()


def is_elastic() -> bool:
    """Whether this process belongs to an elastic job, whose number of ranks may change."""
    return os.environ.get("HOROVOD_ELASTIC", "0") not in ("", "0")


def renew() -> None:
    """Update the number of ranks, and this rank, in functions that were traced before an elastic job re-formed."""
    hvd = initialised()
    _membership().assign([hvd.size(), hvd.rank()])


@functools.lru_cache(maxsize=1)
def _membership() -> tf.Variable:
    """The number of ranks, and this rank, as a variable: a traced function stays correct after an elastic job re-forms.

    Horovod's ``size_op`` does not compile under XLA.
    """
    hvd = initialised()
    with tf.init_scope():  # the caller may be a function that is being traced
        return tf.Variable([hvd.size(), hvd.rank()], trainable=False, dtype=tf.float64, name="distpad_membership")


def _named(tensor: tf.Tensor, name: str) -> tf.Tensor:
    """The tensor with an explicit name, for collectives that take their name from the tensor."""
    return tf.identity(tensor, name=name)


def _check_op(op: str) -> None:
    if str(op).lower() == "adasum":
        raise ValueError(
            errors.sentence("HorovodBackend", "op", errors.shown(op), "a mean or a sum; Adasum is neither")
        )
    errors.choice("HorovodBackend", "op", op, ("average", "sum"))


def initialised() -> Any:
    """Return the module ``horovod.tensorflow``. ImportError if it is not installed, ValueError if not initialised."""
    try:
        import horovod.tensorflow as hvd
    except ImportError as error:
        raise ImportError(
            "distpad: Horovod is not installed for this Python. Build it with launch/install_horovod.sh."
        ) from error
    if not hvd.is_initialized():
        raise ValueError("distpad: Horovod is not initialised. Call horovod.tensorflow.init() first.")
    return hvd


def _report(hvd: Any) -> topology.Report:
    """Horovod's report of the whole job, also with a process set."""
    size, controller = int(hvd.size()), "mpi" if hvd.mpi_enabled() else "gloo"
    return topology.Report("Horovod", workers=size, replicas=size, hosts=_hosts(hvd, size), controller=controller)


def _hosts(hvd: Any, size: int) -> int | None:
    """The number of hosts; None if this rank cannot know it. ``cross_size`` counts hosts that have this local rank."""
    if hvd.local_size() == size:
        return 1
    return int(hvd.cross_size()) if hvd.local_rank() == 0 or hvd.is_homogeneous() else None
