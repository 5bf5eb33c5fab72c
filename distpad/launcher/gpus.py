"""GPUs: those that each worker uses, and why TensorFlow sees fewer. This module does not import TensorFlow.

``doctor`` calls the pure functions with the facts of a host, and a worker that expects GPUs with its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import itertools
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

LIMIT_S = 20
INSTALL = "launch/environment.sh current-gpu (or classic-gpu), or pip install 'tensorflow[and-cuda]'"
REQUEST = "Install NVIDIA's driver. In a container, request GPUs: docker run --gpus all, in Kubernetes nvidia.com/gpu."
QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
# A compute capability. On newer GPUs, code for older ones fails: CUDA_ERROR_INVALID_PTX (tensorflow#97387).
NEWEST_BY_PTX = 9


def driver() -> dict[str, Any]:
    """The GPUs and the version of NVIDIA's driver.

    Returns:
      ``devices``: the number of devices in /dev; ``names`` and ``capabilities`` of the GPUs that nvidia-smi lists;
      ``version`` of the driver; ``cuda``: the newest CUDA that it supports, "" without a driver; ``error`` of
      nvidia-smi.
    """
    found: dict[str, Any] = {"devices": len(glob.glob("/dev/nvidia[0-9]*")), "names": [], "capabilities": []}
    found["cuda"] = _cuda_of_driver()
    if shutil.which(QUERY[0]):
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode:
            found["error"] = (done.stderr or done.stdout).strip()
        rows = [line.rsplit(", ", 2) for line in done.stdout.splitlines() if line.count(", ") > 1]
        if rows:
            found["names"], found["capabilities"], (found["version"], *_) = zip(*rows)
    return found


def _cuda_of_driver() -> str:
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else ""


def count(found: Mapping[str, Any]) -> int:
    """The number of GPUs that nvidia-smi lists; of devices in /dev in a container that has no nvidia-smi."""
    return len(found.get("names", [])) or found.get("devices", 0)


def packages() -> dict[str, str]:
    """NVIDIA's installed wheels, and their versions."""
    import importlib.metadata  # each worker imports this module, and few need this one

    every = ((each.metadata["Name"] or "", each.version) for each in importlib.metadata.distributions())
    return {name: version for name, version in every if name.startswith("nvidia-")}


def of_worker(each: int, local_rank: int, environ: Mapping[str, str]) -> str:
    """The value of CUDA_VISIBLE_DEVICES for a worker: its own GPUs, by its local rank.

    Args:
      each: number of GPUs for each worker.
      local_rank: the worker's number on its host.
      environ: the host's variables. CUDA_VISIBLE_DEVICES restricts the GPUs. Slurm sets it for each task.

    >>> of_worker(2, 1, {})
    '2,3'
    >>> of_worker(1, 1, {"CUDA_VISIBLE_DEVICES": "4,6"})
    '6'
    """
    given, first = environ.get("CUDA_VISIBLE_DEVICES"), local_rank * each
    if given is None:
        return ",".join(str(first + i) for i in range(each))
    listed = [part.strip() for part in given.split(",")]
    if len(listed) == each and "SLURM_LOCALID" in environ:
        return given
    return ",".join(listed[first : first + each])


def why_unseen(
    expected: int, build: Mapping[str, Any], found: Mapping[str, Any], visible: str | None, wheels: Mapping[str, str]
) -> tuple[str, str]:
    """Why TensorFlow sees fewer GPUs than expected: the first cause that applies, and its remedy.

    Args:
      expected: the number of GPUs.
      build: TensorFlow's, from ``builds.tensorflow``.
      found: the result of ``driver``.
      visible: the value of CUDA_VISIBLE_DEVICES.
      wheels: the result of ``packages``.
    """
    if not build["for_gpus"]:
        return "TensorFlow is built for the CPU", INSTALL
    if found.get("error"):
        return f"nvidia-smi fails: {found['error']}", "Check that the driver is loaded and matches the kernel."
    if not found.get("cuda"):
        return "NVIDIA's driver is missing", REQUEST
    if _number(found["cuda"])[0] < _number(build["cuda"])[0]:
        newest = f"the driver {found.get('version', '')} supports CUDA up to {found['cuda']}"
        return f"{newest}, TensorFlow needs CUDA {build['cuda']}", "Install a newer driver."
    if visible is not None and _count_visible(visible, count(found)) < expected:
        return f"CUDA_VISIBLE_DEVICES is {visible!r}", "Unset it, or name the GPUs that nvidia-smi -L lists."
    if count(found) < expected:
        return f"the driver has {count(found)}", REQUEST
    needs = f"CUDA {_number(build['cuda'])[0]} and cuDNN {build['cudnn']}"
    runtime = ("nvidia-cuda-runtime", "13")  # the one wheel of CUDA 13 without a suffix
    of_13 = sorted(name for name, version in wheels.items() if name.endswith("-cu13") or (name, version[:2]) == runtime)
    if of_13 and "nvidia-cuda-runtime-cu12" not in wheels:
        return f"the libraries are those of CUDA 13 ({', '.join(of_13[:3])}), TensorFlow needs {needs}", INSTALL
    return f"libraries of {needs} are missing or do not load (see TensorFlow's log)", INSTALL


def unsupported(build: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, str, bool] | None:
    """GPUs for which this TensorFlow has no code: the evidence, the remedy, and whether it fails; None if it has."""
    listed = re.findall(r"(?:sm|compute)_(\d+)(\d)", " ".join(build.get("capabilities", [])))  # sm_120 is 12.0
    codes = {(int(major), int(minor)) for major, minor in listed}
    for name, text in zip(found["names"], found["capabilities"]):
        capability = _number(text)
        if not codes or any(code[0] == capability[0] and code <= capability for code in codes):
            continue
        fails = capability < min(codes) or capability[0] > NEWEST_BY_PTX
        least, most = (".".join(map(str, each)) for each in (min(codes), max(codes)))
        evidence = f"{name} has compute capability {text}, TensorFlow {build['version']} has code for {least} to {most}"
        if fails:
            return evidence, "Use another GPU, or a TensorFlow that is built for it, such as NVIDIA's own.", True
        evidence += ": the driver compiles it at first use, for up to half an hour"
        return evidence, "Keep ~/.nv/ComputeCache.", False
    return None


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _count_visible(visible: str, devices: int) -> int:
    """The number of GPUs that CUDA shows: those before the first that does not exist."""
    parts = (part.strip() for part in visible.split(","))
    exists = (part.startswith(("GPU-", "MIG-")) or (part.isdecimal() and int(part) < devices) for part in parts)
    return sum(1 for _ in itertools.takewhile(bool, exists))
