"""Compare the topology that a launcher expects with the one that the engine reports.

A job of N workers that starts as N jobs of one worker trains, logs and exits with 0. So does a job whose workers all
run on one of its nodes. Only the reported numbers reveal the error. The variables of distpad's own launcher
(DISTPAD_*) must match exactly. The variables of other launchers only tell a single process from several, since their
numbers may differ in a correct job (``hvd.init(comm=[0, 1])``).
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import socket
from collections.abc import Mapping
from typing import Optional

from distpad import errors

HOROVODS = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # read by Horovod's own start-up
# The innermost launcher comes first: mpirun runs inside a Slurm step, and horovodrun inside either. SLURM_NTASKS is
# not in the list, since it is also set in a batch script, which runs once. TF_CONFIG comes last.
_WORKERS = ("DISTPAD_WORKERS", *HOROVODS, "SLURM_STEP_NUM_TASKS")
_HOSTFILE = "OMPI_MCA_orte_default_hostfile"  # set by operators; Open MPI 4 reads its hosts from this file


@dataclasses.dataclass(frozen=True)
class Report:
    """The topology that an engine reports. ``hosts`` is None if this worker cannot know it."""

    engine: str
    workers: int
    replicas: int
    hosts: Optional[int] = None  # noqa: UP045 (dataclasses evaluate it on Python 3.9)
    controller: str = ""  # Horovod's: "mpi" or "gloo"


def check(report: Report, environ: Mapping[str, str] = os.environ) -> None:
    """Compare an engine's report with the expected topology. All workers see the same numbers, so all raise together.

    Raises:
      DistpadError: the number of workers, hosts or replicas differs. The message has the likely cause and the remedy.

    >>> check(Report("Horovod", workers=2, replicas=2, hosts=1), {"DISTPAD_WORKERS": "2", "DISTPAD_HOSTS": "1"})
    """
    _check_workers(report, environ)
    if environ.get("HOROVOD_ELASTIC") == "1":
        return  # hosts come and go
    hosts, replicas = number(environ, "DISTPAD_HOSTS"), number(environ, "DISTPAD_REPLICAS")
    if hosts and report.hosts and report.hosts != hosts:
        _refuse(report, "host", report.hosts, hosts, "DISTPAD_HOSTS", _why_these_hosts(report, environ))
    if replicas and report.replicas != replicas:
        _refuse(report, "replica", report.replicas, replicas, "DISTPAD_REPLICAS", _why_these_replicas(environ))
    named = _hosts_of_ignored_file(report, environ)
    if named:
        _refuse(report, "host", 1, f"those {len(named)}", _HOSTFILE, _open_mpi_5(environ))


def expected_workers(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return the variable that holds the number of workers, and the number; ``("", 1)`` if no variable is set.

    >>> expected_workers({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"})
    ('OMPI_COMM_WORLD_SIZE', 4)
    """
    for name in _WORKERS:
        count = number(environ, name)
        if count:
            return name, count
    count = _tf_config_workers(environ)
    return ("TF_CONFIG", count) if count else ("", 1)


def refuse_alone(function: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise if this process, which works alone, was started as one of several workers.

    Raises:
      ValueError: the environment names several workers. The message has the remedy.
    """
    name, count = expected_workers(environ)
    if count < 2:
        return
    # the engine's own variable allows a more specific remedy
    configured = {each: value for each, value in environ.items() if each in (*HOROVODS, "TF_CONFIG")}
    if name == "DISTPAD_WORKERS" and expected_workers(configured)[1] > 1:
        name, count = expected_workers(configured)
    found = f"expects {count} workers, but no engine with several workers runs. Call distpad.backends.start() or"
    remedy = "horovod.tensorflow.init() first, write backend=strategy,"
    if name == "TF_CONFIG":
        found = f"names {count} workers, but no strategy is in scope. Call it inside strategy.run,"
        remedy = "write backend=strategy,"
    if name in HOROVODS:
        found = f"expects {count} ranks, but Horovod is not initialised. Call"
        remedy = "horovod.tensorflow.init() first,"
    raise ValueError(
        f"{function}: {name} {found} {remedy} or write backend='local' if this process is meant to work alone."
    )


def number(environ: Mapping[str, str], name: str) -> int:
    """A variable's number; 0 if it is not set.

    Raises:
      DistpadError: a variable of distpad's own launcher is not a number.
    """
    text = environ.get(name, "").strip()
    if text.isdecimal() and len(text) < 10:
        return int(text)
    if text and name.startswith("DISTPAD_"):
        raise errors.DistpadError(errors.sentence("distpad", name, repr(text), "an integer"))
    return 0


def _check_workers(report: Report, environ: Mapping[str, str]) -> None:
    name, expected = expected_workers(environ)
    exact, elastic = name == "DISTPAD_WORKERS", environ.get("HOROVOD_ELASTIC") == "1"
    if elastic:  # the size changes: DISTPAD_WORKERS is the minimum, Horovod's variable the first size
        differs = exact and report.workers < expected
    else:
        differs = report.workers != expected if exact else report.workers == 1 < expected
    if differs:
        _refuse(report, "worker", report.workers, expected, name, _why_these_workers(report, name, expected, environ))


def _refuse(report: Report, what: str, found: int, expected: object, name: str, why: str) -> None:
    reports = f"{report.engine} reports {found} {what}{'s' * (found != 1)}"
    raise errors.DistpadError(f"distpad: {reports}, expected {expected}, set by {name}. {why}")


# -- the first cause that applies, with its remedy --------------------------------------------------------------------


def _why_these_workers(report: Report, name: str, expected: int, environ: Mapping[str, str]) -> str:
    left_over = f"If {name} is left over from another job, unset it."
    backend = environ.get("DISTPAD_BACKEND", "horovod" if name in HOROVODS else "")
    if report.workers > 1:
        return f"Some workers did not join, or joined another job. Compare the launcher's summary. {left_over}"
    alone = f"Each process would train alone: {expected} jobs of one."
    if report.engine != "Horovod":
        remedies = {
            "horovod": "They were started for Horovod: write backend='horovod'.",
            "multiworker": "They were started for MultiWorkerMirroredStrategy: use it, with the launcher's TF_CONFIG.",
        }
        default = "TF_CONFIG must name the workers when the strategy is created: launch/multiworker.sh sets it."
        return f"{alone} {remedies.get(backend, default)} {left_over}"
    if backend == "multiworker":
        return f"{alone} They were started for MultiWorkerMirroredStrategy: launch with --backend horovod instead."
    if report.controller == "gloo":
        return (
            f"{alone} This Horovod runs over Gloo (it has no MPI, or HOROVOD_CONTROLLER selects Gloo), which only "
            "horovodrun starts. Use horovodrun --gloo, or build Horovod with MPI: launch/install_horovod.sh --mpi on."
        )
    if name == "SLURM_STEP_NUM_TASKS" or (name == "DISTPAD_WORKERS" and "SLURM_STEP_NUM_TASKS" in environ):
        return (
            f"{alone} srun did not configure MPI: start with srun --mpi=pmix (or pmi2; srun --mpi=list prints the "
            "types), or with mpirun. For a process that works alone: srun --ntasks=1."
        )
    return (
        f"{alone} Horovod was built with another MPI than the launcher's (another family, or Open MPI 5 for 4). "
        f"Compare mpirun --version with distpad doctor, and build again: launch/install_horovod.sh --force. {left_over}"
    )


def _why_these_hosts(report: Report, environ: Mapping[str, str]) -> str:
    if report.hosts == 1 and _HOSTFILE in environ and _is_open_mpi_5(environ):
        return _open_mpi_5(environ)
    if report.hosts == 1:
        return (
            f"All {report.workers} workers are on {socket.gethostname()}: the launcher got no hosts, or ignored them. "
            "Give them with -H or --hostfile, and check the command lines with distpad launch --dry-run."
        )
    return "Two names of one host count twice, and slots place the workers. Compare -H or --hostfile with --dry-run."


def _open_mpi_5(environ: Mapping[str, str]) -> str:
    file = environ[_HOSTFILE]
    return (
        f"All workers are on {socket.gethostname()}: this is Open MPI 5, which ignores {_HOSTFILE}, the variable of "
        f"Open MPI 4, without a warning. Call mpirun --hostfile {file}, or set PRTE_MCA_prte_default_hostfile={file}."
    )


def _why_these_replicas(environ: Mapping[str, str]) -> str:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    shown = "CUDA_VISIBLE_DEVICES is not set" if visible is None else f"CUDA_VISIBLE_DEVICES is {visible!r}"
    return (
        f"TensorFlow sees other devices than the launcher counted ({shown}): run distpad doctor. Without GPUs, "
        "distpad.backends.start() creates the expected number of CPU devices; MirroredStrategy() creates one."
    )


# -- evidence ---------------------------------------------------------------------------------------------------------


def _tf_config_workers(environ: Mapping[str, str]) -> int:
    try:
        cluster = json.loads(environ.get("TF_CONFIG") or "{}").get("cluster", {})
        return len(cluster.get("worker", [])) + len(cluster.get("chief", []))
    except (ValueError, AttributeError, TypeError, RecursionError):
        return 0  # TensorFlow itself reports a malformed TF_CONFIG


def _is_open_mpi_5(environ: Mapping[str, str]) -> bool:
    """Open MPI 5 starts its ranks with PRRTE, which sets these variables."""
    return "PRTE_LAUNCHED" in environ or environ.get("PMIX_NAMESPACE", "").startswith("prterun")


def _hosts_of_ignored_file(report: Report, environ: Mapping[str, str]) -> list[str]:
    """The hosts of an ignored host file; empty unless all workers are on one host that is not in the file."""
    obeyed = "PRTE_MCA_prte_default_hostfile" in environ or not _is_open_mpi_5(environ)
    if report.hosts != 1 or _HOSTFILE not in environ or obeyed:
        return []
    try:
        lines = pathlib.Path(environ[_HOSTFILE]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []  # the file exists only on the launcher's host
    hosts = sorted({re.split(r"[\s:]", line.strip())[0] for line in lines if line.strip() and line.strip()[0] != "#"})
    mine = socket.gethostname().split(".")[0]
    return hosts if len(hosts) > 1 and mine not in {host.split(".")[0] for host in hosts} else []
