"""Print the build options of TensorFlow and Horovod, one line of JSON each.

    python -m distpad.launcher.builds

This is a separate program, since loading a broken build may crash its process. It initialises nothing that affects
other processes.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import pathlib
import re
from typing import Any

import tensorflow as tf


def main() -> None:
    """Print both lines, each as soon as it is known."""
    print(json.dumps({"tensorflow": tensorflow()}), flush=True)
    print(json.dumps({"horovod": _horovod()}), flush=True)


def tensorflow() -> dict[str, Any]:
    """TensorFlow's version, its build for GPUs, and the number of GPUs that it sees."""
    build = tf.sysconfig.get_build_info()
    return {
        "version": tf.__version__,
        "keras": getattr(tf.keras, "__version__", ""),
        "cuda": build.get("cuda_version", ""),
        "cudnn": build.get("cudnn_version", ""),
        "capabilities": build.get("cuda_compute_capabilities", []),
        "for_gpus": bool(build.get("is_cuda_build") or build.get("is_rocm_build")),
        "gpus": len(tf.config.list_physical_devices("GPU")),
    }


def _horovod() -> dict[str, Any] | None:
    """Horovod's operations and MPI, or the error of loading it; None if it is not installed."""
    try:
        importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        import horovod.tensorflow as hvd

        operations = {"gloo": hvd.gloo_built, "mpi": hvd.mpi_built, "nccl": hvd.nccl_built, "ccl": hvd.ccl_built}
        return {"built_with": [name for name, built in operations.items() if built()], "mpi": _mpi_library()}
    except Exception as error:  # any error means that it does not load
        return {"error": str(error).strip() or type(error).__name__}


def _mpi_library() -> str:
    """The version of the MPI that Horovod has loaded, which MPI reports before MPI_Init as well; empty without MPI."""
    maps = pathlib.Path("/proc/self/maps").read_text(encoding="utf-8")
    loaded = re.search(r"/\S*/libmpi\.so\S*", maps)
    if not loaded:
        return ""
    text, size = ctypes.create_string_buffer(8192), ctypes.c_int()
    ctypes.CDLL(loaded[0]).MPI_Get_library_version(text, ctypes.byref(size))
    return text.value.decode(errors="replace").splitlines()[0][:200]


if __name__ == "__main__":
    main()
