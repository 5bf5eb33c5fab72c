"""Several hosts on one machine, for tests of launchers.

    with hosts.cluster(3) as (host1, host2, host3):
        assert host1.run(["ssh", "host2", "hostname"]).stdout == "host2\\n"

Each host has its own network interface and address at a switch, host name, /etc/hosts, /dev/shm, /run and sshd. Root
can reach each host from each other by ``ssh NAME``, with strict checks of host keys. The hosts share the other parts of
the file system, as by NFS, the process ids (so that tests see and can signal every process), and a home folder, which
is not this machine's. All interfaces, mounts and names exist only in the cluster's own namespaces, so that clusters can
run at the same time. guard.py ends a cluster when the test's process ends for any reason.

Needs root on Linux, iproute2, util-linux and OpenSSH.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import needs
from cluster import guard

NETWORK = "10.77.0"  # the same in each cluster: their switches are not connected
USER, USER_HOME = 10001, "/tmp"  # an ordinary user, besides root
PROGRAMS = ("ip", "mount", "nsenter", "ssh", "ssh-keygen", "sshd", "unshare")
LIMIT_S = 20
PLAIN = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

SSHD_CONFIG = """Port 22
ListenAddress 0.0.0.0
HostKey {key}
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
PrintLastLog no
MaxStartups 100
"""
SSH_CONFIG = """Host *
  StrictHostKeyChecking yes
  UpdateHostKeys no
  BatchMode yes
"""


class Host:
    """One host of a cluster, with methods to run commands and to inject faults.

    Attributes:
        name: its host name, ``host1``, ``host2``, ...
        address: its address in the cluster's network
        home: the home folder of root, the same on all hosts
    """

    def __init__(self, name: str, *, number: int, keeper: int, switch: int, folder: pathlib.Path) -> None:
        self.name, self.address, self.home = name, f"{NETWORK}.{number}", folder / "home"
        self._keeper, self._switch, self._folder = keeper, switch, folder / name
        self.port = f"port{number}"  # of the switch; a host's name may be too long for an interface
        self._sshd: subprocess.Popen[bytes] | None = None

    # -- processes --

    def command(self, argv: Sequence[str | os.PathLike[str]], cwd: str | os.PathLike[str] | None = None) -> list[str]:
        """Wrap a command so that it runs in this host. The wrapper execs the command, so that signals reach it."""
        spaces = _enter(self._keeper, "--uts", "--mount")
        # nsenter itself would stay in the old mount namespace
        return [*spaces, "env", f"--chdir={cwd or os.getcwd()}", *map(os.fspath, argv)]

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command in this host, like ``subprocess.Popen``, but with the cluster's HOME."""
        environment = {**(os.environ if env is None else env), "HOME": str(self.home)}
        environment.pop("SSH_AUTH_SOCK", None)  # the developer's own keys must not be used here
        return subprocess.Popen(self.command(argv, cwd), env=environment, **settings)

    def run(
        self, argv: Sequence[str | os.PathLike[str]], *, limit_s: float = 60, **settings: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in this host to its end. ``stdout`` holds both output streams.

        Raises:
            subprocess.TimeoutExpired: the command did not end within ``limit_s``. It is killed with its session.
        """
        settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **settings}
        process = self.popen(argv, text=True, start_new_session=True, **settings)
        try:
            output, _ = process.communicate(timeout=limit_s)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.communicate()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def processes(self) -> list[int]:
        """All processes in this host except its sshd: leftover processes of a job. Sessions of sshd count."""
        own = {self._keeper, self._sshd.pid if self._sshd else None}
        network = guard.network(self._keeper)
        assert network is not None, f"{self.name} is down"
        return [process for process in guard.inhabitants({network}) if process not in own]

    def listens(self, port: int) -> bool:
        """Whether a process listens on this TCP port, at any address."""
        tables = [
            pathlib.Path(f"/proc/{self._keeper}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")
        ]
        rows = [row.split() for table in tables for row in table]
        return any(local.endswith(f":{port:04X}") and state == "0A" for _, local, _, state, *_ in rows)

    # -- faults --

    def cut(self) -> None:
        """Drop all packets in both directions. The interface stays up."""
        _ip(self._switch, f"link set {self.port} nomaster")

    def mend(self) -> None:
        """Undo ``cut``."""
        _ip(self._switch, f"link set {self.port} master switch")

    def start_sshd(self) -> None:
        """Start sshd, and wait until it listens."""
        sshd = shutil.which("sshd", path=PLAIN["PATH"])
        assert sshd and self._sshd is None
        with (self._folder / "sshd.log").open("ab") as log:
            self._sshd = subprocess.Popen(
                self.command([sshd, "-D", "-e", "-f", self._folder / "sshd_config"], cwd="/"),
                env=PLAIN,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _wait(lambda: self.listens(22), f"{self.name}: sshd does not listen", self._folder / "sshd.log")

    def stop_sshd(self) -> None:
        """Stop sshd, so that connections are refused. Open sessions continue."""
        if self._sshd is not None:
            self._sshd.terminate()
            self._sshd.wait(LIMIT_S)
            self._sshd = None

    def change_host_key(self) -> None:
        """Change sshd's host key, which the other hosts do not know. Open sessions continue."""
        self.stop_sshd()
        for file in self._folder.glob("host_key*"):
            file.unlink()
        _make_key(self._folder / "host_key")
        self.start_sshd()

    def resolve_to_loopback(self, name: str | None = None) -> None:
        """Make a name, by default the host's own, resolve to the loopback on this host, as many installers do."""
        file = self._folder / "etc" / "hosts"
        rows = [row for row in file.read_text().splitlines() if (name or self.name) not in row.split()]
        file.write_text(
            "\n".join([*rows, f"127.0.1.1 {name or self.name}", ""])
        )  # in place, since the file is bound to /etc/hosts

    def occupy(self, port: int) -> subprocess.Popen[Any]:
        """Start a process that listens on a TCP port, and return it. Kill it to free the port."""
        code = f"import socket, time; taken = socket.create_server(('', {port})); time.sleep(1e6)"
        process = self.popen([sys.executable, "-S", "-c", code], env=PLAIN, stdin=subprocess.DEVNULL)
        _wait(lambda: self.listens(port), f"{self.name}: port {port} cannot be taken")
        return process


@contextlib.contextmanager
def cluster(
    count: int,
    *,
    names: Sequence[str] = (),
    known_as: Callable[[str], list[str]] = lambda name: [name],
    sshd: bool = True,
) -> Iterator[tuple[Host, ...]]:
    """Start hosts ``host1`` to ``hostN``, and end them with all their processes.

    If this machine cannot run such hosts, the test is skipped on a developer's machine and fails in CI.

    Args:
        count: the number of hosts.
        names: their host names, if they differ from the default.
        known_as: for a host's name, the names by which other hosts know it.
        sshd: whether each host runs sshd.
    """
    if reason := missing():
        needs.missing(f"no hosts for tests here: {reason}")
    names = names or [f"host{number}" for number in range(1, count + 1)]
    folder = pathlib.Path(tempfile.mkdtemp(prefix="distpad-hosts-"))
    _write_files(folder, names, known_as)
    keeping = subprocess.Popen(
        [sys.executable, "-S", guard.__file__, folder, "switch", *names],
        env=PLAIN,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    hosts: tuple[Host, ...] = ()
    try:
        assert keeping.stdin and keeping.stdout
        switch, *keepers = map(int, keeping.stdout.readline().split() or [0])
        assert len(keepers) == count, "guard.py could not make the hosts (its words are above)"
        hosts = tuple(
            Host(name, number=number, keeper=keeper, switch=switch, folder=folder)
            for number, (name, keeper) in enumerate(zip(names, keepers), start=1)
        )
        _connect(switch, {host.address: (host.port, keeper) for host, keeper in zip(hosts, keepers)})
        for host in hosts if sshd else ():
            host.start_sshd()
        yield hosts
    finally:
        with contextlib.suppress(BrokenPipeError):
            keeping.communicate("end\n", timeout=2 * LIMIT_S)
        for host in hosts:
            host.stop_sshd()  # reaps the dead process


def missing() -> str:
    """The reason why this machine cannot run such hosts; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "they need root on Linux"
    if absent := [name for name in PROGRAMS if shutil.which(name, path=PLAIN["PATH"]) is None]:
        return f"{', '.join(absent)} not found. On Debian: apt-get install iproute2 mount openssh-client openssh-server"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return tried.stderr.strip()  # a container without CAP_SYS_ADMIN


def processes(marker: str) -> list[int]:
    """The processes on all hosts and this machine with a text in their command line or environment, except this one."""
    return [
        process for process in _everyone() if marker.encode() in _read(process, "cmdline") + _read(process, "environ")
    ]


def command_lines() -> dict[int, str]:
    """The command lines of all processes on all hosts and this machine, except this process."""
    return {process: _read(process, "cmdline").replace(b"\0", b" ").decode(errors="replace") for process in _everyone()}


def _everyone() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]


def _read(process: int, what: str) -> bytes:
    try:
        return pathlib.Path(f"/proc/{process}/{what}").read_bytes()
    except OSError:  # has ended
        return b""


def _enter(keeper: int, *spaces: str) -> list[str]:
    return ["nsenter", f"--target={keeper}", "--net", *spaces, "--"]


def _ip(keeper: int, *lines: str) -> None:
    """Run ``ip`` commands in a keeper's network namespace."""
    done = subprocess.run(
        [*_enter(keeper), "ip", "-batch", "-"], input="\n".join(lines) + "\n", capture_output=True, text=True
    )
    assert done.returncode == 0, f"ip {lines}: {done.stderr}"


def _connect(switch: int, ports: Mapping[str, tuple[str, int]]) -> None:
    """Connect hosts, given as {address: (port, keeper)}, to a switch."""
    _ip(switch, "link add switch type bridge", "link set switch up")
    for address, (port, keeper) in ports.items():
        _ip(
            switch,
            f"link add {port} type veth peer name eth0 netns {keeper}",
            f"link set {port} master switch up",
        )
        _ip(keeper, "link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up")


def _write_files(folder: pathlib.Path, names: Sequence[str], known_as: Callable[[str], list[str]]) -> None:
    """Write the files of all hosts. The files in NAME/etc are bound over those in /etc."""
    (folder / "switch" / "etc").mkdir(parents=True)
    (folder / "switch" / "etc" / "hostname").write_text("switch\n")
    user = folder / "home" / ".ssh"
    user.mkdir(parents=True, mode=0o700)
    (user / "config").write_text(SSH_CONFIG)
    public = _make_key(user / "id_ed25519")
    (user / "authorized_keys").write_text(public)
    addresses = [(f"{NETWORK}.{number}", name) for number, name in enumerate(names, start=1)]
    known = []
    for address, name in addresses:
        etc = folder / name / "etc"
        etc.mkdir(parents=True)
        (etc / "hostname").write_text(f"{name}\n")
        rows = [(ip, [*known_as(host), *([host] if host == name else [])]) for ip, host in addresses]
        rows = [("127.0.0.1", ["localhost"]), *((ip, list(dict.fromkeys(all_names))) for ip, all_names in rows)]
        (etc / "hosts").write_text("".join(f"{ip} {' '.join(all_names)}\n" for ip, all_names in rows))
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
        # root needs this home folder and an unlocked account, or sshd would refuse the login
        own = [f"root:x:0:0:root:{folder / 'home'}:/bin/bash", f"user:x:{USER}:{USER}:user:{USER_HOME}:/bin/bash"]
        users = [
            row
            for row in pathlib.Path("/etc/passwd").read_text().splitlines()
            if row.split(":")[2] not in ("0", str(USER))
        ]
        (etc / "passwd").write_text("\n".join([*own, *users, ""]))
        (etc / "shadow").write_text("root:*:19000:0:99999:7:::\nuser:*:19000:0:99999:7:::\n")
        known.append(f"{name},{address} {_make_key(folder / name / 'host_key')}")
        (folder / name / "sshd_config").write_text(SSHD_CONFIG.format(key=folder / name / "host_key"))
    (user / "known_hosts").write_text("".join(known))


def _make_key(file: pathlib.Path) -> str:
    """Make a key pair, and return the public key."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "distpad-test", "-f", file], check=True)
    return file.with_suffix(".pub").read_text()


def _wait(condition: Callable[[], bool], argument_error: str, log: pathlib.Path | None = None) -> None:
    limit = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"{argument_error} after {LIMIT_S} s\n{log.read_text() if log else ''}")
        time.sleep(0.005)
