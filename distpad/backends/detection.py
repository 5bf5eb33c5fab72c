"""Detection of the engine that runs this code. If two engines are possible, an error names the argument to write."""

from __future__ import annotations

import sys
from typing import Any

import tensorflow as tf

from distpad import errors
from distpad.backends import alone, base, horovod, local, strategy
from distpad.launcher import topology


def resolve(backend: Any = None, *, function: str = "distpad") -> base.Backend:
    """Return the backend that ``backend=`` names, or detect the engine that runs this code.

    Args:
      backend: a Backend, a ``tf.distribute.Strategy``, ``"local"``, ``"horovod"``, or None: Horovod if it is
        initialised, else the strategy in scope, else one device.
      function: the public function's name, for messages.

    Raises:
      ValueError: an unknown name; a backend of fewer replicas than the strategy whose replica runs this code. With
        None: a process that was started as one of several, but has neither an initialised Horovod nor a strategy of
        several workers in scope; several Horovod ranks with a strategy of several replicas.
      TypeError: another type.
      DistpadError: the engine differs from the launcher's expected topology (topology.py).

    >>> resolve("local").num_replicas
    1
    """
    if alone.is_alone():  # also with a backend that the caller names
        return local.LocalBackend()
    if backend is None:
        return _detect(function)
    found = _named(backend, function)
    context = tf.distribute.get_replica_context()
    running = 1 if context is None else context.strategy.num_replicas_in_sync
    if found.num_replicas < running and not isinstance(found, horovod.HorovodBackend):
        raise _too_few(function, found, running, f"replicas of {type(context.strategy).__name__}")
    return found


def resolve_step(backend: Any = None, *, function: str = "distpad") -> base.Backend:
    """``resolve`` for a training step, which must span all replicas that train together.

    Raises the errors of ``resolve``; also ValueError if the backend is one device, but Horovod runs several ranks.
    """
    found = resolve(backend, function=function)
    ranks = _horovod_ranks()
    if found.num_replicas == 1 < ranks and not alone.is_alone() and not isinstance(found, horovod.HorovodBackend):
        raise _too_few(function, found, ranks, "ranks of Horovod")
    return found


def _named(backend: Any, function: str) -> base.Backend:
    if isinstance(backend, base.Backend):
        return backend
    if isinstance(backend, tf.distribute.Strategy):
        return strategy.StrategyBackend(backend)
    if isinstance(backend, str):
        errors.choice(function, "backend", backend, ("local", "horovod"))
        return local.LocalBackend() if backend == "local" else horovod.HorovodBackend()
    kinds = "a Backend, a tf.distribute.Strategy, 'local', 'horovod' or None"
    raise TypeError(errors.sentence(function, "backend", type(backend).__name__, kinds))


def _too_few(function: str, found: base.Backend, running: int, of: str) -> ValueError:
    """The error for a backend whose sums would leave replicas out."""
    value = f"{found.name!r}, with {found.num_replicas} replica{'s' * (found.num_replicas > 1)}"
    remedy = "Omit backend=. For one device beside the others, use distpad.backends.run_alone."
    return ValueError(errors.sentence(function, "backend", value, f"one of all {running} {of}", remedy))


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
            return _in_scope(in_scope, function)
    if ranks:
        return horovod.HorovodBackend()
    topology.refuse_alone(function)
    return local.LocalBackend()


def _in_scope(in_scope: tf.distribute.Strategy, function: str) -> base.Backend:
    """The backend of the strategy in scope.

    Raises ValueError for a strategy of a single worker in a job of several workers, each of which would train alone.
    """
    found = strategy.StrategyBackend(in_scope)
    if found.num_workers == 1 and not isinstance(in_scope, tf.distribute.OneDeviceStrategy):
        topology.refuse_alone(function)
    return found


def _horovod_ranks() -> int:
    """The number of ranks of an initialised Horovod, or 0. Does not import Horovod."""
    hvd = sys.modules.get("horovod.tensorflow")
    return int(hvd.size()) if hvd is not None and hvd.is_initialized() else 0
