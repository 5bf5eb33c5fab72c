"""Probes of the machine: cores, memory, limits, GPUs, and the environment variables that affect a job."""

from __future__ import annotations

import glob
import os
import platform
import resource
import shutil
import subprocess
from typing import Any

LIMIT_S = 20
# The values of these variables appear in reports. None of them holds a secret.
SHOWN = (
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "TF_FORCE_GPU_ALLOW_GROWTH", "OMP_NUM_THREADS"),
    *("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS", "HOROVOD_GPU_OPERATIONS", "HOROVOD_GLOO_IFACE"),
    *("NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_DEBUG"),
    *("OMPI_MCA_orte_default_hostfile", "PRTE_MCA_prte_default_hostfile", "K_MPI_JOB_ROLE"),
    *("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "JOB_COMPLETION_INDEX"),
    *("DISTPAD_BACKEND", "DISTPAD_WORKERS", "DISTPAD_HOSTS", "DISTPAD_REPLICAS"),
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


def gpus() -> dict[str, Any]:
    """The GPUs that nvidia-smi lists, and the number of GPU devices in /dev. Independent of TensorFlow."""
    found: dict[str, Any] = {"devices": len(glob.glob("/dev/nvidia[0-9]*")), "names": []}
    if shutil.which("nvidia-smi"):
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode:
            found["error"] = (done.stderr or done.stdout).strip()
        found["names"] = [line.split(" (UUID")[0] for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return found


def shared_memory(folder: str = "/dev/shm") -> dict[str, int]:
    """The size of shared memory and its free part, in bytes."""
    size = os.statvfs(folder)
    return {"size": size.f_frsize * size.f_blocks, "free": size.f_frsize * size.f_bavail}


def environment() -> dict[str, str]:
    """The variables of SHOWN that are set."""
    return {name: os.environ[name] for name in SHOWN if name in os.environ}
