"""A job: its command, its number of workers and its hosts. This module does not start anything."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import secrets
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Optional

BACKENDS = ("mirrored", "multiworker", "horovod")
LAUNCHERS = ("horovodrun", "mpirun", "srun", "ssh")
LOCAL = ("localhost", "127.0.0.1", "::1")
MOST_SLOTS = 4096  # of a host; protects the memory from a mistyped number
NO_RETRY = (2, 126, 127, 130)  # wrong usage, a command that cannot be started, Ctrl-C

# ssh would read a leading hyphen as an option. A colon separates the slots, so that IPv6 addresses need a name.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


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

    command: tuple[str, ...]
    backend: str = "multiworker"
    np: Optional[int] = None  # noqa: UP045 (dataclass fields are read by the command line on Python 3.9)
    hosts: tuple[Host, ...] = ()  # empty: this machine, with as many slots as workers
    controller: str = ""  # of Horovod: gloo or mpi
    launcher: str = ""
    launcher_args: tuple[str, ...] = ()
    ssh_args: tuple[str, ...] = ()
    network_interface: str = ""
    env: tuple[str, ...] = ()
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)  # name: file
    log_dir: str = ""
    tee: bool = False
    ranks: tuple[int, ...] = ()
    max_restarts: int = 0
    backoff_s: float = 2.0
    no_retry: tuple[int, ...] = NO_RETRY
    grace_s: float = 10.0
    lost_after_s: float = 120.0
    start_timeout_s: float = 60.0
    timeout_s: Optional[float] = None  # noqa: UP045
    port: Optional[int] = None  # noqa: UP045
    min_np: Optional[int] = None  # noqa: UP045
    max_np: Optional[int] = None  # noqa: UP045
    host_discovery_script: str = ""
    slots_per_host: Optional[int] = None  # noqa: UP045 (of hosts that a script names)
    gpus: int = 0  # of each host; 0: nothing is expected
    gpus_per_worker: Optional[int] = None  # noqa: UP045
    python: str = sys.executable
    cwd: str = "."
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        _one_of("--backend", self.backend, BACKENDS)
        if not self.command:
            raise ValueError(
                "launch: no command, expected one after --, as in: distpad launch -np 2 -- python train.py"
            )
        if any("\0" in word for word in (*self.command, self.cwd)):
            raise ValueError("launch: the command or its folder holds a NUL byte, which a program cannot receive.")
        self._settle_launcher()
        self._settle_workers()
        self._settle_gpus()
        for flag, value, low in (
            ("--max-restarts", self.max_restarts, 0),
            ("--backoff-s", self.backoff_s, 0),
            ("--grace-s", self.grace_s, 0),
            ("--lost-after-s", self.lost_after_s, 1),
            ("--start-timeout-s", self.start_timeout_s, 1),
            ("--timeout-s", self.timeout_s, 0.001),
        ):
            if value is not None and not low <= value < float("inf"):
                raise ValueError(f"launch: {flag} is {value}, expected at least {low}.")
        for name in (*(given.partition("=")[0] for given in self.env), *self.secrets):
            if not _NAME.fullmatch(name):
                raise ValueError(f"launch: variable name is {name!r}, expected letters, digits and underscores.")
        if self.port is not None and not 1024 <= self.port <= 65535 - self.workers:
            raise ValueError(
                f"launch: --port is {self.port}, expected 1024 to {65535 - self.workers}: one port per worker."
            )
        for rank in self.ranks:
            if not 0 <= rank < (self.max_np or self.workers):
                raise ValueError(f"launch: --ranks names {rank}, expected 0 to {(self.max_np or self.workers) - 1}.")
        if self.network_interface and not re.fullmatch(r"[A-Za-z0-9_.:@-]{1,15}", self.network_interface):
            raise ValueError(
                f"launch: --network-interface is {self.network_interface!r}, expected a name such as eth0."
            )

    def _settle_launcher(self) -> None:
        """Choose the engine's launcher if none is given, and check that it fits the other fields."""
        if self.controller and self.backend != "horovod":
            raise ValueError(f"launch: --{self.controller} is for --backend horovod, which is {self.backend} here.")
        default = "ssh" if self.backend != "horovod" else "mpirun" if self.controller == "mpi" else "horovodrun"
        launcher = self.launcher or default
        _one_of("--launcher", launcher, LAUNCHERS)
        controller = self.controller
        if self.backend == "horovod":
            controller = {"horovodrun": "gloo"}.get(launcher, "mpi")
            if launcher == "ssh":
                raise ValueError(
                    "launch: --launcher is ssh, expected horovodrun, mpirun or srun for --backend horovod."
                )
            if self.controller and self.controller != controller:
                fitting = "horovodrun" if self.controller == "gloo" else "mpirun or srun"
                raise ValueError(f"launch: --launcher is {launcher}, expected {fitting} for --{self.controller}.")
        elif launcher not in ("ssh", "srun"):
            raise ValueError(f"launch: --launcher is {launcher}, expected ssh or srun for --backend {self.backend}.")
        if self.launcher_args and launcher == "ssh":
            raise ValueError("launch: --launcher-arg needs an engine's launcher. For options of ssh, use --ssh-arg.")
        if launcher == "horovodrun":
            horovodrun_ssh_args(self.ssh_args)
        if self.elastic and controller != "gloo":
            raise ValueError("launch: elastic jobs need Horovod over Gloo, expected --backend horovod --gloo.")
        object.__setattr__(self, "launcher", launcher)
        object.__setattr__(self, "controller", controller)

    def _settle_workers(self) -> None:
        """Derive the number of workers from the slots if none is given, and check that the slots suffice."""
        if not self.hosts:
            if self.np is None and self.backend != "mirrored" and not self.slots_per_host and not self.elastic:
                raise ValueError("launch: neither -np nor hosts are given, expected one of them, such as -np 2.")
            slots = 1 if self.backend == "mirrored" else self.slots_per_host or max(1, self.np or 1)
            here = Host("localhost", slots)
            object.__setattr__(self, "hosts", (here,))
        names = [host.name for host in self.hosts]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"launch: the hosts name {name} twice, expected each once. Add its slots up: {name}:N."
                )
        slots = sum(host.slots for host in self.hosts)
        if self.np is not None and self.np < 1:
            raise ValueError(f"launch: -np is {self.np}, expected at least 1.")
        if self.elastic:
            low, high = self.min_np or 1, self.max_np or max(self.np or 1, self.min_np or 1)
            if not 1 <= low <= (self.np or low) <= high:
                raise ValueError(
                    f"launch: --min-np {low}, -np {self.np}, --max-np {high}, expected them in this order."
                )
            object.__setattr__(self, "min_np", low)
            object.__setattr__(self, "max_np", high)
            object.__setattr__(self, "np", self.np or low)
            return
        if self.backend == "mirrored":
            if len(self.hosts) > 1:
                raise ValueError(
                    f"launch: --backend mirrored runs in one process, expected one host and not {', '.join(names)}. "
                    "Use --backend multiworker."
                )
            return
        np = self.np or slots
        if np > slots:
            have = ", ".join(f"{host.name}:{host.slots}" for host in self.hosts)
            raise ValueError(
                f"launch: -np is {np}, but the hosts have {slots} slots ({have}). Give hosts more slots as host:N, or "
                "--slots-per-host N, or name more hosts."
            )
        object.__setattr__(self, "np", np)

    def _settle_gpus(self) -> None:
        """Check that a host's GPUs suffice for its workers; the replicas of mirrored are its GPUs by default."""
        for flag, value, low in (("--gpus", self.gpus, 0), ("--gpus-per-worker", self.gpus_per_worker, 1)):
            if value is not None and value < low:
                raise ValueError(f"launch: {flag} is {value}, expected at least {low}.")
        if self.backend == "mirrored" and self.gpus_each:
            object.__setattr__(self, "np", self.np or self.gpus_each)
            if self.gpus_per_worker not in (None, self.np):
                rule = f"{self.np}, the replicas of -np"
                raise ValueError(f"launch: --gpus-per-worker is {self.gpus_per_worker}, expected {rule}.")
        if self.gpus and self._most_workers * self.gpus_each > self.gpus:
            workers = f"{self._most_workers} worker{'s' * (self._most_workers > 1)} with {self.gpus_each} each"
            needed = self._most_workers * self.gpus_each
            raise ValueError(f"launch: --gpus is {self.gpus}, expected at least {needed}: a host has {workers}.")

    @property
    def _most_workers(self) -> int:
        """The largest number of workers on one host."""
        return self.slots_per_host or 1 if self.elastic else max(place.local_rank for place in self.places) + 1

    @property
    def gpus_each(self) -> int:
        """The GPUs that each worker is promised; 0 for none."""
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
    except OSError as error:
        raise ValueError(f"launch: --hostfile {path} cannot be read: {error.strerror}.") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        slots = [word.partition("=")[2] for word in words[1:] if word.partition("=")[0] == "slots"]
        unknown = [word for word in words[1:] if word.partition("=")[0] not in ("slots", "max_slots", "max-slots")]
        if unknown or len(slots) > 1:
            raise ValueError(f"launch: line {number} of {path} is {line!r}, expected: name slots=N.")
        if words:
            where = f"line {number} of {path}"
            found.append(_host(f"{words[0]}:{slots[0]}" if slots else words[0], slots_per_host, where))
    if not found:
        raise ValueError(f"launch: --hostfile {path} names no host, expected lines such as: name slots=2.")
    return tuple(found)


def _host(text: str, slots_per_host: int | None, where: str) -> Host:
    name, colon, slots = text.partition(":")
    if colon and not slots.isdecimal():
        raise ValueError(f"launch: {where} holds {text!r}, expected HOST or HOST:SLOTS with a number of slots.")
    return Host(name, int(slots) if colon else slots_per_host or 1)


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
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise ValueError(f"launch: --ranks holds {part!r}, expected numbers and ranges such as 0,4-6.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + MOST_SLOTS:
            raise ValueError(f"launch: --ranks holds {part!r}, expected an ascending range of at most {MOST_SLOTS}.")
        found.extend(range(first, last + 1))
    return tuple(sorted(set(found)))


def parse_secrets(pairs: Iterable[str]) -> dict[str, str]:
    """Parse the variables and files of ``--secret NAME=FILE``."""
    found = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise ValueError(
                f"launch: --secret is {name!r} without a file, expected NAME=FILE. Do not write a secret's value on a "
                "command line, which all users of the machine can read."
            )
        found[name] = path
    return found


def horovodrun_ssh_args(ssh_args: Sequence[str]) -> list[str]:
    """Translate arguments of ssh to horovodrun's options: a port and an identity file.

    >>> horovodrun_ssh_args(["-p2222", "-i", "/keys/mine"])
    ['--ssh-port', '2222', '--ssh-identity-file', '/keys/mine']
    """
    found, words = [], list(ssh_args)
    while words:
        flag, value = words[0][:2], words[0][2:]
        used = 1 if value else 2
        value = value or "".join(words[1:2])
        # only digits and a plain path, since horovodrun inserts both unquoted into a shell command
        known = {"-p": ("--ssh-port", "[0-9]+"), "-i": ("--ssh-identity-file", "[A-Za-z0-9_./-]+")}
        name, rule = known.get(flag, ("", ""))
        if not name or not re.fullmatch(rule, value):
            raise ValueError(
                f"launch: --ssh-arg is {words[0]!r}, expected -pPORT or -iFILE (a plain path): horovodrun passes no "
                "other option to ssh. Write further options into ~/.ssh/config."
            )
        found += [name, value]
        del words[:used]
    return found


def _one_of(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"launch: {flag} is {value!r}, expected one of {', '.join(choices)}.")
