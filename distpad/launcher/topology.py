"""What a launcher promised, held against what the engine reports.

A job of N workers that comes up as N jobs of one trains, logs and exits with 0; so does one whose workers are all on
one node of many. Only the numbers tell. distpad's own launcher promises exactly (DISTPAD_*). Of the other launchers'
variables only "you are one of several" is taken: their numbers may rightly differ (``hvd.init(comm=[0, 1])``).
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

HOROVODS = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # what Horovod's own start-up reads
# The nearest launcher comes first: mpirun runs inside a Slurm step, and horovodrun inside either. SLURM_NTASKS is none
# of them: a batch script has it, too, and runs once. TF_CONFIG comes last.
_WORKERS = ("DISTPAD_WORKERS", *HOROVODS, "SLURM_STEP_NUM_TASKS")
_HOSTFILE = "OMPI_MCA_orte_default_hostfile"  # how operators tell Open MPI 4 its hosts


@dataclasses.dataclass(frozen=True)
class Report:
    """What an engine says of itself. ``hosts`` is None where this worker cannot tell."""

    engine: str
    workers: int
    replicas: int
    hosts: Optional[int] = None  # noqa: UP045 (dataclasses evaluate it on Python 3.9)
    controller: str = ""  # Horovod's: "mpi" or "gloo"


def hold(report: Report, environ: Mapping[str, str] = os.environ) -> None:
    """Compare an engine's report with the launcher's promises. All workers see the same numbers, so all stop.

    Raises:
      DistpadError: fewer or other workers, hosts or replicas than promised; with the likely reason and the remedy.

    >>> hold(Report("Horovod", workers=2, replicas=2, hosts=1), {"DISTPAD_WORKERS": "2", "DISTPAD_HOSTS": "1"})
    """
    _hold_workers(report, environ)
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


def of_workers(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Which variable says how many workers this process is one of, and the number; ``("", 1)`` where none does.

    >>> of_workers({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"})
    ('OMPI_COMM_WORLD_SIZE', 4)
    """
    for name in _WORKERS:
        count = number(environ, name)
        if count:
            return name, count
    count = _tf_config_workers(environ)
    return ("TF_CONFIG", count) if count else ("", 1)


def refuse_alone(function: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse that a process works alone which was started as one of several.

    Raises:
      ValueError: it was; the message says what to write.
    """
    name, count = of_workers(environ)
    if count < 2:
        return
    if name == "DISTPAD_WORKERS":  # what the engine itself was told says better what to write
        told = {each: value for each, value in environ.items() if each in (*HOROVODS, "TF_CONFIG")}
        name, count = of_workers(told) if of_workers(told)[1] > 1 else (name, count)
    way_out = "or backend='local' if this process is meant to work alone."
    if name == "TF_CONFIG":
        raise ValueError(
            f"{function}: TF_CONFIG names {count} workers, but no strategy is in scope. Call it inside strategy.run, "
            f"write backend=strategy, {way_out}"
        )
    if name in HOROVODS:
        raise ValueError(
            f"{function}: {name} promises {count} ranks, but Horovod is not initialised. Call "
            f"horovod.tensorflow.init() first, or write {way_out.removeprefix('or ')}"
        )
    raise ValueError(
        f"{function}: {name} promises {count} workers, but no engine of several workers runs. Call "
        f"distpad.backends.start() or horovod.tensorflow.init() first, write backend=strategy, {way_out}"
    )


def number(environ: Mapping[str, str], name: str) -> int:
    """A variable's number, 0 where it is not set.

    Raises:
      DistpadError: a promise of distpad's own launcher that is no number, and so cannot be held.
    """
    text = environ.get(name, "").strip()
    if text.isdecimal():
        return int(text)
    if text and name.startswith("DISTPAD_"):
        raise errors.DistpadError(errors.sentence("distpad", name, repr(text), "an integer"))
    return 0


def _hold_workers(report: Report, environ: Mapping[str, str]) -> None:
    name, promised = of_workers(environ)
    exact, elastic = name == "DISTPAD_WORKERS", environ.get("HOROVOD_ELASTIC") == "1"
    if elastic:  # the size changes: our own promise is the least, Horovod's is the first size
        broken = exact and report.workers < promised
    else:
        broken = report.workers != promised if exact else report.workers == 1 < promised
    if broken:
        _refuse(report, "worker", report.workers, promised, name, _why_these_workers(report, name, promised, environ))


def _refuse(report: Report, what: str, found: int, promised: object, name: str, why: str) -> None:
    reports = f"{report.engine} reports {found} {what}{'s' * (found != 1)}"
    raise errors.DistpadError(f"distpad: {reports}, expected {promised}, which {name} promises. {why}")


# -- why: the first reason that fits ----------------------------------------------------------------------------------


def _why_these_workers(report: Report, name: str, promised: int, environ: Mapping[str, str]) -> str:
    left_over = f"Where {name} is left over from another job, unset it."
    meant = environ.get("DISTPAD_BACKEND", "horovod" if name in HOROVODS else "")
    if report.workers > 1:
        return f"Some workers did not join, or joined another job. Compare the launcher's summary. {left_over}"
    alone = f"Each process would train alone: {promised} jobs of one."
    if report.engine != "Horovod":
        told = {
            "horovod": "They were started for Horovod: write backend='horovod'.",
            "multiworker": "They were started for MultiWorkerMirroredStrategy: use it, with the launcher's TF_CONFIG.",
        }
        needed = "TF_CONFIG has to name the workers when the strategy is made: launch/multiworker.sh sets it."
        return f"{alone} {told.get(meant, needed)} {left_over}"
    if meant == "multiworker":
        return f"{alone} They were started for MultiWorkerMirroredStrategy: launch with --backend horovod instead."
    if report.controller == "gloo":
        return (
            f"{alone} This Horovod runs over Gloo (it has no MPI, or HOROVOD_CONTROLLER says so), and only horovodrun "
            "starts that. Start it with horovodrun --gloo, or build it with MPI: launch/install_horovod.sh --mpi on."
        )
    if name == "SLURM_STEP_NUM_TASKS" or (name == "DISTPAD_WORKERS" and "SLURM_STEP_NUM_TASKS" in environ):
        return (
            f"{alone} srun told MPI nothing of the others: start with srun --mpi=pmix (or pmi2; srun --mpi=list shows "
            "which there are), or with mpirun. A process that is meant to work alone: srun --ntasks=1."
        )
    return (
        f"{alone} The MPI that Horovod was built with is not the launcher's (another family, or Open MPI 5 for 4). "
        f"Compare mpirun --version with distpad doctor, and build again: launch/install_horovod.sh --force. {left_over}"
    )


def _why_these_hosts(report: Report, environ: Mapping[str, str]) -> str:
    if report.hosts == 1 and _HOSTFILE in environ and _is_open_mpi_5(environ):
        return _open_mpi_5(environ)
    if report.hosts == 1:
        return (
            f"All {report.workers} workers are on {socket.gethostname()}: the launcher was not told its hosts, or did "
            "not heed them. Name them with -H or --hostfile, and see what would run with distpad launch --dry-run."
        )
    return "Two names of one host count twice; slots decide where workers go. Compare -H or --hostfile with --dry-run."


def _open_mpi_5(environ: Mapping[str, str]) -> str:
    file = environ[_HOSTFILE]
    return (
        f"All workers are on {socket.gethostname()}: this is Open MPI 5, which ignores the hosts in {_HOSTFILE} that "
        f"operators set for Open MPI 4, and says nothing. Give mpirun --hostfile {file}, or set "
        f"PRTE_MCA_prte_default_hostfile={file}."
    )


def _why_these_replicas(environ: Mapping[str, str]) -> str:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    shown = "CUDA_VISIBLE_DEVICES is not set" if visible is None else f"CUDA_VISIBLE_DEVICES is {visible!r}"
    return (
        f"TensorFlow sees other devices than the launcher counted ({shown}): look at distpad doctor. Without GPUs, "
        "distpad.backends.start() makes as many devices of the CPU as were promised; MirroredStrategy() makes one."
    )


# -- evidence ---------------------------------------------------------------------------------------------------------


def _tf_config_workers(environ: Mapping[str, str]) -> int:
    try:
        cluster = json.loads(environ.get("TF_CONFIG") or "{}").get("cluster", {})
        return len(cluster.get("worker", [])) + len(cluster.get("chief", []))
    except (ValueError, AttributeError, TypeError):
        return 0  # TensorFlow itself says what is wrong with a broken TF_CONFIG


def _is_open_mpi_5(environ: Mapping[str, str]) -> bool:
    """Its ranks are started by PRRTE, which says so."""
    return "PRTE_LAUNCHED" in environ or environ.get("PMIX_NAMESPACE", "").startswith("prterun")


def _hosts_of_ignored_file(report: Report, environ: Mapping[str, str]) -> list[str]:
    """The hosts that an operator named in vain: several, this one not among them, and yet all workers are here."""
    obeyed = "PRTE_MCA_prte_default_hostfile" in environ or not _is_open_mpi_5(environ)
    if report.hosts != 1 or _HOSTFILE not in environ or obeyed:
        return []
    try:
        lines = pathlib.Path(environ[_HOSTFILE]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []  # it is on the launcher alone: elsewhere the engine has several hosts
    hosts = sorted({re.split(r"[\s:]", line.strip())[0] for line in lines if line.strip() and line.strip()[0] != "#"})
    mine = socket.gethostname().split(".")[0]
    return hosts if len(hosts) > 1 and mine not in {host.split(".")[0] for host in hosts} else []
