"""Checks of one host. Each check reads the host's facts and yields the problems there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from distpad.launcher import gpus as launcher_gpus
from distpad.launcher import hostcheck
from distpad.preflight.findings import Finding, Question, error, warning

Facts = Mapping[str, Any]

GB = 1 << 30
INSTALL_HOROVOD = "launch/install_horovod.sh"
SHM = "docker run --shm-size=8g, or in Kubernetes an emptyDir with medium: Memory at /dev/shm"
HOSTFILE = "OMPI_MCA_orte_default_hostfile"


def probes(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """Each failed probe is a warning, since the state of its subject is unknown."""
    for name, why in facts["errors"].items():
        yield warning(host, f"{name} could not be checked: {why}", "Check it manually.")


def tensorflow(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """TensorFlow must be installed and must load."""
    if not any(name.startswith(("tensorflow", "tf-nightly")) for name in facts.get("packages", {"tensorflow": ""})):
        yield error(
            host, "TensorFlow is not installed in this Python", "launch/environment.sh makes a whole environment."
        )
    elif why := _engine(facts, "tensorflow").get("error"):
        yield error(host, f"TensorFlow does not load: {why}", "Install it again, for this Python and this processor.")


def keras(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """TensorFlow up to 2.15 needs Keras 2. Later releases need Keras 3."""
    found, release = facts.get("packages", {}).get("keras", ""), _release(facts)
    if not found or not release:
        return
    is_3, wants_3 = int(found.split(".")[0]) >= 3, release >= (2, 16)
    if is_3 != wants_3:
        fitting = "'keras>=3'" if wants_3 else f"'keras=={release[0]}.{release[1]}.*'"
        yield error(
            host, f"Keras {found} does not go with TensorFlow {_tensorflow_version(facts)}", f"pip install {fitting}"
        )


def addons(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """TensorFlow Addons support TensorFlow up to 2.15."""
    found = facts.get("packages", {}).get("tensorflow-addons")
    if found and _release(facts) > (2, 15):
        version = _tensorflow_version(facts)
        yield warning(
            host,
            f"TensorFlow Addons {found} support TensorFlow up to 2.15, here is {version}",
            "Uninstall them, or use TensorFlow 2.15.",
        )


def horovod(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """An installed Horovod must load. pip's cache ignores the TensorFlow that a wheel was built for."""
    if why := _engine(facts, "horovod").get("error"):
        yield error(
            host, f"Horovod does not load: {why}", f"Build it for the installed TensorFlow: {INSTALL_HOROVOD} --force"
        )


def nccl(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """Horovod on GPUs needs NCCL. Without NCCL, gradients go through the CPU's memory, slowly and without a warning."""
    built = _engine(facts, "horovod").get("built_with")
    if _gpus(facts) and built is not None and "nccl" not in built:
        yield error(
            host,
            f"{_gpus(facts)} GPUs, but Horovod was built without NCCL (it has {', '.join(built) or 'nothing'})",
            f"In an environment with tensorflow[and-cuda]: {INSTALL_HOROVOD} --force",
        )


def gpus(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """TensorFlow must see all GPUs of the host, or as many as a launcher expects, and have code for them."""
    engine, driver, environment = _engine(facts, "tensorflow"), facts.get("gpus", {}), facts.get("environment", {})
    if "for_gpus" not in engine or not driver:
        return
    wanted = int(environment.get("DISTPAD_GPUS") or 0)
    expected = wanted or _gpus(facts) or (1 if driver.get("error") else 0)
    if engine["gpus"] < expected:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        why, remedy = launcher_gpus.why_unseen(expected, engine, driver, visible, driver["wheels"])
        meant = not wanted and engine["gpus"] and why.startswith("CUDA_VISIBLE_DEVICES")
        found = f"TensorFlow sees {engine['gpus']} of {expected} GPUs: {why}"
        yield warning(host, found, remedy) if meant else error(host, found, remedy)
    elif unfit := launcher_gpus.unsupported(engine, driver):
        yield (error if unfit[2] else warning)(host, unfit[0], unfit[1])


def slots(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """Each worker needs a GPU, or a core on hosts without GPUs."""
    wanted, have = question.slots.get(host, 1), _gpus(facts)
    if not question.slots_given:
        return
    if have and wanted > have:
        yield error(
            host,
            f"{wanted} slots, but {have} GPUs",
            f"Write {host}:{have}. Workers should not share a GPU.",
        )
    cores = facts.get("machine", {}).get("cores") or wanted
    if not have and wanted > cores:
        yield warning(
            host, f"{wanted} slots, but {cores} cores", f"Write {host}:{cores}. Workers that share a core are slow."
        )


def mpi(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """mpirun must belong to the MPI library that Horovod loads. Another mpirun starts N jobs of one, or fails."""
    found = facts.get("mpi", {})
    missing = [name for name, path in found.get("links", {}).items() if not path and name.startswith("libmpi")]
    rebuild = f"{INSTALL_HOROVOD} --force builds it for the MPI on PATH."
    mpirun = (found.get("mpirun") or {}).get("version", "")
    if missing:
        here = f"; {mpirun} is here" if mpirun else ""
        yield error(host, f"Horovod was built for an MPI with {', '.join(missing)}, which is not found{here}", rebuild)
        return
    library = (found.get("library") or {}).get("version", "")
    if library and not mpirun:
        yield warning(
            host,
            f"Horovod has MPI ({_mpi(library)}), but no mpirun is on PATH",
            "Add it to PATH, or launch with --gloo.",
        )
    elif library and _family(library) != _family(mpirun):
        yield error(host, f"Horovod loads {_mpi(library)}, but mpirun is {_mpi(mpirun)}", f"Change PATH, or: {rebuild}")


def operator(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """Open MPI 5 ignores the hosts that an operator sets for version 4, and runs all workers on one host."""
    environment = facts.get("environment", {})
    mpirun = (facts.get("mpi", {}).get("mpirun") or {}).get("version", "")
    if _family(mpirun) >= ("Open MPI", 5) and HOSTFILE in environment:
        file = environment[HOSTFILE]
        if environment.get("PRTE_MCA_prte_default_hostfile") != file:
            remedy = f"Set PRTE_MCA_prte_default_hostfile={file}, or call mpirun --hostfile {file}"
            yield error(host, f"{_mpi(mpirun)} ignores {HOSTFILE}: all workers would run on this host", remedy)


def shared_memory(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """Containers get 64 MB by default, with which NCCL fails during training (NVIDIA/nccl#290)."""
    found = facts.get("shared_memory", {})
    if not found or (found["size"] >= GB and found["free"] >= GB // 4):
        return
    evidence = f"/dev/shm has {found['size'] // 2**20} MB, {found['free'] // 2**20} MB of it free"
    if _gpus(facts):
        yield error(host, f"{evidence}: too little for NCCL", f"Increase it to 1 GB or more: {SHM}")
    else:
        yield warning(host, evidence, f"Workers on one host use it, and NCCL needs 1 GB: {SHM}")


def open_files(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """Each worker opens a connection to each other worker, and the files of the data."""
    soft = facts.get("machine", {}).get("open_files", {}).get("soft", -1)
    if 0 <= soft < 1024:
        yield warning(host, f"a process may open only {soft} files", "ulimit -n 4096")


def tf_config(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """TF_CONFIG, if set, must name this host at its task's index. Otherwise the workers wait forever."""
    found = facts.get("tf_config")
    if not found:
        return
    remedy = "Unset it, or let distpad launch --backend multiworker write it."
    if "error" in found:
        yield error(host, f"TF_CONFIG is set, but {found['error']}", remedy)
    elif found["cluster"] and "address" not in found:
        task, sizes = found["task"], ", ".join(f"{len(each)} {kind}" for kind, each in found["cluster"].items())
        yield error(host, f"TF_CONFIG says task {task['type']} {task['index']}, but names {sizes}", remedy)
    elif found["cluster"] and not found["is_here"]:
        yield error(host, f"TF_CONFIG says that this host is {found['address']}, no address of this host", remedy)


def ports(host: str, facts: Facts, question: Question) -> Iterator[Finding]:
    """The ports in the question must be free."""
    for port, why in facts.get("ports", {}).items():
        if why:
            yield error(host, *hostcheck.taken(port, why))


# -- reading facts ----------------------------------------------------------------------------------------------------


def _engine(facts: Facts, name: str) -> Facts:
    return facts.get("engines", {}).get(name) or {}


def _gpus(facts: Facts) -> int:
    driver = facts.get("gpus", {})
    return len(driver.get("names", [])) or driver.get("devices", 0)


def _tensorflow_version(facts: Facts) -> str:
    packages = facts.get("packages", {})
    found = [packages[name] for name in ("tensorflow", "tensorflow-cpu", "tensorflow-gpu") if name in packages]
    return _engine(facts, "tensorflow").get("version") or (found[0] if found else "")


def _release(facts: Facts) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", _tensorflow_version(facts))[:2])


def _family(banner: str) -> tuple[str, int]:
    """The MPI implementation. For Open MPI also its major version, since 5 does not load libraries built for 4."""
    kinds = {"Open MPI": "Open MPI", "HYDRA": "MPICH", "MPICH": "MPICH", "Intel": "Intel MPI"}
    kind = next((kinds[mark] for mark in kinds if mark in banner), banner)
    version = re.search(r"(\d+)\.\d+", banner)
    return kind, int(version[1]) if version and kind == "Open MPI" else 0


def _mpi(banner: str) -> str:
    kind, _ = _family(banner)
    version = re.search(r"\d+\.[\d.]+\w*", banner)
    return f"{kind} {version[0]}" if version else kind
