"""environment.sh and install_horovod.sh: what is pinned resolves, and what names a built wheel in the cache."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import tomllib

from scripts import script

pytestmark = pytest.mark.one_stack

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
STACKS = ("current", "classic")


def run(*words: object, **environ: str) -> subprocess.CompletedProcess[str]:
    command, env = list(map(str, words)), {**os.environ, **environ}
    return subprocess.run(command, env=env, cwd=LAUNCH, capture_output=True, text=True, timeout=150)


# -- requirements -----------------------------------------------------------------------------------------------------


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)", (LAUNCH / "requirements" / f"{name}.txt").read_text(), re.MULTILINE))


@pytest.mark.parametrize("stack", STACKS)
def test_stacks_for_gpus_differ_in_tensorflow_alone(stack):
    cpu, gpu = pins(f"{stack}-cpu"), pins(f"{stack}-gpu")
    nvidia = {name for name in gpu if name.startswith("nvidia-")}
    assert {*gpu} - nvidia == {"tensorflow"} and {*cpu} == {"tensorflow", "tensorflow-cpu"}
    assert {gpu["tensorflow"]} == {*cpu.values()} and not {*pins(stack)} & {*gpu, *cpu}
    assert {"nvidia-nccl-cu12", "nvidia-cudnn-cu12", "nvidia-cuda-runtime-cu12"} <= nvidia
    assert all(name.endswith("-cu12") for name in nvidia)  # TensorFlow does not load the libraries of CUDA 13
    nccl = tuple(map(int, gpu["nvidia-nccl-cu12"].split(".")))
    assert nccl >= {"current": (2, 27, 7), "classic": (2, 16, 5)}[stack]  # what TensorFlow asks for


def test_the_files_are_those_of_the_groups():
    """The requirements hold the versions of pyproject.toml: after a change there, run lock.sh."""
    groups = tomllib.loads((LAUNCH / "requirements" / "pyproject.toml").read_text())["dependency-groups"]
    for group, lines in groups.items():
        for line in lines:
            name, version = (
                re.match(r"([\w-]+)(?:\[.*\])?==(\S+)", line).groups() if isinstance(line, str) else ("", "")
            )
            for file in STACKS if group == "common" else [group]:
                assert not name or pins(file)[name] == version, (group, line)


@pytest.mark.parametrize(
    "files", ["current current-gpu", "classic classic-gpu", "current current-cpu tests tests-current"]
)
def test_all_that_is_needed_is_pinned_with_hashes(files):
    """uv resolves, downloading metadata alone: with hashes required, each package that another one needs is listed."""
    find = 'say() { :; }; . packages.sh && find_uv && "$UV" pip install --dry-run --require-hashes "$@"'
    target = ["--python-version", "3.11.9", "--python-platform", "x86_64-manylinux_2_28", "--target", "/nonexistent"]
    listed = [word for file in files.split() for word in ("-r", f"requirements/{file}.txt")]
    done = run("bash", "-c", find, "bash", "--python", sys.executable, *target, *listed)
    assert done.returncode == 0, done.stderr
    resolved = dict(re.findall(r"^ \+ (\S+)==(\S+)$", done.stderr, re.MULTILINE))
    assert resolved.items() <= {pin for file in files.split() for pin in pins(file).items()} and len(resolved) > 60


@pytest.mark.parametrize("words", [[], ["nightly"], ["current", "--gpu"]])
def test_wrong_use_of_environment(words):
    done = run("./environment.sh", *words)
    assert done.returncode == 2 and "expected current, classic, current-gpu or classic-gpu" in done.stderr


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    (tmp_path / "current").mkdir()
    (tmp_path / "current" / "thesis.tex").touch()
    done = run("./environment.sh", "current", DISTPAD_ENVS=str(tmp_path))
    assert done.returncode == 17 and "was not made by this script" in done.stderr
    assert [path.name for path in (tmp_path / "current").iterdir()] == ["thesis.tex"]


# -- the key of a wheel -----------------------------------------------------------------------------------------------

# What a machine's programs print. "python" is asked for its tag, glibc, TensorFlow, NCCL and folders.
MACHINE = {
    "python": "cp311-x86_64 glibc2.36\ntensorflow 2.21.0\nnone\n/env/bin\n/env/lib\n/env",
    "c++": "12.2.0",
    "mpicxx": "",
    "mpirun": "mpirun (Open MPI) 4.1.4",
    "nvcc": "Cuda compilation tools, release 12.9, V12.9.86\n#$ TOP=/usr/bin/..",
    "nvidia-smi": "| NVIDIA-SMI 575.57    Driver Version: 575.57    CUDA Version: 12.9     |",
}
GPU = {"python": MACHINE["python"].replace("none", "2.32.3")}


def key(folder: pathlib.Path, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """What install_horovod.sh prints on a machine that differs from MACHINE; None: it lacks the program."""
    folder.mkdir()
    for name, text in {**MACHINE, **{name.replace("_", "-"): text for name, text in changes.items()}}.items():
        if text is not None:
            script(folder / name, f"cat <<'END'\n{text}\nEND", "bash")
    for name in (
        "awk",
        "bash",
        "basename",
        "cat",
        "cut",
        "dirname",
        "head",
        "id",
        "readlink",
        "sed",
        "sha256sum",
        "sort",
        "tr",
    ):
        (folder / name).symlink_to(f"/usr/bin/{name}")
    path = {"PATH": str(folder), "CUDA_HOME": "/nonexistent", "CXX": changes.get("CXX") or "c++"}
    return run("/usr/bin/bash", "install_horovod.sh", "--python", folder / "python", "--print-key", *arguments, **path)


KEYS = {
    "the CPU": ({}, "horovod-0.28.1-tf-2.21.0-cp311-x86_64-glibc2.36-c++12.2.0-openmpi4.1.4-"),
    "another glibc": (
        {"python": MACHINE["python"].replace("2.36", "2.31")},
        "horovod-0.28.1-tf-2.21.0-cp311-x86_64-glibc2.31-c++12.2.0-openmpi4.1.4-",
    ),
    "another compiler": ({"c++": "9.4.0"}, "horovod-0.28.1-tf-2.21.0-cp311-x86_64-glibc2.36-c++9.4.0-openmpi4.1.4-"),
    "another Python and TensorFlow": (
        {"python": MACHINE["python"].replace("2.21.0", "2.15.1").replace("cp311", "cp310")},
        "horovod-0.28.1-tf-2.15.1-cp310-x86_64-glibc2.36-c++12.2.0-openmpi4.1.4-",
    ),
    "no MPI": ({"mpicxx": None}, "horovod-0.28.1-tf-2.21.0-cp311-x86_64-glibc2.36-c++12.2.0-nompi-"),
    "MPICH": (
        {"mpirun": "HYDRA build details:\n    Version:                                 4.0.2"},
        "horovod-0.28.1-tf-2.21.0-cp311-x86_64-glibc2.36-c++12.2.0-hydra4.0.2-",
    ),
    "Intel": (
        {"mpirun": "Intel(R) MPI Library for Linux* OS, Version 2021.5 Build 20211102"},
        "horovod-0.28.1-tf-2.21.0-cp311-x86_64-glibc2.36-c++12.2.0-intel2021.5-",
    ),
    "GPUs": (GPU, "horovod-0.28.1-tf-2.21.0-cp311-x86_64-glibc2.36-c++12.2.0-openmpi4.1.4-nccl2.32.3-cuda12.9-"),
    "GPUs, another CUDA, no driver": (
        {**GPU, "nvcc": "Cuda compilation tools, release 12.2, V12.2.140\n#$ TOP=/usr", "nvidia_smi": None},
        "horovod-0.28.1-tf-2.21.0-cp311-x86_64-glibc2.36-c++12.2.0-openmpi4.1.4-nccl2.32.3-cuda12.2-",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), KEYS.values(), ids=KEYS)
def test_the_key_of_a_wheel(tmp_path, changes, expected):
    done = key(tmp_path / "bin", **changes)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(re.escape(expected) + r"[0-9a-f]{8}\n", done.stdout), done.stdout


def test_a_wheel_for_the_environments_own_mpi_is_another_one(tmp_path):
    done = key(tmp_path / "bin", python=MACHINE["python"].replace("/env/bin", str(tmp_path / "bin")))
    assert "-c++12.2.0-openmpi4.1.4-own-" in done.stdout


def test_the_key_holds_the_patch(tmp_path):
    old = {"python": MACHINE["python"].replace("2.21.0", "2.15.1")}
    patched, plain = key(tmp_path / "a").stdout, key(tmp_path / "b", **old).stdout
    assert patched.rpartition("-")[2] != plain.rpartition("-")[2]


REFUSED = {
    "no pip": ({"python": None}, 10, "does not run or has no pip"),
    "no TensorFlow": ({"python": MACHINE["python"].replace("tensorflow 2.21.0", "none none")}, 11, "no TensorFlow"),
    "no compiler": ({"c++": None}, 13, r"c\+\+ is missing. On Debian: apt-get install -y g\+\+ make"),
    "no nvcc for GPUs": ({**GPU, "nvcc": None}, 13, "there is no nvcc.*CUDA_HOME"),
    "a driver that is older than nvcc": (
        {**GPU, "nvcc": "Cuda compilation tools, release 13.0, V13.0.88\n#$ TOP=/usr"},
        13,
        r"is of CUDA 13.0, but this driver runs programs of up to CUDA 12.9",
    ),
}


@pytest.mark.parametrize(("changes", "code", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_built_is_refused(tmp_path, changes, code, message):
    done = key(tmp_path / "bin", **changes)
    assert done.returncode == code and re.search(message, done.stderr), done.stderr
    assert not done.stdout


@pytest.mark.parametrize(("arguments", "message"), [(["--mpi", "maybe"], "auto, on or off"), (["--quick"], "--help")])
def test_wrong_use_of_install_horovod(tmp_path, arguments, message):
    done = key(tmp_path / "bin", *arguments)
    assert done.returncode == 2 and message in done.stderr
