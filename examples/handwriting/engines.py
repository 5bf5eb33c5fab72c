"""The engines that train: one device, the replicas of one process, several processes, Horovod's ranks.

This module imports TensorFlow, but starts no engine on import.
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
CERTIFIED = 14  # number of random steps: one of each kind, in both precisions


@dataclass(frozen=True)
class Engine:
    """The replicas and workers that train together.

    Attributes:
        name: one of BACKENDS.
        backend: the engine's backend in distpad.
    """

    name: str
    backend: backends.Backend

    @property
    def replicas(self) -> int:
        """Number of replicas over all workers."""
        return self.backend.num_replicas

    @property
    def worker(self) -> int:
        """Index of this process. Worker 0 prints and writes."""
        return self.backend.worker_index

    @property
    def strategy(self) -> tf.distribute.Strategy | None:
        """The engine's strategy, or None."""
        return getattr(self.backend, "strategy", None)

    def scope(self) -> contextlib.AbstractContextManager:
        """Return the context in which to create model and optimiser."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def compile(self, step: Callable[[Any], tf.Tensor]) -> Callable[[Any], Any]:
        """Return a function that runs ``step`` on all replicas. TensorFlow traces it once for each batch shape.

        Workers that retrace at different steps wait for one another, or hang. ``PaddedBatches`` yields batches of the
        same shape on all workers.
        """
        strategy = self.strategy
        run = step if strategy is None else lambda batch: strategy.run(step, args=(batch,))
        return tf.function(run, autograph=False)


LOCAL = Engine("local", backends.LocalBackend())


def start(name: str, replicas: int | None) -> Engine:
    """Start an engine. Call this before any TensorFlow operation.

    Args:
        name: one of BACKENDS.
        replicas: number over all workers; None: as many as the launcher started, 4 for "mirrored", 1 for "local".

    Raises:
        ValueError: the engine does not support this number, or the launcher did not start the process for this engine.
    """
    if name not in BACKENDS:
        raise ValueError(f"--backend is {name!r}, expected one of {', '.join(BACKENDS)}.")
    if replicas is not None and replicas < 1:
        raise ValueError(f"--replicas is {replicas}, expected at least 1.")
    if not tf.config.list_physical_devices("GPU"):
        # On a CPU, a graph rewrite for every replica takes longer than it saves in a run of minutes.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    if name == "mirrored":
        replicas = replicas or DEFAULT_REPLICAS
    try:
        return Engine(name, backends.start(name, replicas))
    except (ValueError, ImportError) as error:
        raise ValueError(f"--backend {name}: {error}") from error


def certify(engine: Engine) -> None:
    """Check that the gradients of random steps equal those of one device. Worker 0 prints the certificate.

    Collective: all workers call it.

    Raises:
        ValueError: the gradients differ. All workers raise, after they close the engine.
    """
    with engine.scope():
        certificate = distpad.certify(cases=CERTIFIED, backend=engine.backend)
    if engine.worker == 0:
        print(certificate, flush=True)
    if not certificate.passed:
        engine.backend.close()  # all workers close together: an early exit would hide the error of the others
        raise ValueError(
            f"--certify: gradients on these {certificate.num_replicas} replicas are off by "
            f"{certificate.max_relative_error:.1%} of their size, expected the gradients of one device. "
            "Run distpad doctor. Then run distpad certify on fewer hosts."
        )
