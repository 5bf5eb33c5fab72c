"""Which engine runs this code. Detection never guesses: where two answers are possible, it says what to write."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import tensorflow as tf

from distpad import errors
from distpad.backends import base, horovod, local, strategy

_PROMISES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # what Horovod's own start-up reads


def resolve(backend: Any = None, *, function: str = "distpad") -> base.Backend:
    """The backend that ``backend=`` names; left out, the one in whose hands this code runs.

    Args:
      backend: a Backend, a ``tf.distribute.Strategy``, ``"local"``, ``"horovod"``, or None: Horovod when it is
        initialised, else the strategy in scope, else one device.
      function: the public function's name, for messages.

    Raises:
      ValueError: an unknown name; or, with None, a process that was started as one of several but has neither an
        initialised Horovod nor a strategy in scope; or several Horovod ranks with a strategy of several replicas.
      TypeError: anything else.

    >>> resolve("local").num_replicas
    1
    """
    if isinstance(backend, base.Backend):
        return backend
    if isinstance(backend, tf.distribute.Strategy):
        return strategy.StrategyBackend(backend)
    if isinstance(backend, str):
        errors.choice(function, "backend", backend, ("local", "horovod"))
        return local.LocalBackend() if backend == "local" else horovod.HorovodBackend()
    if backend is not None:
        kinds = "a Backend, a tf.distribute.Strategy, 'local', 'horovod' or None"
        raise TypeError(errors.sentence(function, "backend", type(backend).__name__, kinds))
    return _detect(function)


def _detect(function: str) -> base.Backend:
    ranks = _horovod_ranks()
    if tf.distribute.has_strategy():
        in_scope = tf.distribute.get_strategy()
        several = in_scope.num_replicas_in_sync > 1
        if ranks > 1 and several:
            raise ValueError(
                f"{function}: Horovod runs {ranks} ranks and {type(in_scope).__name__} "
                f"{in_scope.num_replicas_in_sync} replicas, expected one engine. Use one device a rank, or write "
                "backend='horovod' or backend=strategy."
            )
        if several or not ranks:
            return strategy.StrategyBackend(in_scope)
    if ranks:
        return horovod.HorovodBackend()
    _refuse_a_lone_member(function)
    return local.LocalBackend()


def _horovod_ranks() -> int:
    """The ranks of an initialised Horovod, or 0. Horovod is looked at only where the process has imported it."""
    hvd = sys.modules.get("horovod.tensorflow")
    return int(hvd.size()) if hvd is not None and hvd.is_initialized() else 0


def _refuse_a_lone_member(function: str) -> None:
    """A process that was started as one of several must not train as if it were alone."""
    members = _tf_config_workers()
    if members > 1:
        raise ValueError(
            f"{function}: TF_CONFIG names {members} workers, but no strategy is in scope. Call it inside strategy.run, "
            "write backend=strategy, or backend='local' if this process is meant to work alone."
        )
    for name in _PROMISES:
        if os.environ.get(name, "1") not in ("", "0", "1"):
            raise ValueError(
                f"{function}: {name} promises {os.environ[name]} ranks, but Horovod is not initialised. Call "
                "horovod.tensorflow.init() first, or write backend='local' if this process is meant to work alone."
            )


def _tf_config_workers() -> int:
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
        return len(cluster.get("worker", [])) + len(cluster.get("chief", []))
    except (ValueError, AttributeError):
        return 0  # TensorFlow itself says what is wrong with a broken TF_CONFIG
