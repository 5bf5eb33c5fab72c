"""What the benchmarks share: the engine that they were started under, and a step on all of its replicas."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# one core for each of two workers: without a bound, each takes both
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tensorflow as tf

from distpad import backends

logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns of retracing, which is what is measured


def start() -> backends.Backend:
    """The engine of horovodrun, mpirun or TF_CONFIG; alone, one device."""
    return backends.start()


class Trainer:
    """A model and the step that trains it, the same code for every engine.

    Args:
      backend: who trains together.
      build: makes the model, in the engine's scope.
      loss: ``loss(model, batch)``, a replica's share of the mean that is trained on.
      jit_compile: compile forward and backward with XLA; what reduces gradients stays outside.
      batch: specs of a batch, for a step that is traced once for all sizes; None: for each size.
    """

    def __init__(
        self,
        backend: backends.Backend,
        build: Callable[[], tf.keras.Model],
        loss: Callable[[tf.keras.Model, Any], tf.Tensor],
        *,
        jit_compile: bool = False,
        batch: Any = None,
    ) -> None:
        self.backend = backend
        strategy = getattr(backend, "strategy", None)
        with strategy.scope() if strategy else contextlib.nullcontext():
            self.model = build()
            self.optimizer = tf.keras.optimizers.SGD(1e-3)
            self.optimizer.build(self.model.trainable_variables)

        def differentiate(batch: Any) -> tuple[tf.Tensor, list[tf.Tensor]]:
            with tf.GradientTape() as tape:
                value = loss(self.model, batch)
            return value, tape.gradient(value, self.model.trainable_variables)

        # a function of its own only where it must be: a loss with a collective cannot be in one under MirroredStrategy
        differ = tf.function(differentiate, autograph=False, jit_compile=True) if jit_compile else differentiate

        def step(batch: Any) -> tf.Tensor:
            value, gradients = differ(batch)
            reduced = backend.reduce_gradients(gradients)
            self.optimizer.apply_gradients(zip(reduced, self.model.trainable_variables))
            return value

        run = step if strategy is None else lambda batch: strategy.run(step, args=(batch,))
        self.step = tf.function(run, autograph=False, input_signature=None if batch is None else [batch])
