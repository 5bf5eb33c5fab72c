"""The engines that train: one device, the replicas of one process, several processes, Horovod's ranks.

Importing this module imports TensorFlow, but starts nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

BACKENDS = ("local", "mirrored", "multiworker", "horovod")
DEFAULT_REPLICAS = 4

Rows = dict  # name -> array, of one replica, or after ``feed`` of each


@dataclass(frozen=True)
class Engine:
    """Who trains together.

    Attributes:
        name: one of BACKENDS.
        backend: what distpad calls it.
        replicas: over all workers.
        worker: this process's number; worker 0 prints and writes.
        here: the numbers of this worker's replicas.
        strategy: where the engine is a strategy.
    """

    name: str
    backend: Any
    replicas: int
    worker: int
    here: tuple[int, ...]
    strategy: tf.distribute.Strategy | None = None

    def scope(self) -> contextlib.AbstractContextManager:
        """Where model and optimiser are made."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def feed(self, rows: dict[int, Rows]) -> Rows:
        """Hand each of this worker's replicas its rows, as tensors."""
        if self.strategy is None:
            return tf.nest.map_structure(tf.constant, rows[self.here[0]])
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: tf.nest.map_structure(tf.constant, rows[context.replica_id_in_sync_group])
        )

    def compile(self, step: Callable[[Rows], tf.Tensor], small: Rows, large: Rows) -> Callable[[Rows], Any]:
        """A function that runs ``step`` on all replicas, traced once for rows of any size.

        Workers that retrace at different steps wait for one another, or hang. So the sizes that differ between two
        examples, ``small`` and ``large`` (rows of one replica), are left open from the beginning.
        """
        specs = tf.nest.map_structure(
            lambda a, b: tf.type_spec_from_value(a).most_specific_common_supertype([tf.type_spec_from_value(b)]),
            self.feed(dict.fromkeys(self.here, small)),
            self.feed(dict.fromkeys(self.here, large)),
        )

        @tf.function(input_signature=[specs], autograph=False)
        def run(batch: Rows) -> Any:
            return self.strategy.run(step, args=(batch,)) if self.strategy else step(batch)

        return run


LOCAL = Engine("local", "local", replicas=1, worker=0, here=(0,))


def start(name: str, replicas: int | None) -> Engine:
    """Start an engine. Nothing of TensorFlow may have run before.

    Args:
        name: one of BACKENDS.
        replicas: over all workers; None: as many as the launcher started, 4 for "mirrored", 1 for "local".

    Raises:
        ValueError: a number that the engine cannot have, or a process that was not started for this engine.
    """
    if name not in BACKENDS:
        raise ValueError(f"--backend is {name!r}, expected one of {', '.join(BACKENDS)}.")
    if replicas is not None and replicas < 1:
        raise ValueError(f"--replicas is {replicas}, expected at least 1.")
    if not tf.config.list_physical_devices("GPU"):
        # On a CPU, rewriting the graph of every replica takes longer than it saves in a run of minutes.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    if name == "local":
        _agree(replicas, 1, "--backend local trains on one device. Write --backend mirrored for several.")
        return LOCAL
    return {"mirrored": _mirrored, "multiworker": _multiworker, "horovod": _horovod}[name](replicas)


def _mirrored(replicas: int | None) -> Engine:
    replicas = replicas or DEFAULT_REPLICAS
    gpus = tf.config.list_logical_devices("GPU") if tf.config.list_physical_devices("GPU") else []
    if len(gpus) >= replicas:
        names = [gpu.name for gpu in gpus[:replicas]]
    else:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
        names = [f"CPU:{index}" for index in range(replicas)]
    strategy = tf.distribute.MirroredStrategy(names)
    if strategy.num_replicas_in_sync != replicas:
        raise ValueError(f"--replicas is {replicas}, but TensorFlow made {strategy.num_replicas_in_sync} of them.")
    return Engine("mirrored", strategy, replicas, worker=0, here=tuple(range(replicas)), strategy=strategy)


def _multiworker(replicas: int | None) -> Engine:
    try:
        task = json.loads(os.environ.get("TF_CONFIG", "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"TF_CONFIG is no JSON ({error}).") from error
    if not task.get("cluster"):
        raise ValueError("--backend multiworker needs TF_CONFIG, which the launcher sets: launch/multiworker.sh.")
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    total = strategy.num_replicas_in_sync
    _agree(replicas, total, "TF_CONFIG names the workers: start as many, or leave --replicas out.")
    here: list[int] = []  # which replicas are this worker's, only the strategy knows
    strategy.experimental_distribute_values_from_function(
        lambda context: here.append(context.replica_id_in_sync_group) or tf.constant(0)
    )
    worker = here[0] // len(here)
    return Engine("multiworker", strategy, total, worker=worker, here=tuple(here), strategy=strategy)


def _horovod(replicas: int | None) -> Engine:
    try:
        import horovod.tensorflow as hvd
    except ImportError as error:
        raise ValueError("--backend horovod needs Horovod, which launch/install_horovod.sh builds.") from error
    hvd.init()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")
    _agree(replicas, hvd.size(), "Start as many with: horovodrun -np N python train.py --backend horovod")
    return Engine("horovod", "horovod", hvd.size(), worker=hvd.rank(), here=(hvd.rank(),))


def _agree(asked: int | None, there: int, remedy: str) -> None:
    """Refuse to train with another number of replicas than was asked for."""
    if asked not in (None, there):
        raise ValueError(f"--replicas is {asked}, but there {'is' if there == 1 else 'are'} {there}. {remedy}")


def rows_here(engine: Engine, make: Callable[[int], dict[str, np.ndarray]]) -> dict[int, Rows]:
    """The rows of each of this worker's replicas."""
    return {replica: make(replica) for replica in engine.here}
