"""The world that a process of the tests is in: its engine, and how a function is run on its replicas."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

import drawn
import worlds
from distpad import backends
from distpad.versions import KERAS

HANG_S = 60  # what takes longer to reach all workers is a hang, on a busy machine too


class World:
    """An engine and its replicas, some of which are this process's."""

    def __init__(self, spec: str) -> None:
        self.kind, self.num_replicas = worlds.parse(spec)
        # saves a seventh of the time; MPI and, in Keras 2, MultiWorkerMirroredStrategy run graphs that are optimised
        if not drawn.ALL and self.kind in ("mirrored", "horovod", *["multiworker"] * (KERAS >= 3)):
            tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        self.strategy = self._strategy()
        if self.kind in ("horovod", "mpirun"):
            import horovod.tensorflow as hvd

            hvd.init()
            self.backend: backends.Backend = backends.HorovodBackend()
        else:
            self.backend = backends.StrategyBackend(self.strategy) if self.strategy else backends.LocalBackend()

    def _strategy(self) -> tf.distribute.Strategy | None:
        if self.kind == "mirrored":
            cpu = tf.config.list_physical_devices("CPU")[0]
            logical = [tf.config.LogicalDeviceConfiguration()] * self.num_replicas
            tf.config.set_logical_device_configuration(cpu, logical)
            return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(self.num_replicas)])
        if self.kind == "multiworker":
            options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=60)
            return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
        return tf.distribute.OneDeviceStrategy("CPU:0") if self.kind == "onedevice" else None

    @property
    def several_workers(self) -> bool:
        return self.backend.num_workers > 1

    def run(self, function: Callable[..., Any], given: Callable[[int], Any], *, graph: bool = True) -> dict[int, Any]:
        """Call ``function(given(r))`` on each replica r; returns this process's results by replica, as NumPy.

        With ``graph`` in a tf.function. That of the same function is made once: the first call traces it for the shapes
        that it is given, and the second for any, whatever these are, so that all workers trace at the same calls.
        """
        mine: dict[int, Any] = {}

        def value_of(replica: int) -> Any:
            mine[replica] = tf.nest.map_structure(tf.convert_to_tensor, given(replica))
            return mine[replica]

        arguments = self.dealt(value_of)
        if graph:
            results = _traced(self, function)(arguments, lambda: self.dealt(lambda r: _larger(mine[r])))
        else:
            results = self.on_all(function)(arguments)
        return dict(zip(mine, self._each(results)))

    def dealt(self, value_of: Callable[[int], Any]) -> Any:
        """A nest of values of this process's replicas."""
        if self.strategy is None:
            return value_of(self.backend.worker_index)
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: value_of(context.replica_id_in_sync_group)
        )

    def on_all(self, function: Callable[..., Any]) -> Callable[[Any], Any]:
        strategy = self.strategy
        return function if strategy is None else lambda arguments: strategy.run(function, args=(arguments,))

    def _each(self, results: Any) -> list[Any]:
        """Per-replica results as one structure a replica."""
        if self.strategy is None:
            return [_numpy(results)]
        columns = [self.strategy.experimental_local_results(leaf) for leaf in tf.nest.flatten(results)]
        return [_numpy(tf.nest.pack_sequence_as(results, list(row))) for row in zip(*columns)]

    def reduce(self, gradients: list[Any]) -> list[Any]:
        """What the engine's optimiser does with the replicas' gradients that ``distpad.gradient`` returned."""
        if self.strategy is None:
            return gradients
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, gradients)

    def scope(self) -> Any:
        import contextlib

        return self.strategy.scope() if self.strategy else contextlib.nullcontext()


@functools.lru_cache(maxsize=8)
def _traced(world: World, function: Callable[..., Any]) -> Callable[[Any, Callable[[], Any]], Any]:
    """The function on all replicas, in a graph; it is called with arguments, and with what makes larger ones."""
    step = tf.function(world.on_all(function))
    graphs: list[Callable[[Any], Any]] = []

    def call(arguments: Any, larger: Callable[[], Any]) -> Any:
        if not graphs:
            graphs.append(step)
        elif graphs == [step]:
            types, others = (tf.nest.map_structure(tf.type_spec_from_value, each) for each in (arguments, larger()))
            wide = tf.nest.map_structure(lambda one, other: one.most_specific_common_supertype([other]), types, others)
            graphs.append(step.get_concrete_function(wide))
        return graphs[-1](arguments)

    return call


def _larger(values: Any) -> Any:
    """Zeros of the same types and other sizes."""
    return tf.nest.map_structure(lambda leaf: tf.zeros([n + 1 for n in leaf.shape], leaf.dtype), values)


def _numpy(values: Any) -> Any:
    return tf.nest.map_structure(lambda value: value.numpy() if hasattr(value, "numpy") else np.asarray(value), values)


def alone(test: Callable[..., None]) -> Callable[..., None]:
    """A test of one device, beside the world's engine."""

    @functools.wraps(test)
    def called(**given: Any) -> None:
        backends.run_alone(lambda: test(**given))

    return called


def counting(backend):
    """The same backend, counting its sums: every exchange is one."""

    def all_reduce(self, tensor):
        self.calls += 1
        return type(backend).all_reduce(self, tensor)

    counted = object.__new__(type("Counting", (type(backend),), {"all_reduce": all_reduce}))
    counted.__dict__.update(backend.__dict__, calls=0)
    return counted


def collectives_of(world: World, function: Callable[..., Any], given: Callable[[int], Any]) -> list[str]:
    """The engine's collective operations in the graph of ``function(given(r))`` on this process's replicas, sorted."""
    arguments = world.dealt(lambda r: tf.nest.map_structure(tf.convert_to_tensor, given(r)))
    traced = tf.function(world.on_all(function)).get_concrete_function(arguments)
    graph = traced.graph.as_graph_def()
    nodes = [*graph.node, *(node for part in graph.library.function for node in part.node_def)]
    return sorted(node.op for node in nodes if re.match(r"Collective(?!Assign)|Horovod\w*(reduce|gather)", node.op))


@functools.lru_cache(maxsize=1)
def made() -> World:
    """The world that DISTPAD_WORLD names, made once a process: most engines can be started only once."""
    spec = os.environ.get("DISTPAD_WORLD", "local")
    world = World(spec)
    # a test of something distributed proves nothing on one replica
    assert world.backend.num_replicas == worlds.parse(spec)[1]
    return world
