"""The engines that train: one device, the replicas of one process, several processes, Horovod's ranks.

Importing this module imports TensorFlow, but starts nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

import distpad
from distpad import backends

BACKENDS = ("local", "mirrored", "multiworker", "horovod")
DEFAULT_REPLICAS = 4
CERTIFIED = 14  # random steps: one of each kind, in both precisions


@dataclass(frozen=True)
class Engine:
    """Who trains together.

    Attributes:
        name: one of BACKENDS.
        backend: what distpad calls it.
    """

    name: str
    backend: backends.Backend

    @property
    def replicas(self) -> int:
        """Over all workers."""
        return self.backend.num_replicas

    @property
    def worker(self) -> int:
        """This process's number; worker 0 prints and writes."""
        return self.backend.worker_index

    @property
    def strategy(self) -> tf.distribute.Strategy | None:
        """Where the engine is one."""
        return getattr(self.backend, "strategy", None)

    def scope(self) -> contextlib.AbstractContextManager:
        """Where model and optimiser are made."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def compile(self, step: Callable[[Any], tf.Tensor]) -> Callable[[Any], Any]:
        """A function that runs ``step`` on all replicas, traced once for each shape of a batch.

        Workers that retrace at different steps wait for one another, or hang; the batches of ``PaddedBatches`` have the
        same shape on all of them.
        """
        strategy = self.strategy
        run = step if strategy is None else lambda batch: strategy.run(step, args=(batch,))
        return tf.function(run, autograph=False)


LOCAL = Engine("local", backends.LocalBackend())


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
    if name == "mirrored":
        replicas = replicas or DEFAULT_REPLICAS
    try:
        return Engine(name, backends.start(name, replicas))
    except (ValueError, ImportError) as error:
        raise ValueError(f"--backend {name}: {error}") from error


def certify(engine: Engine) -> None:
    """Prove on these workers that the gradients of random steps are those of one device; worker 0 prints the proof.

    Collective: all workers call it.

    Raises:
        ValueError: on all workers, where they are not. The engine is closed by then.
    """
    with engine.scope():
        certificate = distpad.certify(cases=CERTIFIED, backend=engine.backend)
    if engine.worker == 0:
        print(certificate, flush=True)
    if not certificate.passed:
        engine.backend.close()  # together: who left early would take the others' error from them
        raise ValueError(
            f"--certify: gradients on these {certificate.num_replicas} replicas are off by "
            f"{certificate.max_relative_error:.1%} of their size, expected those of one device. Run distpad doctor, "
            "and distpad certify on fewer hosts."
        )
