"""A job: its command, its number of workers and its hosts. This module does not start anything."""

from __future__ import annotations

import dataclasses
import getopt
import os
import pathlib
import re
import socket
import sys
from collections.abc import Sequence
from typing import Optional

from distpad import errors
from distpad.launcher import options
from distpad.launcher.options import option

# backend | launcher | the controller of Horovod that it starts; the first is the default
LAUNCHERS = {
    "mirrored": {"ssh": "", "srun": ""},
    "multiworker": {"ssh": "", "srun": ""},
    "horovod": {"horovodrun": "gloo", "mpirun": "mpi", "srun": "mpi"},
}
LOCAL = ("localhost", "127.0.0.1", "::1")
MOST_SLOTS = 4096  # of a host; protects the memory from a mistyped number
NO_RETRY = (2, 126, 127, 130)  # wrong usage, a command that cannot be started, Ctrl-C

# ssh would read a leading hyphen as an option. A colon separates the slots, so that IPv6 addresses need a name.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
NO_NUL = {"pattern": r"[^\0]*", "rule": "text without a NUL byte, which a program cannot receive"}
NAME = "[A-Za-z_][A-Za-z0-9_]*"  # of a variable


@dataclasses.dataclass(frozen=True)
class Host:
    """A host, and the maximum number of its workers."""

    name: str
    slots: int = 1

    def __post_init__(self) -> None:
        if not _HOST.fullmatch(self.name):
            rule = "letters, digits, dots, hyphens and underscores; give an IPv6 address a name in /etc/hosts"
            raise ValueError(f"hosts: host name is {self.name!r}, expected {rule}.")
        if not 1 <= self.slots <= MOST_SLOTS:
            raise ValueError(f"hosts: {self.name} has {self.slots} slots, expected 1 to {MOST_SLOTS}.")

    @property
    def is_here(self) -> bool:
        """Whether the host is this machine."""
        return self.name in LOCAL or self.name in (socket.gethostname(), socket.gethostname().partition(".")[0])


@dataclasses.dataclass(frozen=True)
class Place:
    """The host and rank of one worker. ``local_rank`` counts the workers of its host."""

    rank: int
    host: Host
    local_rank: int


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a command on several workers. ``distpad launch --help`` documents each field.

    Raises:
      ValueError: a field is out of range, or fields contradict each other.
    """

    # fmt: off
    command: tuple[str, ...] = option((), "The command that each worker runs.", flag="-- COMMAND...", **NO_NUL)
    backend: str = option("multiworker", "mirrored (one process), multiworker or horovod.", panel="Workers")
    np: Optional[int] = option(None, "Number of workers; for mirrored, number of replicas. Default: the slots of the hosts.", flag="-np", panel="Workers", low=1)
    hosts: tuple[Host, ...] = ()  # empty: this machine, with as many slots as workers
    slots_per_host: Optional[int] = option(None, "Slots of the hosts that are given without a number.", panel="Workers", low=1)
    min_np: Optional[int] = option(None, "Elastic (Horovod over Gloo): minimum number of workers.", panel="Workers")
    max_np: Optional[int] = option(None, "Elastic: maximum number of workers.", panel="Workers")
    host_discovery_script: str = option("", "Elastic: a script that prints one line host:slots per host. It runs once a second.", panel="Workers")
    gpus: int = option(0, "GPUs of each host that workers use; with --k8s, of each pod that trains. A worker that does not see its GPUs ends the job.", panel="Workers", low=0)
    gpus_per_worker: Optional[int] = option(None, "GPUs of each worker, which sees only these, by its local rank. Default: for multiworker, those of its host divided by the workers there; for Horovod one, which the program chooses by its local rank.", panel="Workers", low=1)
    controller: str = ""  # of Horovod: gloo or mpi
    launcher: str = option("", "The engine's launcher: horovodrun, mpirun or srun; ssh for the other engines.", panel="Engine")
    launcher_arg: tuple[str, ...] = option((), "An extra argument for the engine's launcher. Repeatable.", panel="Engine", metavar="ARG")
    ssh_arg: tuple[str, ...] = option((), "An extra argument for ssh, such as -p2222. Repeatable.", panel="Engine", metavar="ARG")
    network_interface: str = option("", "The network interface for collectives, such as eth0.", panel="Engine", pattern="[A-Za-z0-9_.:@-]{0,15}", rule="a name such as eth0")
    port: Optional[int] = option(None, "multiworker: the first worker's port on each host. Default: free ports.", panel="Engine")
    python: str = option(sys.executable, "The Python that has distpad installed, on all hosts.", panel="Engine")
    env: tuple[str, ...] = option((), "A further variable for all workers, or one of the login such as SSH_AUTH_SOCK. Repeatable.", panel="Environment", metavar="NAME[=VALUE]", pattern=rf"(?s){NAME}(=.*)?", rule="a name of letters, digits and underscores, or NAME=VALUE", private=True)
    secret: tuple[str, ...] = option((), "A variable whose value is read from a file; with --k8s, NAME=SECRET:KEY. Repeatable.", panel="Environment", metavar="NAME=FILE", pattern=f"{NAME}=.+", rule="NAME=FILE", remedy="Do not write a secret's value on a command line, which all users of the machine can read.", private=True)
    cwd: str = option("", "The command's working directory, on all hosts. Default: the current one.", panel="Environment", metavar="FOLDER", **NO_NUL)
    log_dir: str = option("", "Write FOLDER/attempt-N/rank-N.stdout and .stderr instead of the terminal.", panel="Output", metavar="FOLDER")
    tee: bool = option(False, "With --log-dir: write to the terminal as well.", panel="Output")
    ranks: str = option("", "Show only these workers on the terminal.", panel="Output", metavar="0,2-4")
    max_restarts: int = option(0, "Maximum number of restarts after failures. Default with --k8s: the value in k8s/.", panel="Limits", low=0)
    backoff_s: float = option(2.0, "Seconds before the first restart; doubles each time, up to 60.", panel="Limits", low=0)
    no_retry: tuple[int, ...] = option(NO_RETRY, "An exit code after which the job does not restart. Repeatable.", panel="Limits", metavar="CODE")
    grace_s: float = option(10.0, "Seconds between SIGTERM and SIGKILL for a worker.", panel="Limits", low=0)
    lost_after_s: float = option(120.0, "Seconds of silence after which a host is lost, and after which the processes of a lost launcher end.", panel="Limits", low=1)
    start_timeout_s: float = option(60.0, "Seconds within which all workers must start.", panel="Limits", low=1)
    timeout_s: Optional[float] = option(None, "Time limit for the whole job, in seconds. Default: none.", panel="Limits", low=0.001)
    # fmt: on
    waits: bool = False  # within the start's time limit, for hosts that start, and for the end of other jobs there
    id: str = dataclasses.field(default_factory=lambda: os.urandom(8).hex())

    def __post_init__(self) -> None:
        errors.choice("launch", "--backend", self.backend, tuple(LAUNCHERS))
        options.check(self)
        _require(self.command, "no command, expected one after --, as in: distpad launch -np 2 -- python train.py")
        self._settle_launcher()
        self._settle_workers()
        self._settle_gpus()
        last = 65535 - self.workers
        fits = self.port is None or 1024 <= self.port <= last
        _require(fits, f"--port is {self.port}, expected 1024 to {last}: one port per worker.")
        most = self.max_np or self.workers
        for rank in parse_ranks(self.ranks):
            _require(rank < most, f"--ranks names {rank}, expected 0 to {most - 1}.")

    def _set(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _settle_launcher(self) -> None:
        """Choose the engine's launcher if none is given, and check that it fits the other fields."""
        fitting, asked = LAUNCHERS[self.backend], self.controller
        of_controller = [name for name, controller in fitting.items() if asked in ("", controller)]
        _require(of_controller, f"--{asked} is for --backend horovod, which is {self.backend} here.")
        launcher = self.launcher or of_controller[0]
        rule = f"{' or '.join(fitting)} for --backend {self.backend}"
        _require(launcher in fitting, f"--launcher is {launcher}, expected {rule}.")
        rule = f"{' or '.join(of_controller)} for --{asked}"
        _require(launcher in of_controller, f"--launcher is {launcher}, expected {rule}.")
        is_ssh = launcher == "ssh" and bool(self.launcher_arg)
        _require(not is_ssh, "--launcher-arg needs an engine's launcher. For options of ssh, use --ssh-arg.")
        if launcher == "horovodrun":
            horovodrun_ssh_args(self.ssh_arg)
        fits = not self.elastic or fitting[launcher] == "gloo"
        _require(fits, "elastic jobs need Horovod over Gloo, expected --backend horovod --gloo.")
        self._set(launcher=launcher, controller=fitting[launcher])

    def _settle_workers(self) -> None:
        """Derive the number of workers from the slots if none is given, and check that the slots suffice."""
        np, is_mirrored = self.np, self.backend == "mirrored"
        if not self.hosts:
            given = np is not None or is_mirrored or self.slots_per_host or self.elastic
            _require(given, "neither -np nor hosts are given, expected one of them, such as -np 2.")
            self._set(hosts=(Host("localhost", 1 if is_mirrored else self.slots_per_host or max(1, np or 1)),))
        names = [host.name for host in self.hosts]
        for name in names:
            once = names.count(name) == 1
            _require(once, f"the hosts name {name} twice, expected each once. Add its slots up: {name}:N.")
        if self.elastic:
            low, high = self.min_np or 1, self.max_np or max(np or 1, self.min_np or 1)
            in_order = 1 <= low <= (np or low) <= high
            _require(in_order, f"--min-np {low}, -np {np}, --max-np {high}, expected them in this order.")
            self._set(min_np=low, max_np=high, np=np or low)
        elif is_mirrored:
            rule = f"one host and not {', '.join(names)}. Use --backend multiworker."
            _require(len(names) == 1, f"--backend mirrored runs in one process, expected {rule}")
        else:
            slots = sum(host.slots for host in self.hosts)
            have = ", ".join(f"{host.name}:{host.slots}" for host in self.hosts)
            remedy = "Give hosts more slots as host:N, or --slots-per-host N, or name more hosts."
            _require((np or slots) <= slots, f"-np is {np}, but the hosts have {slots} slots ({have}). {remedy}")
            self._set(np=np or slots)

    def _settle_gpus(self) -> None:
        """Check that a host's GPUs suffice for its workers; the replicas of mirrored are its GPUs by default."""
        if self.backend == "mirrored" and self.gpus_each:
            self._set(np=self.np or self.gpus_each)
            rule = f"{self.np}, the replicas of -np"
            fits = self.gpus_per_worker in (None, self.np)
            _require(fits, f"--gpus-per-worker is {self.gpus_per_worker}, expected {rule}.")
        most, each = self._most_workers, self.gpus_each
        workers = f"{most} worker{'s' * (most > 1)} with {each} each"
        fits = not self.gpus or most * each <= self.gpus
        _require(fits, f"--gpus is {self.gpus}, expected at least {most * each}: a host has {workers}.")

    @property
    def _most_workers(self) -> int:
        """The largest number of workers on one host."""
        return self.slots_per_host or 1 if self.elastic else max(place.local_rank for place in self.places) + 1

    @property
    def gpus_each(self) -> int:
        """The number of GPUs that each worker expects; 0 for none."""
        if not (self.gpus or self.gpus_per_worker):
            return 0
        if self.backend == "mirrored":
            return self.np or self.gpus_per_worker or self.gpus
        each = 1 if self.backend == "horovod" else max(1, self.gpus // self._most_workers)
        return self.gpus_per_worker or each

    @property
    def hides_gpus(self) -> bool:
        """Whether a worker sees only its own GPUs. Programs for Horovod choose theirs from all of the host's."""
        return self.gpus_each > 0 and (self.backend != "horovod" or self.gpus_per_worker is not None)

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        return bool(self.host_discovery_script) or self.min_np is not None or self.max_np is not None

    @property
    def workers(self) -> int:
        """The number of worker processes."""
        return 1 if self.backend == "mirrored" else self.np or 1

    @property
    def places(self) -> list[Place]:
        """The host and rank of each worker. Workers fill the hosts in order, as in horovodrun and mpirun."""
        slots = [(host, i) for host in self.hosts for i in range(host.slots)]
        return [Place(rank, host, i) for rank, (host, i) in enumerate(slots[: self.workers])]

    @property
    def used_hosts(self) -> tuple[Host, ...]:
        """The hosts that run workers."""
        return tuple(dict.fromkeys(place.host for place in self.places))

    @property
    def crosses_hosts(self) -> bool:
        """Whether workers communicate over a network."""
        return len(self.used_hosts) > 1 or any(not host.is_here for host in self.used_hosts)


def parse_hosts(text: str, slots_per_host: int | None = None) -> tuple[Host, ...]:
    """Parse the hosts of ``-H``.

    >>> parse_hosts("a:2,b")
    (Host(name='a', slots=2), Host(name='b', slots=1))
    """
    return tuple(_host(part.strip(), slots_per_host, f"-H {text}") for part in text.split(",") if part.strip())


def read_hostfile(path: str | pathlib.Path, slots_per_host: int | None = None) -> tuple[Host, ...]:
    """Read a file with one host per line: ``name``, ``name slots=2`` or ``name:2``. ``#`` begins a comment."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"launch: --hostfile {path} cannot be read: {error}.") from error
    lines = [re.sub(r"#.*|\smax[_-]slots=\d+", "", line).strip() for line in text.splitlines()]
    found = [_host(line, slots_per_host, f"line {i} of {path}") for i, line in enumerate(lines, 1) if line]
    if not found:
        raise ValueError(f"launch: --hostfile {path} names no host, expected lines such as: name slots=2.")
    return tuple(found)


def _host(text: str, slots_per_host: int | None, where: str) -> Host:
    match = re.fullmatch(r"([^\s:]*)(?:(?::|\s+slots=)(\d{1,9}))?", text)
    if not match:
        rule = "HOST, HOST:SLOTS or HOST slots=SLOTS with a number of slots"
        raise ValueError(f"launch: {where} holds {text!r}, expected {rule}.")
    return Host(match[1], int(match[2] or slots_per_host or 1))


def slots_for_gpus(backend: str, gpus: int, gpus_per_worker: int | None) -> int | None:
    """The workers of a host with so many GPUs, if nothing else tells their number; None without GPUs.

    >>> slots_for_gpus("horovod", 8, None), slots_for_gpus("multiworker", 8, None), slots_for_gpus("multiworker", 8, 4)
    (8, 1, 2)
    """
    if not gpus or backend == "mirrored":
        return None
    each = gpus_per_worker or (1 if backend == "horovod" else gpus)
    return max(1, gpus // each) if each > 0 else None


def parse_ranks(text: str) -> tuple[int, ...]:
    """Parse the ranks of ``--ranks``.

    >>> parse_ranks("0,4-6")
    (0, 4, 5, 6)
    """
    found: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if not match:
            raise ValueError(f"launch: --ranks holds {part!r}, expected numbers and ranges such as 0,4-6.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + MOST_SLOTS:
            raise ValueError(f"launch: --ranks holds {part!r}, expected an ascending range of at most {MOST_SLOTS}.")
        found.extend(range(first, last + 1))
    return tuple(sorted(set(found)))


def horovodrun_ssh_args(ssh_args: Sequence[str]) -> list[str]:
    """Translate arguments of ssh to horovodrun's options: a port and an identity file.

    >>> horovodrun_ssh_args(["-p2222", "-i", "/keys/mine"])
    ['--ssh-port', '2222', '--ssh-identity-file', '/keys/mine']
    """
    # only digits and a plain path, since horovodrun inserts both unquoted into a shell command
    known = {"-p": ("--ssh-port", "[0-9]+"), "-i": ("--ssh-identity-file", "[A-Za-z0-9_./-]+")}
    try:
        given, others = getopt.getopt(list(ssh_args), "p:i:")
    except getopt.GetoptError:
        given, others = [], list(ssh_args)
    wrong = [*others, *(flag + value for flag, value in given if not re.fullmatch(known[flag][1], value))]
    _require(
        not wrong,
        f"--ssh-arg is {' '.join(wrong)!r}, expected -pPORT or -iFILE (a plain path): horovodrun passes no other "
        "option to ssh. Write further options into ~/.ssh/config.",
    )
    return [word for flag, value in given for word in (known[flag][0], value)]


def _require(holds: object, why: str) -> None:
    if not holds:
        raise ValueError(f"launch: {why}")
