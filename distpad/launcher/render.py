"""A job as command lines and environments: pure functions, whose results the tests compare with a record.

Of the user's data, these command lines contain only names of hosts and paths of programs. The command, its variables
and secrets reach the agents over standard input.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from distpad.launcher import spec, times

FOLDER = "/tmp"  # of sockets; the same on all hosts, and short, since the limit for a socket's path is 107 bytes
SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR")

# The variables of the login and its terminal. Workers have those of their own host; --env NAME passes one on.
OF_THE_LOGIN = re.compile(
    r"HOME|USER|LOGNAME|SHELL|MAIL|HOSTNAME|PWD|OLDPWD|SHLVL|_|TERM|COLORTERM|LS_COLORS|DISPLAY|WAYLAND_DISPLAY|"
    r"XAUTHORITY|WINDOWID|STY|TMUX\w*|SSH_\w+|DBUS_\w+|NVIDIA_\w+|XDG_RUNTIME_DIR|XDG_SESSION_\w+|BASH_FUNC_.*"
)
# Numbers of a host's GPUs
NUMBERED = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
# The variables that the engine's launcher and ssh inherit. They might put any others onto command lines.
NEEDED = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "TERM", "SSH_AUTH_SOCK"),
    *("PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", times.SCALE),
)
NEEDED_AS = ("SLURM_", "OMPI_MCA_", "PRTE_MCA_", "PMIX_MCA_")
# Variables that identify a process within a job. Nothing inherits them from the launcher's environment.
MEMBERSHIP = re.compile(
    r"TF_CONFIG|K_MPI_JOB_ROLE|JOB_COMPLETION_INDEX|HOROVOD_(RANK|SIZE|LOCAL_\w+|CROSS_\w+|HOSTNAME|CONTROLLER|CPU_OPERATIONS|GLOO_RENDEZVOUS_\w+|GLOO_IFACE|"
    r"ELASTIC)|OMPI_\w+|PMIX?_\w+|PRTE_\w+|SLURM_(?!JOB_|ARRAY_|CLUSTER_|SUBMIT_)\w+|"
    r"DISTPAD_(BACKEND|WORKERS|HOSTS|REPLICAS|GPUS|ATTEMPT|JOB|RANK|LOCAL_RANK)"
)
SECRET_NAME = re.compile(r"SECRET|TOKEN|PASS|CREDENTIAL|AUTH(?!_SOCK)|APIKEY|_PWD|(^|_)KEY(_|$)", re.IGNORECASE)
STALL = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "60", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "300"}
# For elastic jobs. By default, horovodrun never uses a host again after a failure, and a joining worker has less time
# than it needs to import TensorFlow.
ELASTIC_ARGS = ("--blacklist-cooldown-range", "5", "300", "--gloo-timeout-seconds", "120")


def folder(job: spec.Job) -> str:
    """The folder of the agents' sockets on each host."""
    return f"{FOLDER}/distpad-{job.id}"


def hosts_file(job: spec.Job) -> str:
    """The file on the launcher's host that lists an elastic job's hosts."""
    return f"{folder(job)}/hosts"


def agent_argv(job: spec.Job, host: spec.Host, environ: Mapping[str, str]) -> list[str]:
    """The command line that starts a host's agent from the launcher's host."""
    by_srun = job.launcher == "srun" or "SLURM_JOB_ID" in environ
    agent = [job.python, "-m", "distpad.launcher.agent"]
    return remote_argv(agent, host, environ, ssh_args(job), by_srun=by_srun)


def ssh_args(job: spec.Job) -> list[str]:
    """The arguments of ssh besides SSH. ssh itself must not give up a silent host before the launcher does."""
    alive_s = max(1, int(job.lost_after_s // 4))
    return ["-o", f"ServerAliveInterval={alive_s}", "-o", "ServerAliveCountMax=3", *job.ssh_arg]


def remote_argv(
    argv: Sequence[str], host: spec.Host, environ: Mapping[str, str], ssh_args: Sequence[str] = (), *, by_srun: bool
) -> list[str]:
    """The command line that runs a program on a host, with its standard streams connected to this process."""
    if host.is_here:
        return list(argv)
    if by_srun:
        options = [f"--nodelist={host.name}", "--overlap", "--unbuffered", "--mpi=none", "--quiet"]
        return ["srun", "--nodes=1", "--ntasks=1", *options, *argv]
    given = [f"{name}={environ[name]}" for name in ("PYTHONPATH", times.SCALE) if environ.get(name)]
    remote = [*(["env", *given] if given else []), *argv]
    return [*SSH, *ssh_args, host.name, shlex.join(remote)]


def absolute_paths(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables with absolute paths in PYTHONPATH, since agents and engines start in other folders."""
    paths = environ.get("PYTHONPATH")
    absolute = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep))) if paths else ""
    return {**environ, **({"PYTHONPATH": absolute} if paths else {})}


def worker_argv(job: spec.Job) -> list[str]:
    """The command line of one worker: the parent process that receives its orders from its host's agent."""
    return [job.python, "-m", "distpad.launcher.worker", folder(job)]


def engine_argv(job: spec.Job, mpi: str = "") -> list[str]:
    """The command line of the engine's own launcher; empty if the agents start the workers.

    Args:
      job: the job.
      mpi: the first line of ``mpirun --version``, if the launcher is mpirun.
    """
    engines = {"horovodrun": _horovodrun, "mpirun": _mpirun, "srun": _srun}
    return engines[job.launcher](job, mpi) if job.launcher in engines else []


def _horovodrun(job: spec.Job, _: str) -> list[str]:
    where = _hosts(job)
    if job.elastic:
        where = ["--min-np", str(job.min_np), "--max-np", str(job.max_np)]
        where += ["--host-discovery-script", f"cat {hosts_file(job)}"]  # the hosts that discovery.py has found
        where += ELASTIC_ARGS
    argv = ["horovodrun", "--gloo", "-np", str(job.workers), "--disable-cache"]
    argv += ["--start-timeout", str(int(job.start_timeout_s)), *where]
    # without an interface, horovodrun starts servers with their key on a command line: see checks.interface
    found = "FOUND-AT-START" if job.elastic or job.crosses_hosts else "lo"
    argv += ["--network-interface", job.network_interface or found, *spec.horovodrun_ssh_args(job.ssh_arg)]
    return [*argv, *job.launcher_arg, *worker_argv(job)]


def _mpirun(job: spec.Job, mpi: str) -> list[str]:
    version, interface = re.search(r"Open MPI\D*(\d+)", mpi), job.network_interface
    prrte = version is not None and int(version[1]) >= 5
    argv = ["mpirun", "--allow-run-as-root", "-np", str(job.workers), *_hosts(job)]  # of no effect for others
    # A worker is a TensorFlow process with many threads. Open MPI's default would bind it to one core.
    argv += ["--bind-to", "none", "--map-by", "slot"]
    for name, value in (("pml", "ob1"), ("btl", "^openib")):  # as Horovod's documentation says
        if name not in job.launcher_arg:  # mpirun refuses duplicates; --launcher-arg overrides these, as for UCX
            argv += ["--mca", name, value]
    ssh = shlex.join([*SSH[1:], *ssh_args(job)])
    argv += ["--prtemca", "plm_ssh_args", ssh] if prrte else ["--mca", "plm_rsh_args", ssh]
    if not prrte:
        argv += ["--mca", "btl_vader_single_copy_mechanism", "none"]  # containers forbid the system call that it uses
    if interface:
        argv += ["--mca", "btl_tcp_if_include", interface]
        argv += ["--prtemca", "prte_if_include", interface] if prrte else ["--mca", "oob_tcp_if_include", interface]
    for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH"):
        argv += ["-x", name]
    return [*argv, *job.launcher_arg, *worker_argv(job)]


def _srun(job: spec.Job, _: str) -> list[str]:
    each = max(host.slots for host in job.used_hosts)
    argv = ["srun", f"--nodes={len(job.used_hosts)}", f"--ntasks={job.workers}", f"--ntasks-per-node={each}"]
    argv += [f"--nodelist={','.join(host.name for host in job.used_hosts)}"]
    argv += ["--distribution=block"]  # srun's default may be cyclic
    argv += ["--overlap", "--unbuffered", "--kill-on-bad-exit=1"]
    argv += ["--mpi=pmix" if job.backend == "horovod" else "--mpi=none"]
    return [*argv, *job.launcher_arg, *worker_argv(job)]


def _hosts(job: spec.Job) -> list[str]:
    return ["-H", ",".join(f"{host.name}:{host.slots}" for host in job.hosts)]


def engine_env(job: spec.Job, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the engine's launcher: the variables of NEEDED, without the user's others."""
    # horovodrun, and perhaps mpirun, are in the folder of their Python, which may be missing from PATH
    path = f"{os.path.dirname(job.python)}{os.pathsep}{environ.get('PATH', os.defpath)}"
    return {**agent_env(environ), "PATH": path, "DISTPAD_JOB": job.id, "PYTHONUNBUFFERED": "1"}


def agent_env(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of agents, and of ssh and srun: like the engine's, but without the job's id."""
    return {k: v for k, v in environ.items() if k in NEEDED or k.startswith(NEEDED_AS)}


def worker_env(
    job: spec.Job, host: spec.Host, environ: Mapping[str, str], secrets: Mapping[str, str], attempt: int = 0
) -> dict[str, str]:
    """The variables of a host's workers, besides the engine's own.

    All workers inherit the launcher's variables except those of OF_THE_LOGIN and MEMBERSHIP, and those of ``--env``.
    They also get the expected topology, which the library compares with the engine's, the settings of Horovod and
    NCCL, and the secrets.
    """
    env = {k: v for k, v in environ.items() if not (MEMBERSHIP.fullmatch(k) or OF_THE_LOGIN.fullmatch(k))}
    if not host.is_here or "SLURM_JOB_ID" in environ:
        # Another host numbers its GPUs differently, and Slurm sets the variable for each step.
        env = {k: v for k, v in env.items() if k not in NUMBERED}
    for given in job.env:
        name, equals, value = given.partition("=")
        if not equals and name not in environ:
            raise ValueError(f"launch: --env names {name}, expected a variable that is set here, or NAME=VALUE.")
        env[name] = value if equals else environ[name]
    env.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    if job.backend == "horovod":
        env = {**STALL, **env}
    if job.network_interface:
        env["NCCL_SOCKET_IFNAME"] = job.network_interface
    topology = {
        **{"BACKEND": job.backend, "ATTEMPT": str(attempt), "JOB": job.id, "GPUS": job.gpus_each or None},
        **({} if job.elastic else {"WORKERS": job.workers, "HOSTS": len(job.used_hosts)}),
        "REPLICAS": job.np if job.backend == "mirrored" else None,
    }
    env |= {f"DISTPAD_{name}": str(value) for name, value in topology.items() if value is not None}
    return {**env, "PYTHONUNBUFFERED": "1", **secrets}


def orders(
    job: spec.Job, host: spec.Host, environ: Mapping[str, str], secrets: Mapping[str, str], attempt: int
) -> dict:
    """The first message to a host's agent, sent as JSON over its standard input."""
    count = sum(place.host == host for place in job.places) if job.backend == "multiworker" else 0
    compared = ("python", "packages", "names", "interfaces") if job.elastic or job.crosses_hosts else ()
    probes = ["ports", *compared, *(("gpus", "packages") if job.gpus_each else ())]
    asked = {
        "probes": probes,
        "limit_s": 0.8 * job.start_timeout_s,
        "hosts": [] if job.elastic else [each.name for each in job.used_hosts],
        "ports": [0] * count if job.port is None else list(range(job.port, job.port + count)),
    }
    return {
        "job": job.id,
        "folder": folder(job),
        "command": list(job.command),
        "cwd": job.cwd,
        "env": worker_env(job, host, environ, secrets, attempt),
        "slots": host.slots,
        "gpus": job.gpus_each if job.hides_gpus else 0,
        "grace_s": job.grace_s,
        "lost_after_s": job.lost_after_s,
        "holds_failures": not job.elastic,
        "waits": job.waits,
        "asked": asked,
    }


def addresses(job: spec.Job, ports: Mapping[str, Sequence[int]]) -> list[str]:
    """The workers' addresses for TF_CONFIG, from the ports that each host's agent found free."""
    names = {host.name: host.name if job.crosses_hosts else "127.0.0.1" for host in job.used_hosts}
    return [f"{names[place.host.name]}:{ports[place.host.name][place.local_rank]}" for place in job.places]


def tf_config(addresses: Sequence[str], index: int) -> str:
    """TF_CONFIG of a worker. It is equal on all workers of a job, except for the index.

    Args:
      addresses: ``host:port`` of each worker, in the order of their indices. The server of the first one also runs the
        coordination service.
      index: the worker's index.

    >>> tf_config(["node1:2222", "node2:2222"], 1)
    '{"cluster": {"worker": ["node1:2222", "node2:2222"]}, "task": {"type": "worker", "index": 1}}'
    """
    return json.dumps({"cluster": {"worker": [*addresses]}, "task": {"type": "worker", "index": index}})


def rank_env(job: spec.Job, place: spec.Place, ports: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The variables of one worker that its agent starts."""
    env = {"DISTPAD_RANK": str(place.rank)}
    if job.hides_gpus:
        env["DISTPAD_LOCAL_RANK"] = str(place.local_rank)  # which GPUs it uses
    if job.backend == "multiworker":
        env["TF_CONFIG"] = tf_config(addresses(job, ports), place.rank)
    return env


def redacted(name: str, value: str, secrets: Mapping[str, Any]) -> str:
    """A variable's value with secrets and passwords hidden."""
    return "***" if name in secrets or SECRET_NAME.search(name) else without_passwords(value)


def without_passwords(text: str) -> str:
    """Hide the passwords in a text's URLs, such as those of proxies and package indexes.

    >>> without_passwords("from https://me:secret@host/simple")
    'from https://***@host/simple'
    """
    return re.sub(r"(?<=://)[^/\s\"]+@", "***@", text)
