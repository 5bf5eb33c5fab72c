"""A real Slurm for tests: a login host and nodes, as namespaces of this machine.

Each has its own name, address, processes, /tmp and /dev/shm. Needs root, and Debian's slurm-wlm and munge.

    with slurm.start(nodes=2) as cluster:
        job = cluster.sbatch("launch/slurm/horovod.sbatch", "python", "train.py", options=["--nodes=2"])
        assert (job.state, job.code) == ("COMPLETED", 0), job.output
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import queue
import re
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import needs

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = pathlib.Path(__file__).with_suffix(".sh")
START_LIMIT_S = 60
POLL_S = 0.1
NEEDS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
# Variables of a pytest, srun or mpirun around the tests, which must not reach programs in this cluster.
FOREIGN = re.compile("SLURM|SBATCH|SRUN|OMPI|PMI|PRTE|HOROVOD_|TF_CONFIG")

CONFIG = """
ClusterName=tests
SlurmctldHost=login(10.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# What containers forbid: control groups, and binding tasks to cores.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
# Nodes have as many cores and GPUs as the tests ask for, whatever the machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
KillWait=5
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
"""


class Job(NamedTuple):
    """The result of a job: Slurm's state (COMPLETED, FAILED, TIMEOUT, CANCELLED, ...), and the exit code, signal and
    output of the batch script."""

    id: str
    state: str
    code: int
    signal: int
    output: str
    seconds: float


class Slurm:
    """A running cluster. Commands run on its login host."""

    def __init__(self, folder: pathlib.Path, nodes: Sequence[str], process: subprocess.Popen[str]) -> None:
        self.folder = folder  # shared with the nodes, for scripts and results
        self.nodes = tuple(nodes)
        self.process = process
        (self.init,) = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()

    def argv(self, *command: str | os.PathLike[str]) -> list[str]:
        """Wrap a command so that it runs on the login host, in this folder."""
        return ["nsenter", f"--target={self.init}", "--all", f"--wd={os.getcwd()}", "--", *map(str, command)]

    def env(self, settings: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of commands on the login host."""
        kept = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), **(settings or {})}

    def run(
        self,
        *command: str | os.PathLike[str],
        env: Mapping[str, str] | None = None,
        limit_s: float = 30,
        text: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command such as ``srun -N2 hostname`` on the login host, with ``text`` as its input."""
        argv, env = self.argv(*command), self.env(env)
        return subprocess.run(argv, env=env, input=text, capture_output=True, text=True, timeout=limit_s)

    def submit(
        self,
        script: str | os.PathLike[str],
        *args: str | os.PathLike[str],
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Submit a batch script with its arguments, and return the job's id. ``options`` are sbatch's."""
        output = f"--output={self.folder}/job-%j.out"
        done = self.run("sbatch", "--parsable", output, *options, script, *args, env=env)
        if done.returncode:
            raise RuntimeError(f"sbatch {script}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """The fields of ``scontrol show job``, by name."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)

    def output(self, job: str) -> str:
        """The output of a job so far."""
        path = self.folder / f"job-{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job: str, limit_s: float = 120) -> Job:
        """Wait for a job's end.

        Raises:
            TimeoutError: the job did not end within ``limit_s`` seconds. It is cancelled; the message has its output.
        """
        began = time.monotonic()
        while True:
            facts = self.show(job)
            state = facts.get("JobState", "UNKNOWN")
            if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "UNKNOWN"):
                code, _, number = facts["ExitCode"].partition(":")
                return Job(job, state, int(code), int(number), self.output(job), time.monotonic() - began)
            if time.monotonic() - began > limit_s:
                self.run("scancel", job)
                reason = facts.get("Reason", "None")
                raise TimeoutError(f"job {job}: {state} ({reason}) after {limit_s:.0f} s\n{self.output(job)}")
            time.sleep(POLL_S)

    def sbatch(
        self,
        script: str | os.PathLike[str],
        *args: str | os.PathLike[str],
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        limit_s: float = 120,
    ) -> Job:
        """Submit a batch script, and wait for its end."""
        return self.wait(self.submit(script, *args, options=options, env=env), limit_s)

    def states(self) -> dict[str, str]:
        """Each node's state, such as idle."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").stdout.splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def logs(self) -> str:
        """The last lines of all daemons' logs."""
        paths = [path for path in sorted(self.folder.glob("*.[lo][ou][gt]")) if not path.name.startswith("job-")]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in paths)


@contextlib.contextmanager
def start(
    nodes: int = 2, cpus: int = 8, gpus: int = 4, shared: Sequence[str | os.PathLike[str]] = ()
) -> Iterator[Slurm]:
    """Start a cluster of ``node1``, ``node2``, ..., and remove it at the end.

    ``cpus`` and ``gpus`` are the resources in Slurm's configuration of each node. Nodes have their own /tmp, which
    contains this checkout, the current Python, the cluster's folder, and the folders in ``shared``.

    If a requirement is missing, the test is skipped on a developer's machine and fails in CI.
    """
    if missing := _missing():
        needs.missing(f"Slurm: {missing}")
    names = [f"node{number}" for number in range(1, nodes + 1)]
    folder = pathlib.Path(tempfile.mkdtemp(prefix="distpad-slurm-"))
    try:
        _write(folder, names, cpus, gpus)
        mounts = [str(path) for path in (ROOT, sys.prefix, folder, *shared)]
        unshare = ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = subprocess.Popen(
            [*unshare, "bash", str(SCRIPT), str(folder), *mounts, "--", *names],
            env={**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "boot.out").open("w"),
            text=True,
            start_new_session=True,  # pytest handles Ctrl-C and then ends the cluster
        )
        try:
            yield _ready(folder, names, process)
        finally:
            process.kill()  # the kernel kills all processes of its namespace with it
            process.communicate()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _missing() -> str:
    lacking = {package for program, package in NEEDS.items() if shutil.which(program, path=_path()) is None}
    if lacking:
        return f"install {' '.join(sorted(lacking))}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return f"namespaces are forbidden: {tried.stderr.decode().strip()}" if tried.returncode else ""


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # Debian's folders of daemons


def _write(folder: pathlib.Path, names: Sequence[str], cpus: int, gpus: int) -> None:
    folder.chmod(0o755)  # munged requires that its socket's folder is open to all
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    places = {name: f"10.0.0.{10 + number}" for number, name in enumerate(names, 1)}
    hosts = ["127.0.0.1 localhost", "10.0.0.1 login", *(f"{address} {name}" for name, address in places.items())]
    (folder / "hosts").write_text("\n".join(hosts) + "\n")
    has = f"CPUs={cpus}" + (f" Gres=gpu:{gpus}" if gpus else "")
    nodes = [f"NodeName={name} NodeAddr={address} {has}" for name, address in places.items()]
    nodes.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder) + "\n".join(nodes) + "\n")
    devices = [folder / f"gpu{number}" for number in range(gpus)]  # slurmd only checks that the files exist
    for device in devices:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))


def _ready(folder: pathlib.Path, names: Sequence[str], process: subprocess.Popen[str]) -> Slurm:
    """Wait until all nodes are idle, and return the cluster."""
    end = time.monotonic() + START_LIMIT_S
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()
    try:
        up = lines.get(timeout=START_LIMIT_S).strip() == "up"
    except queue.Empty:
        up = False
    states: dict[str, str] = {}
    if up:
        cluster = Slurm(folder, names, process)
        while time.monotonic() < end:
            states = cluster.states()
            if states == dict.fromkeys(names, "idle"):
                return cluster
            time.sleep(POLL_S)
    logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(folder.glob("*.out")))
    raise RuntimeError(f"Slurm did not start within {START_LIMIT_S} s: {states or 'no nodes'}\n{logs}")
