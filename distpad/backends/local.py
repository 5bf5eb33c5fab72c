"""LocalBackend: one device in one process. Every collective is the identity."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from distpad.backends import base


class LocalBackend(base.Backend):
    """A single replica in a single process.

    >>> LocalBackend().num_replicas
    1
    """

    name = "local"
    gradient_reduction = "sum"
    num_replicas = num_workers = 1
    worker_index = 0

    def replica_index(self) -> tf.Tensor:
        return tf.constant(0)

    def all_reduce(self, tensor: tf.Tensor) -> tf.Tensor:
        return tensor

    def all_gather_rows(self, tensor: tf.Tensor) -> tf.Tensor:
        return tensor

    def host_sum(self, array: np.ndarray) -> np.ndarray:
        return np.asarray(array)

    def host_max(self, array: np.ndarray) -> np.ndarray:
        return np.asarray(array)
