"""Run a pod's part of a job. The only module of ``distpad pod`` that starts processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

from distpad.launcher import agent, discovery, gang, pod, render, run, spec, times
from distpad.launcher.outcomes import HOST, LOST, TIME

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TERMINATED = 128 + signal.SIGTERM
ASKED_AT_ONCE = 32
SSH_PORT = 2222  # of k8s/image/ssh_config and sshd_config


def log(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"distpad pod: {text}", file=sys.stderr, flush=True)


# -- a worker of MultiWorkerMirroredStrategy --------------------------------------------------------------------------


def work(
    member: pod.Member,
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    peers: gang.Gang | None = None,
    wait_s: float = 600.0,
    grace_s: float = 10.0,
    finish_s: float = 600.0,
) -> int:
    """Run one worker's training, and return its exit code.

    Args:
      member: this pod among the others.
      command: the training command.
      environ: its variables.
      peers: the gang, for pods that Kubernetes does not restart together.
      wait_s: seconds to wait for the other pods of the gang.
      grace_s: seconds for the training to end by itself after another pod of the gang is lost, and again after SIGTERM.
      finish_s: seconds to wait for the other pods of the gang after this one is done.
    """
    signals = _Signals()
    if peers is not None:
        log(f"worker {member.index} of {len(member.names)} waits for the others")
        try:
            if not peers.join(wait_s, log):
                log(f"missing after {wait_s:g} s: {peers.whom}")
                return HOST
        except OSError as error:
            log(f"port {peers.port} cannot be used: {error.strerror}")
            return HOST
    log(f"starting {command[0]} as worker {member.index} of {len(member.names)}")
    try:
        training = signals.start(command, member.env(environ))
    except OSError as error:
        log(f"cannot start {command[0]}: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126
    if peers is not None:
        threading.Thread(target=_end_with, args=(peers, training, grace_s), daemon=True).start()
    code = training.wait()
    code = 128 - code if code < 0 else code
    _signal(training, signal.SIGKILL)  # leftover processes of its group
    if code == 0 and signals.received:  # the training stopped early
        return 128 + signals.received[0]
    if code == TERMINATED and not signals.received:
        # Another pod got SIGTERM, and all workers have saved and ended together. The end of that pod restarts this one.
        lost = peers.lost if peers is not None else threading.Event()
        lost.wait(times.here().restart_s)
        code = 128 + signals.received[0] if signals.received else 1
    if peers is None:
        return code
    if code == 0 and peers.finish(finish_s):
        return 0
    if peers.lost.is_set():
        log(f"{peers.whom} failed or was lost: this worker ends with it")
        return LOST
    if code == 0:
        log(f"this worker is done, but another one is not after {finish_s:g} s")
        return TIME
    return 1 if code == LOST else code  # a Job does not count LOST, which must be another pod's failure


class _Signals:
    """The signals to this pod: they end a pod that waits, and reach its training."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._pending: list[int] = []
        self._is_starting = False
        self._training: subprocess.Popen[bytes] | None = None
        for number in FORWARDED:
            signal.signal(number, self._receive)

    def start(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start the training. A signal waits meanwhile, since an exit would leave the training behind."""
        self._is_starting = True
        self._training = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        self._forward()
        return self._training

    def _receive(self, number: int, _: object) -> None:
        self.received.append(number)
        if not self._is_starting:
            sys.exit(128 + number)
        self._pending.append(number)
        self._forward()

    def _forward(self) -> None:
        while self._pending and self._training is not None:
            number = self._pending.pop(0)
            log(f"got {signal.Signals(number).name}: forwarding it to the training")
            _signal(self._training, number)


def _end_with(peers: gang.Gang, training: subprocess.Popen[bytes], grace_s: float) -> None:
    """End the training after the loss of another pod. It usually fails by itself, but may hang."""
    peers.lost.wait()
    own_s = min(grace_s, times.here().own_error_s)
    for number, seconds in ((None, own_s), (signal.SIGTERM, grace_s), (signal.SIGKILL, times.KILLED_S)):
        if number is not None:
            _signal(training, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            training.wait(seconds)
            return


def _signal(training: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(training.pid, number)


# -- the launcher of an MPI job ---------------------------------------------------------------------------------------


def launch(job: spec.Job, environ: Mapping[str, str], *, wait_s: float) -> int:
    """Wait for sshd in the pods, and run the job as ``distpad launch`` does."""
    return run.run(job, environ, lambda received: _until(lambda: _missing(job, environ), wait_s, received))


def _missing(job: spec.Job, environ: Mapping[str, str]) -> str:
    """What the job lacks before it can start, as text; empty if it can start.

    A Job makes a new launcher while the old one, on a drained node, still saves a checkpoint: the new one waits for it.
    """
    try:
        hosts = discovery.Discovery(job, os.devnull, lambda host: True).discover() if job.elastic else job.hosts
    except ValueError as error:
        return str(error)
    silent = _ask(hosts, lambda host: not answers(host.name))
    nothing = f"no sshd answers on port {SSH_PORT}"
    there = [host for host in hosts if host.name not in silent]
    if job.elastic and not pod.enough(job, there):
        more = f", and {nothing} of {gang.few(silent)}" if silent else ""
        return f"pods for {job.min_np} workers; {job.host_discovery_script} names {len(hosts)}{more}"
    if silent and not job.elastic:
        return f"{gang.few(silent)} ({nothing})"
    busy = _ask(there, lambda host: _trains(job, host, environ))
    return f"the training of an earlier launcher to end on {gang.few(busy)}" if busy else ""


def _ask(hosts: Sequence[spec.Host], question: Callable[[spec.Host], bool]) -> list[str]:
    """The names of the hosts for which the answer is yes."""
    with concurrent.futures.ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return [host.name for host, answer in zip(hosts, pool.map(question, hosts)) if answer]


def _trains(job: spec.Job, host: spec.Host, environ: Mapping[str, str]) -> bool:
    """Whether workers run on a host."""
    program = [job.python, "-m", "distpad.launcher.podrun"]
    argv = render.remote_argv(program, host, environ, render.ssh_args(job), by_srun=False)
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=times.AGENT_WITHIN_S)
        return done.stdout.strip() not in (b"", b"0")
    return False  # the job's own checks report the host


def _until(find_missing: Callable[[], str], wait_s: float, received: list[int]) -> bool:
    """Poll until nothing is missing. Returns false after ``wait_s`` seconds or a signal."""
    began = reported = time.monotonic()
    while missing := find_missing():
        now = time.monotonic()
        if received:
            return False
        if now > began + wait_s:
            log(f"missing after {wait_s:g} s: {missing}")
            return False
        if now > reported + times.here().report_s:
            reported = now
            log(f"waiting for {missing}")
        time.sleep(times.here().look_s)
    return not received


def answers(name: str) -> bool:
    """Whether an ssh server answers on this host."""
    try:
        with socket.create_connection((name, SSH_PORT), timeout=times.ANSWER_S) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


# -- a worker's pod of an MPI job -------------------------------------------------------------------------------------


def serve() -> int:
    """Run sshd, through which the launcher starts the workers. It forwards signals to the workers first.

    The image's /etc/ssh configures it: see k8s/image/sshd_config.
    """
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"
    sshd = shutil.which("sshd", path=path)
    if sshd is None:
        log("sshd was not found. Debian: apt-get install openssh-server")
        return 127
    argv = [sshd, "-D", "-e"]
    with run.received_signals() as received:
        server = os.spawnv(os.P_NOWAIT, sshd, argv)
        forwarded = 0
        while True:
            ended, status = _reap()
            if ended == server:
                code = os.waitstatus_to_exitcode(status)
                log(f"sshd has ended (exit code {code})")
                return 1 if code < 1 else code
            if len(received) > forwarded:
                forwarded = len(received)
                log(f"got {signal.Signals(received[-1]).name}: forwarding it to {len(workers_here())} workers")
                for process in workers_here():
                    with contextlib.suppress(psutil.Error):
                        process.send_signal(received[-1])
            if forwarded and not workers_here():
                os.kill(server, signal.SIGTERM)
                return 128 + received[0]
            if not ended:
                time.sleep(times.here().look_s)


def _reap() -> tuple[int, int]:
    """Reap the next child that has ended. The first process of a container inherits orphaned processes."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(-1, os.WNOHANG)
    return 0, 0


def workers_here() -> list[psutil.Process]:
    """The parents of the training's processes in this pod, which forward signals to the training."""
    here, found = agent.network("self"), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "distpad.launcher.worker" in process.cmdline() and agent.network(process.pid) == here:
                found.append(process)
    return found


if __name__ == "__main__":
    print(len(workers_here()))
