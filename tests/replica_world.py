"""The world that a process of the tests is in: its engine, and how a function is run on its replicas."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

import worlds
from distpad import backends


class World:
    """An engine and its replicas, some of which are this process's."""

    def __init__(self, spec: str) -> None:
        self.kind, self.num_replicas = worlds.parse(spec)
        self.strategy = self._strategy()
        self.local_backend = backends.LocalBackend()
        if self.kind in ("horovod", "mpirun"):
            import horovod.tensorflow as hvd

            hvd.init()
            self.backend: backends.Backend = backends.HorovodBackend()
        else:
            self.backend = backends.StrategyBackend(self.strategy) if self.strategy else self.local_backend

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
        """Call ``function(given(r))`` on each replica r; returns this process's results by replica, as NumPy."""
        called = tf.function(function) if graph and self.strategy is None else function
        if self.strategy is None:
            arguments = tf.nest.map_structure(tf.convert_to_tensor, given(self.backend.worker_index))
            return {self.backend.worker_index: _numpy(called(arguments))}
        strategy, mine = self.strategy, []

        def value_of(context: tf.distribute.experimental.ValueContext) -> Any:
            mine.append(context.replica_id_in_sync_group)
            return tf.nest.map_structure(tf.convert_to_tensor, given(context.replica_id_in_sync_group))

        arguments = strategy.experimental_distribute_values_from_function(value_of)
        step = lambda values: strategy.run(called, args=(values,))
        results = (tf.function(step) if graph else step)(arguments)
        return dict(zip(mine, _each(strategy, results)))

    def reduce(self, gradients: list[Any]) -> list[Any]:
        """What the engine's optimiser does with the replicas' gradients that ``distpad.gradient`` returned."""
        if self.strategy is None:
            return gradients
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, gradients)

    def scope(self) -> Any:
        import contextlib

        return self.strategy.scope() if self.strategy else contextlib.nullcontext()


def _each(strategy: tf.distribute.Strategy, results: Any) -> list[Any]:
    """Per-replica results as one structure a replica."""
    columns = [strategy.experimental_local_results(leaf) for leaf in tf.nest.flatten(results)]
    return [_numpy(tf.nest.pack_sequence_as(results, list(row))) for row in zip(*columns)]


def _numpy(values: Any) -> Any:
    return tf.nest.map_structure(lambda value: value.numpy() if hasattr(value, "numpy") else np.asarray(value), values)


def counting(backend):
    """The same backend, counting its sums: every exchange is one."""

    def all_reduce_sum(self, tensor):
        self.calls += 1
        return type(backend).all_reduce_sum(self, tensor)

    counted = object.__new__(type("Counting", (type(backend),), {"all_reduce_sum": all_reduce_sum}))
    counted.__dict__.update(backend.__dict__, calls=0)
    return counted


def collectives_of(world: World, function: Callable[..., Any], given: Callable[[int], Any]) -> list[str]:
    """The engine's collective operations in the graph of ``function(given(r))`` on this process's replicas, sorted."""
    if world.strategy is None:
        arguments = tf.nest.map_structure(tf.convert_to_tensor, given(world.backend.worker_index))
        traced = tf.function(function).get_concrete_function(arguments)
    else:
        arguments = world.strategy.experimental_distribute_values_from_function(
            lambda context: tf.nest.map_structure(tf.convert_to_tensor, given(context.replica_id_in_sync_group))
        )
        step = tf.function(lambda values: world.strategy.run(function, args=(values,)))
        traced = step.get_concrete_function(arguments)
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
