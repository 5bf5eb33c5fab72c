"""Start an engine by name, for programs that take it from the command line."""

from __future__ import annotations

import json
import os
from typing import Any

import tensorflow as tf

from distpad import errors
from distpad.backends import base, expected_gpus, horovod, local, strategy
from distpad.launcher import topology

KINDS = ("auto", "local", "mirrored", "multiworker", "horovod")
_LAUNCHED = ("mirrored", "multiworker", "horovod")  # by distpad launch --backend
_MOST = 2**12  # replicas


def start(kind: str = "auto", replicas: int | None = None) -> base.Backend:
    """Make the backend of this process. Call it before TensorFlow runs an operation.

    Args:
      kind: "local"; "mirrored": the GPUs of this machine, or ``replicas`` CPU devices; "multiworker": the workers of
        TF_CONFIG; "horovod": the ranks of horovodrun or mpirun; "auto": the engine of the launcher or the environment,
        else "mirrored" if ``replicas`` is above 1, else "local".
      replicas: the required number of replicas; default: the launcher's expected number, or all devices.

    Raises:
      TypeError: ``replicas`` is not an integer.
      ValueError: an unknown kind, another kind than the launcher's, another number of replicas than required, or one
        of several processes that would train alone, unless kind is "local".
      DistpadError: the engine differs from the launcher's expected topology, or TensorFlow does not see the expected
        GPUs.

    >>> start("local").num_replicas
    1
    """
    errors.choice("start", "kind", kind, KINDS)
    launched = _kind_of_launcher()
    if launched and kind not in ("auto", launched):
        remedy = f"Launch it with --backend {kind}, or write 'auto'." if kind in _LAUNCHED else "Start it by itself."
        rule = f"{launched!r}, the --backend of distpad launch"
        raise ValueError(errors.sentence("start", "kind", errors.shown(kind), rule, remedy))
    if replicas is not None:
        replicas = errors.integer("start", "replicas", replicas, least=1, most=_MOST)
    auto = kind == "auto"
    if auto:
        kind = launched or _kind_of_environment() or ("mirrored" if (replicas or 1) > 1 else "local")
    if kind == "mirrored" or (auto and kind == "local"):
        topology.refuse_alone("start")
    expected_gpus.check()  # before CPU devices take the place of missing GPUs
    if kind == "mirrored" and replicas is None:
        replicas = topology.number(os.environ, "DISTPAD_REPLICAS") or None
    backend = _make(kind, replicas)
    if replicas is not None and backend.num_replicas != replicas:
        raise ValueError(
            f"start: replicas is {replicas}, expected {backend.num_replicas}, the number of replicas of {kind}."
        )
    return backend


def _make(kind: str, replicas: int | None) -> base.Backend:
    if kind == "local":
        return local.LocalBackend()
    if kind == "mirrored":
        return strategy.StrategyBackend(tf.distribute.MirroredStrategy(_devices(replicas)))
    if kind == "multiworker":
        if "TF_CONFIG" not in os.environ:
            raise ValueError("start: TF_CONFIG is not set, expected it to name the workers. Use launch/multiworker.sh.")
        return strategy.StrategyBackend(tf.distribute.MultiWorkerMirroredStrategy())
    try:
        import horovod.tensorflow as hvd
    except ImportError as error:
        raise ImportError("start: Horovod is not installed. Build it with launch/install_horovod.sh.") from error
    hvd.init()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        tf.config.set_visible_devices(_gpu_of(hvd.local_rank(), gpus), "GPU")
    return horovod.HorovodBackend()


def _gpu_of(local_rank: int, gpus: list[Any]) -> Any:
    """A rank's own GPU, by its index on its host. A rank that sees only its own GPUs knows the first as index 0."""
    if len(gpus) in (1, topology.number(os.environ, "DISTPAD_GPUS")):
        return gpus[0]
    if local_rank >= len(gpus):
        remedy = "Start one rank per GPU (-H host:N), or make one GPU visible to each rank (CUDA_VISIBLE_DEVICES)."
        raise ValueError(
            errors.sentence("start", "local rank", local_rank, f"below {len(gpus)}, the GPUs here", remedy)
        )
    return gpus[local_rank]


def _devices(replicas: int | None) -> list[str] | None:
    """The first GPUs, or logical devices of the CPU; None for all devices."""
    if replicas is None:
        return None
    gpus = tf.config.list_physical_devices("GPU")
    if gpus and len(gpus) < replicas:
        remedy = "Pass a smaller number, or check CUDA_VISIBLE_DEVICES with distpad doctor."
        raise ValueError(errors.sentence("start", "replicas", replicas, f"at most {len(gpus)}, the GPUs here", remedy))
    if gpus:
        return [f"GPU:{i}" for i in range(replicas)]
    parts = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], parts)
    return [f"CPU:{i}" for i in range(replicas)]


def _kind_of_launcher() -> str | None:
    kind = os.environ.get("DISTPAD_BACKEND")
    if kind:
        errors.choice("start", "DISTPAD_BACKEND", kind, _LAUNCHED)
    return kind or None


def _kind_of_environment() -> str | None:
    if any(name in os.environ for name in ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")):
        return "horovod"
    if json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster"):
        return "multiworker"
    return None
