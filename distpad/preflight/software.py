"""Probes of the software: versions, builds, and digests of the code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from typing import Any

LIMIT_S = 20
PACKAGES = (
    *("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tf-nightly", "keras", "tf-keras", "tensorflow-addons"),
    *("horovod", "numpy", "nvidia-nccl-cu11", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "distpad"),
)
MOST_FILES = 5000  # in a folder of code; a folder with more holds something else
# Runs in a process of its own, which a wrong library may crash. MPI reports its version before MPI_Init as well.
ASK_LIBRARY = """import ctypes, sys
text, size = ctypes.create_string_buffer(8192), ctypes.c_int()
ctypes.CDLL(sys.argv[1]).MPI_Get_library_version(text, ctypes.byref(size))
print(text.value.decode())"""


def python() -> dict[str, str]:
    """The version and path of this Python."""
    return {"version": platform.python_version(), "executable": sys.executable}


def engines(limit_s: float = LIMIT_S) -> dict[str, Any]:
    """The builds of TensorFlow and Horovod, by distpad/launcher/builds.py in a process of its own, which may crash."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}
    alone = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    command = [sys.executable, "-m", "distpad.launcher.builds"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=limit_s, env={**alone, **quiet}
        )
        output, wrote, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, wrote, code = _text(error.stdout), f"not done after {limit_s:g} s", 1
    found: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            found.update(json.loads(line))
    if code:
        last = wrote.strip().splitlines()[-1:] or [""]
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        found["tensorflow" if "tensorflow" not in found else "horovod"] = {"error": last[0] or ended, "ended": ended}
    return found


def mpi() -> dict[str, Any]:
    """The ``mpirun`` on PATH, and the MPI, NCCL and CUDA libraries that Horovod's library links to."""
    found: dict[str, Any] = {"mpirun": None, "links": {}, "library": None}
    program = shutil.which("mpirun")
    if program:
        found["mpirun"] = {"path": program, "version": _first_line([program, "--version"])}
    library = _horovods_library()
    if library and shutil.which("ldd"):
        done = subprocess.run(["ldd", str(library)], capture_output=True, text=True, timeout=LIMIT_S)
        links = re.findall(r"^\s*(lib(?:mpi|nccl|cuda)[\w.+-]*) => (not found|\S+)", done.stdout, re.MULTILINE)
        found["links"] = {name: "" if path == "not found" else path for name, path in links}
    path = next((path for name, path in found["links"].items() if re.match(r"libmpi\.so", name) and path), "")
    if path:
        found["library"] = {"path": path, "version": _first_line([sys.executable, "-S", "-c", ASK_LIBRARY, path])}
    return found


def own_code() -> dict[str, str]:
    """A digest of each of distpad's own files, which reveals a host with a stale copy."""
    return code(str(pathlib.Path(__file__).resolve().parents[1]))


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


def _horovods_library() -> pathlib.Path | None:
    spec = importlib.util.find_spec("horovod")
    if spec is None or not spec.origin:
        return None
    return next(iter(sorted((pathlib.Path(spec.origin).parent / "tensorflow").glob("mpi_lib*.so"))), None)


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S)
    return (done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0][:200]


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
