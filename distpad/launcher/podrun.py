"""Running what a pod is there for: the only place where ``distpad pod`` starts processes."""

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


def tell(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"distpad pod: {text}", file=sys.stderr, flush=True)


# -- a worker of MultiWorkerMirroredStrategy --------------------------------------------------------------------------


class Worker:
    """One worker's training, in a gang.

    Args:
      member: which one of the gang this pod is.
      command: the training.
      environ: its variables.
      port: where pod 0 keeps the register.
      wait_s: within which all have to be there.
      grace_s: for the training to end by itself when another pod is lost, and once more after SIGTERM.
      finish_s: within which all have to be done after this one is.
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
        self.told = False  # that another pod has to go
        self.others: gang.Membership

    async def run(self) -> int:
        """The training's exit code, or why there was none."""
        self.others = gang.Membership(self.member.names, self.member.index, self.port)
        loop = asyncio.get_running_loop()
        me = asyncio.current_task()
        for number in FORWARDED:
            loop.add_signal_handler(number, self._take_signal, number, me)
        register = gang.Register(self.member.names)
        try:
            if self.member.index == 0:
                await register.open(self.port)
            await asyncio.wait_for(self.others.join(tell), self.wait_s)
            return await self._train()
        except asyncio.CancelledError:  # a signal, while it waited
            return 128 + self.received
        except asyncio.TimeoutError:
            tell(f"not there within {self.wait_s:g} s: {self.others.waits_for}")
            return HOST
        except OSError as error:
            tell(f"port {self.port} cannot be used: {error.strerror}")
            return HOST
        finally:
            await self.others.close()
            if self.member.index == 0:
                await register.close()

    async def _train(self) -> int:
        names = self.member.names
        tell(f"all {len(names)} are there: starting {self.command[0]} as worker {self.member.index}")
        try:
            self.child = await asyncio.create_subprocess_exec(
                *self.command,
                env=self.member.env(self.environ),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            tell(f"cannot start {self.command[0]}: {error.strerror}")
            return self._failed(127 if isinstance(error, FileNotFoundError) else 126)
        ended = asyncio.ensure_future(self.child.wait())
        while True:
            heard = asyncio.ensure_future(self.others.heard.get())
            await asyncio.wait([ended, heard], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                if heard.done():
                    self.others.heard.put_nowait(heard.result())
                heard.cancel()
                code = ended.result()
                self._signal(signal.SIGKILL)  # what it left in its group
                if self.told:
                    self._failed(LOST)
                    return LOST
                return await self._done() if code == 0 else self._failed(code if code > 0 else 128 - code)
            what, text = heard.result()
            if what == "ended":
                return await self._end(text, ended)
            if what == "term" and not self.received and not self.told:
                tell(f"{text} has to go: telling the training here, too")
                self.told = True
                self._signal(signal.SIGTERM)

    async def _done(self) -> int:
        """Nobody succeeds before all have: a gang that has to start again needs everyone."""
        if self.received:  # it has stopped, which is not the same as being done
            return self._failed(128 + self.received)
        self.others.tell(**{"is": "done"})
        try:
            while True:
                what, text = await asyncio.wait_for(self.others.heard.get(), self.finish_s)
                if what == "all done":
                    return 0
                if what == "ended":
                    tell(f"{text}: this worker was done, and has to start again with the others")
                    return LOST
        except asyncio.TimeoutError:
            tell(f"this worker is done, but not all others within {self.finish_s:g} s")
            return self._failed(TIME)

    def _failed(self, code: int) -> int:
        self.others.tell(**{"is": "failed", "code": code})
        return code

    async def _end(self, why: str, ended: asyncio.Future[int]) -> int:
        """Another pod is lost. The training mostly fails of itself; where it hangs, it is ended."""
        tell(f"{why}: the training cannot go on")
        own_s = min(self.grace_s, times.here().own_error_s)
        for number, seconds in ((None, own_s), (signal.SIGTERM, self.grace_s), (signal.SIGKILL, times.KILLED_S)):
            if number:
                self._signal(number)
            if (await asyncio.wait([ended], timeout=seconds))[0]:
                break
        self._signal(signal.SIGKILL)
        code = 1 if number or self.told else ended.result()
        return code if code > 1 else LOST  # 1, or a signal, is how an engine ends that has lost a worker

    def _take_signal(self, number: signal.Signals, waiting: asyncio.Task[int] | None) -> None:
        if self.child is None and waiting is not None:
            self.received = self.received or number
            waiting.cancel()
            return
        if not self.received:
            self.received = number
            tell(f"got {number.name}: passing it on")
            self.others.tell(**{"is": "term"})  # who trains with this one saves what there is, too
        self._signal(number)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child.pid, number)  # type: ignore[union-attr]


def work(worker: Worker) -> int:
    """Run one, to the end of the pod."""
    return asyncio.run(worker.run())


# -- the launcher of an MPI job ---------------------------------------------------------------------------------------


def launch(job: spec.Job, environ: Mapping[str, str], *, port: int, wait_s: float) -> int:
    """Wait for the pods' sshd, and run the job as ``distpad launch`` does."""
    look = functools.partial(_undiscovered if job.elastic else _silent, job, port)
    return run.run(job, environ, lambda received: _until(look, wait_s, received))


def _silent(job: spec.Job, port: int) -> str:
    """Which pods do not answer, in words."""
    silent = _without_sshd(job.hosts, port)
    return f"{gang.few(silent)} (no sshd answers on port {port})" if silent else ""


def _undiscovered(job: spec.Job, port: int) -> str:
    """What is missing for an elastic job to start, in words."""
    try:
        hosts = discovery.Discovery(job, os.devnull, lambda host: True).ask()
    except ValueError as error:
        return str(error)
    silent = _without_sshd(hosts, port)
    if pod.enough(job, [host for host in hosts if host.name not in silent]):
        return ""
    more = f", and no sshd answers on port {port} of {gang.few(silent)}" if silent else ""
    return f"pods for {job.min_np} workers; {job.host_discovery_script} names {len(hosts)}{more}"


def _until(look: Callable[[], str], wait_s: float, received: list[int]) -> bool:
    """Look until nothing is missing; whether that came in time, and before any signal."""
    began = said = time.monotonic()
    while missing := look():
        now = time.monotonic()
        if received:
            return False
        if now > began + wait_s:
            tell(f"not there within {wait_s:g} s: {missing}")
            return False
        if now > said + times.here().report_s:
            said = now
            tell(f"waiting for {missing}")
        time.sleep(times.here().look_s)
    return not received


def _without_sshd(hosts: Sequence[spec.Host], port: int) -> list[str]:
    names = [host.name for host in hosts]
    with concurrent.futures.ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return [name for name, good in zip(names, pool.map(lambda name: answers(name, port), names)) if not good]


def answers(name: str, port: int) -> bool:
    """Whether an ssh server greets there."""
    try:
        with socket.create_connection((name, port), timeout=times.ANSWER_S) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


# -- a worker's pod of an MPI job -------------------------------------------------------------------------------------


def serve(place: pathlib.Path, port: int) -> int:
    """Run sshd, by which the launcher starts all else here. Where the pod has to go, the workers are told first."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"
    sshd = shutil.which("sshd", path=path)
    if sshd is None:
        tell("sshd was not found. Debian: apt-get install openssh-server")
        return 127
    argv = [sshd, "-D", "-e", "-f", str(place / "sshd_config"), "-p", str(port)]
    with run.received_signals() as received:
        server = os.spawnv(os.P_NOWAIT, sshd, argv)
        told = 0
        while True:
            ended, status = _reap()
            if ended == server:
                code = os.waitstatus_to_exitcode(status)
                tell(f"sshd has ended (exit code {code})")
                return 1 if code < 1 else code
            if len(received) > told:
                told = len(received)
                tell(f"got {signal.Signals(received[-1]).name}: passing it on to {len(workers_here())} workers")
                for process in workers_here():
                    with contextlib.suppress(psutil.Error):
                        process.send_signal(received[-1])
            if told and not workers_here():
                os.kill(server, signal.SIGTERM)
                return 128 + received[0]
            if not ended:
                time.sleep(times.here().look_s)


def _reap() -> tuple[int, int]:
    """The next child that has ended: the first process of a container inherits those whose parents are gone."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(-1, os.WNOHANG)
    return 0, 0


def workers_here() -> list[psutil.Process]:
    """The parents of the training's processes in this pod, which pass signals on."""
    here, found = agent.network("self"), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "distpad.launcher.worker" in process.cmdline() and agent.network(process.pid) == here:
                found.append(process)
    return found
