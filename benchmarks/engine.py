"""Shared code of the benchmarks: the engine of the launcher, and a training step on all replicas."""

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
# one core for each of two workers: without a limit, each worker uses both
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tensorflow as tf

from distpad import backends

# TensorFlow warns about retracing. The benchmarks retrace on purpose.
logging.getLogger("tensorflow").setLevel(logging.ERROR)


def start(*, mixed_precision: bool = False, replicas: int | None = None) -> backends.Backend:
    """Start the engine of horovodrun, mpirun or TF_CONFIG. Without a launcher, start devices, by default one."""
    tf.keras.mixed_precision.set_global_policy("mixed_float16" if mixed_precision else "float32")
    return backends.start(replicas=replicas)


class Trainer:
    """A model and its training step. The code is the same for every engine.

    Args:
      backend: backend of the engine.
      build: function that creates the model, in the engine's scope.
      loss: ``loss(model, batch)``, the local contribution of a replica to the mean.
      jit_compile: compile forward and backward pass with XLA; the gradient all-reduce stays outside.
      batch: specs of a batch, to trace the step once for all sizes; None: trace it for each size.
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

        # tf.function only under jit_compile: under MirroredStrategy, a nested tf.function cannot contain a collective
        differ = tf.function(differentiate, autograph=False, jit_compile=True) if jit_compile else differentiate

        def step(batch: Any) -> tf.Tensor:
            value, gradients = differ(batch)
            reduced = backend.reduce_gradients(gradients)
            self.optimizer.apply_gradients(zip(reduced, self.model.trainable_variables))
            return value

        run = step if strategy is None else lambda batch: strategy.run(step, args=(batch,))
        self.step = tf.function(run, autograph=False, input_signature=None if batch is None else [batch])
