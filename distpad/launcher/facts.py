"""The facts of this host, which its agent sends to `distpad launch` and `distpad doctor`. Probes change nothing.

All probes share a time limit. The error of a failed probe is a fact as well, and the other probes continue.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import pathlib
import platform
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from distpad.launcher import gpus, processes

LIMIT_S = 20  # of one program
PACKAGES = (
    *("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tf-nightly", "keras", "tf-keras", "tensorflow-addons"),
    *("horovod", "numpy", "nvidia-nccl-cu11", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "distpad"),
)
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
MOST_FILES = 5000  # in a folder of code; a folder with more holds something else


def collect(asked: dict[str, Any]) -> dict[str, Any]:
    """Run probes in parallel.

    Args:
      asked: ``probes``: their names; ``limit_s``: seconds for all of them; ``hosts``: names to resolve; ``ports``: port
        numbers to test; ``code``: a folder whose Python files are compared, or "".

    Returns:
      The results of successful probes by name; ``errors``: the messages of failed probes by name; ``host``: this
      host's own name; ``time``: the time of the answer, in seconds of this host's clock.
    """
    found: dict[str, Any] = {}
    errors = dict.fromkeys(asked["probes"], f"not done after {asked['limit_s']:g} s")

    def run(name: str) -> None:
        try:
            found[name] = PROBES[name](asked)
        except Exception as error:  # any error is a fact
            errors[name] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=run, args=[name], daemon=True) for name in asked["probes"]]
    until = time.monotonic() + asked["limit_s"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    done = dict(found)  # a late thread may still add to the other
    failed = {name: why for name, why in errors.items() if name not in done}
    return {"host": socket.gethostname(), "time": time.time(), **done, "errors": failed}


# -- the machine ------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The cores that this process may use, the memory in bytes, and the limits on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().total,
        "open_files": {"soft": soft, "hard": hard},
        "managed_by": [name for name, variable in MANAGERS.items() if variable in os.environ],
    }


def shared_memory() -> dict[str, int]:
    """The size of shared memory and its free part, in bytes."""
    usage = psutil.disk_usage("/dev/shm")
    return {"size": usage.total, "free": usage.free}


# -- the network ------------------------------------------------------------------------------------------------------


def interfaces() -> dict[str, list[str]]:
    """The addresses of each network interface of this host."""
    return {name: [each.address for each in found] for name, found in psutil.net_if_addrs().items()}


def names(hosts: Sequence[str]) -> dict[str, list[str]]:
    """The addresses to which this host resolves its own name and those of ``hosts``; none if it does not resolve."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys([*hosts, socket.gethostname()]):
        found[name] = []
        with contextlib.suppress(OSError):
            answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            found[name] = sorted({str(answer[4][0]) for answer in answers})
    return found


def ports(wanted: Sequence[int]) -> dict[str, Any]:
    """Find free ports: 0 stands for any. All stay bound until the last is found.

    Returns:
      ``found``: the free ports; ``taken``: the others, and the reason for each.
    """
    found: list[int] = []
    taken: dict[str, str] = {}
    with contextlib.ExitStack() as held:
        for port in wanted:
            each = held.enter_context(socket.socket())
            # as gRPC does: a port in TIME_WAIT counts as free
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                each.bind(("", port))
                found.append(each.getsockname()[1])
            except OSError as error:
                taken[str(port)] = error.strerror or str(error)
    return {"found": found, "taken": taken}


def tf_config(text: str | None) -> dict[str, Any] | None:
    """The cluster and task in TF_CONFIG, or the error in it; None if it is not set.

    >>> tf_config("{'cluster': {}}")["error"]
    'it is not JSON: Expecting property name enclosed in double quotes at character 1'
    """
    if not text:
        return None
    try:
        config = json.loads(text)
        cluster, task = config.get("cluster") or {}, config.get("task") or {}
        addresses = {kind: list(each) for kind, each in cluster.items()}
        found: dict[str, Any] = {"cluster": addresses, "task": {"type": task.get("type"), "index": task.get("index")}}
    except json.JSONDecodeError as error:
        return {"error": f"it is not JSON: {error.msg} at character {error.pos}"}
    except (AttributeError, TypeError):
        form = '{"cluster": {"worker": [...]}, "task": {"type": ..., "index": ...}}'
        return {"error": f"it does not have the form {form}"}
    mine = addresses.get(str(task.get("type")), [])
    index = int(task["index"]) if str(task.get("index")).isdecimal() else -1
    if 0 <= index < len(mine):
        name = str(mine[index]).rpartition(":")[0]
        own = [address for each in interfaces().values() for address in each]
        is_here = any(each in own or ipaddress.ip_address(each).is_loopback for each in names([name])[name])
        found |= {"address": str(mine[index]), "is_here": is_here}
    return found


# -- the software -----------------------------------------------------------------------------------------------------


def packages() -> dict[str, str]:
    """The versions of the installed ones among PACKAGES."""
    import importlib.metadata  # most jobs run on one host, whose agent needs no versions

    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def engines(limit_s: float = LIMIT_S) -> dict[str, Any]:
    """The builds of TensorFlow and Horovod, by distpad/launcher/builds.py in a process of its own, which may crash."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}
    env = {**{name: value for name, value in os.environ.items() if name != "TF_CONFIG"}, **quiet}
    command = [sys.executable, "-m", "distpad.launcher.builds"]
    code, output, wrote = processes.run(command, env=env, limit_s=limit_s)
    found: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            found.update(json.loads(line))
    if code != 0:
        last = wrote.strip().splitlines()[-1:] or [""]
        ended = f"not done after {limit_s:g} s" if code is None else f"exit code {code}"
        ended = f"signal {-code}" if code and code < 0 else ended
        why = ended if code is None else last[0] or ended
        found["horovod" if "tensorflow" in found else "tensorflow"] = {"error": why, "ended": ended}
    return found


def mpirun() -> dict[str, str] | None:
    """The ``mpirun`` on PATH."""
    program = shutil.which("mpirun")
    if program is None:
        return None
    done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", timeout=LIMIT_S)
    printed = done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}"
    return {"path": program, "version": printed.splitlines()[0][:200]}


def code(folder: str) -> dict[str, str]:
    """A digest of each Python file below a folder, without hidden folders and environments."""
    found: dict[str, str] = {}
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(each for each in folders if each[0] != "." and each != "__pycache__")
        if "pyvenv.cfg" in files:
            folders.clear()
            continue
        for name in sorted(files):
            if name.endswith(".py"):
                file = pathlib.Path(parent, name)
                found[file.relative_to(root).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        if len(found) > MOST_FILES:
            raise ValueError(f"{folder} holds more than {MOST_FILES} Python files; give the folder of the code itself")
    return found


PROBES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "machine": lambda asked: machine(),
    "gpus": lambda asked: {**gpus.driver(), "wheels": gpus.packages()},
    "shared_memory": lambda asked: shared_memory(),
    "environment": lambda asked: {name: os.environ[name] for name in SHOWN if name in os.environ},
    "python": lambda asked: {"version": platform.python_version(), "executable": sys.executable},
    "packages": lambda asked: packages(),
    "engines": lambda asked: engines(0.8 * asked["limit_s"]),
    "mpirun": lambda asked: mpirun(),
    "distpad": lambda asked: code(str(pathlib.Path(__file__).resolve().parents[1])),
    "code": lambda asked: code(asked["code"]) if asked["code"] else None,
    "names": lambda asked: names(asked["hosts"]),
    "interfaces": lambda asked: interfaces(),
    "ports": lambda asked: ports(asked["ports"]),
    "tf_config": lambda asked: tf_config(os.environ.get("TF_CONFIG")),
}
