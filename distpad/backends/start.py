"""Start an engine by name, for commands and examples that are told on the command line which one to use."""

from __future__ import annotations

import json
import os
from typing import Any

import tensorflow as tf

from distpad import errors
from distpad.backends import base, horovod, local, strategy
from distpad.launcher import topology

KINDS = ("auto", "local", "mirrored", "multiworker", "horovod")
_LAUNCHED = ("mirrored", "multiworker", "horovod")  # by distpad launch --backend


def start(kind: str = "auto", replicas: int | None = None) -> base.Backend:
    """Make the backend that a process was started for. Call it before TensorFlow computes anything.

    Args:
      kind: "local"; "mirrored": the GPUs of this machine, or ``replicas`` CPU devices; "multiworker": the workers of
        TF_CONFIG; "horovod": the ranks of horovodrun or mpirun; "auto": what the launcher or the environment tells,
        else "mirrored" where ``replicas`` are asked for, else "local".
      replicas: how many replicas there must be; left out, as many as the launcher promised, or as there are.

    Raises:
      ValueError: an unknown kind, another one than the launcher was told, another number of replicas than asked for, or
        one of several processes that would work alone without having been told to be "local".
      DistpadError: the engine came up with fewer or other workers, hosts or replicas than the launcher promised.

    >>> start("local").num_replicas
    1
    """
    errors.choice("start", "kind", kind, KINDS)
    told = _told_by_launcher()
    if told and kind not in ("auto", told):
        remedy = f"Launch it with --backend {kind}, or write 'auto'." if kind in _LAUNCHED else "Start it by itself."
        raise ValueError(
            errors.sentence(
                "start", "kind", repr(kind), f"{told!r}, as which distpad launch started this process", remedy
            )
        )
    auto = kind == "auto"
    if auto:
        kind = told or _told_by_environment() or ("mirrored" if (replicas or 1) > 1 else "local")
    if kind == "mirrored" or (auto and kind == "local"):
        topology.refuse_alone("start")
    if kind == "mirrored" and replicas is None:
        replicas = topology.number(os.environ, "DISTPAD_REPLICAS") or None
    backend = _make(kind, replicas)
    if replicas is not None and backend.num_replicas != replicas:
        raise ValueError(
            f"start: replicas is {replicas}, expected {backend.num_replicas}, which is what {kind} was started with."
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
    """A rank's own GPU, by its number on its host; a rank that is shown a single one knows it as number 0."""
    if len(gpus) > 1 and local_rank >= len(gpus):
        remedy = "Start as many ranks as there are GPUs (-H host:N), or show each rank one (CUDA_VISIBLE_DEVICES)."
        raise ValueError(
            errors.sentence("start", "local rank", local_rank, f"below {len(gpus)}, the GPUs here", remedy)
        )
    return gpus[local_rank if len(gpus) > 1 else 0]


def _devices(replicas: int | None) -> list[str] | None:
    """The first GPUs, or logical devices of the CPU; None for all that there are."""
    if replicas is None:
        return None
    gpus = tf.config.list_physical_devices("GPU")
    if gpus and len(gpus) < replicas:
        remedy = "Ask for fewer, or look at distpad doctor and CUDA_VISIBLE_DEVICES."
        raise ValueError(errors.sentence("start", "replicas", replicas, f"at most {len(gpus)}, the GPUs here", remedy))
    if gpus:
        return [f"GPU:{i}" for i in range(replicas)]
    parts = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], parts)
    return [f"CPU:{i}" for i in range(replicas)]


def _told_by_launcher() -> str | None:
    told = os.environ.get("DISTPAD_BACKEND")
    if told:
        errors.choice("start", "DISTPAD_BACKEND", told, _LAUNCHED)
    return told or None


def _told_by_environment() -> str | None:
    if any(name in os.environ for name in ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")):
        return "horovod"
    if json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster"):
        return "multiworker"
    return None
