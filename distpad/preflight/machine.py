"""Probes of the machine: cores, memory, limits, and the environment variables that affect a job."""

from __future__ import annotations

import os
import platform
import resource
from typing import Any

# The values of these variables appear in reports. None of them holds a secret.
SHOWN = (
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "TF_FORCE_GPU_ALLOW_GROWTH", "OMP_NUM_THREADS"),
    *("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS", "HOROVOD_GPU_OPERATIONS", "HOROVOD_GLOO_IFACE"),
    *("NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_DEBUG"),
    *("OMPI_MCA_orte_default_hostfile", "PRTE_MCA_prte_default_hostfile", "K_MPI_JOB_ROLE"),
    *("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "JOB_COMPLETION_INDEX"),
    *("DISTPAD_BACKEND", "DISTPAD_WORKERS", "DISTPAD_HOSTS", "DISTPAD_REPLICAS", "DISTPAD_GPUS"),
)
# manager of this machine | variable that it sets
MANAGERS = {
    "Slurm": "SLURM_JOB_ID",
    "Kubernetes": "KUBERNETES_SERVICE_HOST",
    "the MPI operator": "K_MPI_JOB_ROLE",
    "an Indexed Job": "JOB_COMPLETION_INDEX",
}


def machine() -> dict[str, Any]:
    """The cores that this process may use, the memory in bytes, and the limits on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "open_files": {"soft": soft, "hard": hard},
        "managed_by": [name for name, variable in MANAGERS.items() if variable in os.environ],
    }


def shared_memory(folder: str = "/dev/shm") -> dict[str, int]:
    """The size of shared memory and its free part, in bytes."""
    size = os.statvfs(folder)
    return {"size": size.f_frsize * size.f_blocks, "free": size.f_frsize * size.f_bavail}


def environment() -> dict[str, str]:
    """The variables of SHOWN that are set."""
    return {name: os.environ[name] for name in SHOWN if name in os.environ}
