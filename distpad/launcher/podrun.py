"""Run a pod's part of a job. The only module of ``distpad pod`` that starts processes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import pathlib
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

from distpad.launcher import agent, discovery, gang, pod, run, spec, times
from distpad.launcher.outcomes import HOST, LOST, TIME

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ASKED_AT_ONCE = 32


def log(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"distpad pod: {text}", file=sys.stderr, flush=True)


# -- a worker of MultiWorkerMirroredStrategy --------------------------------------------------------------------------


class Worker:
    """The training of one worker in a gang.

    Args:
      member: this pod's membership in the gang.
      command: the training command.
      environ: the command's variables.
      port: the port of the register in pod 0.
      wait_s: seconds to wait for the other pods.
      grace_s: seconds for the training to end by itself after another pod is lost, and again after SIGTERM.
      finish_s: seconds to wait for the other workers after this one is done.
    """

    def __init__(
        self,
        member: pod.Member,
        command: Sequence[str],
        environ: Mapping[str, str],
        *,
        port: int,
        wait_s: float,
        grace_s: float,
        finish_s: float,
    ) -> None:
        self.member, self.command, self.environ = member, command, environ
        self.port, self.wait_s, self.grace_s, self.finish_s = port, wait_s, grace_s, finish_s
        self.child: asyncio.subprocess.Process | None = None
        self.received = 0  # the first signal
        self.other_terminated = False  # whether another pod has received SIGTERM
        self.others: gang.Membership

    async def run(self) -> int:
        """Return the training's exit code, or one of this module's if the training did not start or finish."""
        self.others = gang.Membership(self.member.names, self.member.index, self.port)
        loop = asyncio.get_running_loop()
        me = asyncio.current_task()
        for number in FORWARDED:
            loop.add_signal_handler(number, self._take_signal, number, me)
        register = gang.Register(self.member.names)
        try:
            if self.member.index == 0:
                await register.open(self.port)
            await asyncio.wait_for(self.others.join(log), self.wait_s)
            return await self._train()
        except asyncio.CancelledError:  # a signal during the wait
            return 128 + self.received
        except asyncio.TimeoutError:
            log(f"missing after {self.wait_s:g} s: {self.others.waits_for}")
            return HOST
        except OSError as error:
            log(f"port {self.port} cannot be used: {error.strerror}")
            return HOST
        finally:
            await self.others.close()
            if self.member.index == 0:
                await register.close()

    async def _train(self) -> int:
        names = self.member.names
        log(f"all {len(names)} workers are present: starting {self.command[0]} as worker {self.member.index}")
        try:
            self.child = await asyncio.create_subprocess_exec(
                *self.command,
                env=self.member.env(self.environ),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            log(f"cannot start {self.command[0]}: {error.strerror}")
            return self._failed(127 if isinstance(error, FileNotFoundError) else 126)
        ended = asyncio.ensure_future(self.child.wait())
        while True:
            event = asyncio.ensure_future(self.others.events.get())
            await asyncio.wait([ended, event], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                if event.done():
                    self.others.events.put_nowait(event.result())
                event.cancel()
                code = ended.result()
                self._signal(signal.SIGKILL)  # leftover processes of its group
                if self.other_terminated:
                    self._failed(LOST)
                    return LOST
                return await self._done() if code == 0 else self._failed(code if code > 0 else 128 - code)
            what, text = event.result()
            if what == "ended":
                return await self._end(text, ended)
            if what == "term" and not self.received and not self.other_terminated:
                log(f"{text} is being terminated: sending SIGTERM to the training")
                self.other_terminated = True
                self._signal(signal.SIGTERM)

    async def _done(self) -> int:
        """Wait for the other workers. A pod that has succeeded cannot restart, and a restart needs all pods."""
        if self.received:  # the training stopped early
            return self._failed(128 + self.received)
        self.others.send(**{"is": "done"})
        try:
            while True:
                what, text = await asyncio.wait_for(self.others.events.get(), self.finish_s)
                if what == "all done":
                    return 0
                if what == "ended":
                    log(f"{text}: this worker was done, but restarts with the others")
                    return LOST
        except asyncio.TimeoutError:
            log(f"this worker is done, but another one is not after {self.finish_s:g} s")
            return self._failed(TIME)

    def _failed(self, code: int) -> int:
        self.others.send(**{"is": "failed", "code": code})
        return code

    async def _end(self, why: str, ended: asyncio.Future[int]) -> int:
        """End the training after the loss of another pod. It usually fails by itself, but may hang."""
        log(f"{why}: the training cannot continue")
        own_s = min(self.grace_s, times.here().own_error_s)
        for number, seconds in ((None, own_s), (signal.SIGTERM, self.grace_s), (signal.SIGKILL, times.KILLED_S)):
            if number:
                self._signal(number)
            if (await asyncio.wait([ended], timeout=seconds))[0]:
                break
        self._signal(signal.SIGKILL)
        code = 1 if number or self.other_terminated else ended.result()
        return code if code > 1 else LOST  # an engine that loses a worker ends with 1 or by a signal

    def _take_signal(self, number: signal.Signals, waiting: asyncio.Task[int] | None) -> None:
        if self.child is None and waiting is not None:
            self.received = self.received or number
            waiting.cancel()
            return
        if not self.received:
            self.received = number
            log(f"got {number.name}: forwarding it to the training")
            self.others.send(**{"is": "term"})  # so that all workers save a checkpoint together
        self._signal(number)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child.pid, number)  # type: ignore[union-attr]


def work(worker: Worker) -> int:
    """Run a worker to its end."""
    return asyncio.run(worker.run())


# -- the launcher of an MPI job ---------------------------------------------------------------------------------------


def launch(job: spec.Job, environ: Mapping[str, str], *, port: int, wait_s: float) -> int:
    """Wait for sshd in the pods, and run the job as ``distpad launch`` does."""
    find_missing = functools.partial(_undiscovered if job.elastic else _silent, job, port)
    return run.run(job, environ, lambda received: _until(find_missing, wait_s, received))


def _silent(job: spec.Job, port: int) -> str:
    """The pods that do not answer, as text; empty if all do."""
    silent = _without_sshd(job.hosts, port)
    return f"{gang.few(silent)} (no sshd answers on port {port})" if silent else ""


def _undiscovered(job: spec.Job, port: int) -> str:
    """The pods that an elastic job lacks before it can start, as text; empty if it can start."""
    try:
        hosts = discovery.Discovery(job, os.devnull, lambda host: True).discover()
    except ValueError as error:
        return str(error)
    silent = _without_sshd(hosts, port)
    if pod.enough(job, [host for host in hosts if host.name not in silent]):
        return ""
    more = f", and no sshd answers on port {port} of {gang.few(silent)}" if silent else ""
    return f"pods for {job.min_np} workers; {job.host_discovery_script} names {len(hosts)}{more}"


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


def _without_sshd(hosts: Sequence[spec.Host], port: int) -> list[str]:
    names = [host.name for host in hosts]
    with concurrent.futures.ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return [name for name, good in zip(names, pool.map(lambda name: answers(name, port), names)) if not good]


def answers(name: str, port: int) -> bool:
    """Whether an ssh server answers at this address."""
    try:
        with socket.create_connection((name, port), timeout=times.ANSWER_S) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


# -- a worker's pod of an MPI job -------------------------------------------------------------------------------------


def serve(folder: pathlib.Path, port: int) -> int:
    """Run sshd, through which the launcher starts the workers. It forwards signals to the workers first."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"
    sshd = shutil.which("sshd", path=path)
    if sshd is None:
        log("sshd was not found. Debian: apt-get install openssh-server")
        return 127
    argv = [sshd, "-D", "-e", "-f", str(folder / "sshd_config"), "-p", str(port)]
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
