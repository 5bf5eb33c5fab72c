"""Run a pod's part of a job. The only module of ``distpad pod`` that starts processes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence

import psutil

from distpad.launcher import gang, outcomes, pod, processes, run, times
from distpad.launcher.outcomes import HOST, LOST, TIME

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TERMINATED = 128 + signal.SIGTERM


log = functools.partial(outcomes.log, program="pod")


# -- a worker of MultiWorkerMirroredStrategy --------------------------------------------------------------------------


async def work(
    member: pod.Member,
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    gang_port: int | None = None,
    wait_s: float = 600.0,
    grace_s: float = 10.0,
    finish_s: float = 600.0,
) -> int:
    """Run one worker's training, and return its exit code.

    Args:
      member: this pod among the others.
      command: the training command.
      environ: its variables.
      gang_port: the port at which pod 0 listens for the others, if Kubernetes does not restart the pods together.
      wait_s: seconds to wait for the other pods of the gang.
      grace_s: seconds for the training to end by itself after another pod of the gang is lost, and again after SIGTERM.
      finish_s: seconds to wait for the other pods of the gang after this one is done.
    """
    received: list[int] = []
    signalled = asyncio.Event()
    training: asyncio.subprocess.Process | None = None

    def take(number: int) -> None:
        received.append(number)
        signalled.set()
        if training is not None:
            _forward(training, number)

    for number in FORWARDED:
        asyncio.get_running_loop().add_signal_handler(number, take, number)
    me = f"worker {member.index} of {len(member.names)}"
    peers = None if gang_port is None else gang.Gang(member.names, member.index, gang_port)
    if peers is not None:
        log(f"{me} waits for the others")
        joining = asyncio.ensure_future(peers.join(log))
        await _first(joining, asyncio.ensure_future(signalled.wait()), within_s=wait_s)
        if received:
            return 128 + received[0]
        if not joining.done():
            log(f"missing after {wait_s:g} s: {peers.whom}")
            return HOST
        if error := joining.exception():
            log(f"port {peers.port} cannot be used: {error}")
            return HOST
    log(f"starting {command[0]} as {me}")
    try:
        training = await asyncio.create_subprocess_exec(
            *command, env=member.env(environ), stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        log(f"cannot start {command[0]}: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126
    for early in received:
        _forward(training, early)
    lost = asyncio.ensure_future((asyncio.Event() if peers is None else peers.lost).wait())
    code = await _end(training, lost, grace_s)
    if code == 0 and received:  # the training stopped early
        return 128 + received[0]
    if code == TERMINATED and not received:
        # Another pod got SIGTERM, and all workers have saved and ended together. The end of that pod restarts this one.
        await _first(lost, asyncio.ensure_future(signalled.wait()), within_s=times.here().restart_s)
        code = 128 + received[0] if received else 1
    if peers is None:
        return code
    if code == 0:
        peers.finish()
        await _first(lost, asyncio.ensure_future(peers.all_done.wait()), within_s=finish_s)
        if peers.all_done.is_set():
            return 0
    if peers.lost.is_set():
        log(f"{peers.whom} failed or was lost: this worker ends with it")
        return LOST
    if code == 0:
        log(f"this worker is done, but another one is not after {finish_s:g} s")
        return TIME
    return 1 if code == LOST else code  # a Job does not count LOST, which must be another pod's failure


async def _first(*awaited: asyncio.Future, within_s: float | None = None) -> None:
    """Wait until one is done, or for so many seconds."""
    await asyncio.wait(awaited, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)


async def _end(training: asyncio.subprocess.Process, lost: asyncio.Future, grace_s: float) -> int:
    """Wait for the end of the training. After the loss of another pod, it usually fails by itself, but may hang."""
    ended = asyncio.ensure_future(training.wait())
    await _first(ended, lost)
    own_s = min(grace_s, times.here().own_error_s)
    for number, seconds in ((0, own_s), (signal.SIGTERM, grace_s), (signal.SIGKILL, times.KILLED_S)):
        if not ended.done():
            _signal(training, number)  # 0 is no signal
            await _first(ended, within_s=seconds)
    code = await ended
    _signal(training, signal.SIGKILL)  # leftover processes of its group
    return 128 - code if code < 0 else code


def _forward(training: asyncio.subprocess.Process, number: int) -> None:
    log(f"got {signal.Signals(number).name}: forwarding it to the training")
    _signal(training, number)


def _signal(training: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(training.pid, number)


# -- a worker's pod of an MPI job -------------------------------------------------------------------------------------


def serve() -> int:
    """Run sshd, through which the launcher starts the workers. It forwards a signal to the workers first.

    The image's /etc/ssh configures it: see k8s/image/sshd_config.
    """
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"
    sshd = shutil.which("sshd", path=path)
    if sshd is None:
        log("sshd was not found. Debian: apt-get install openssh-server")
        return 127
    codes: list[int] = []
    with run.received_signals() as received:
        server = os.spawnv(os.P_NOWAIT, sshd, [sshd, "-D", "-e"])
        # the first process of a container inherits orphaned processes, which `wait` reaps
        threading.Thread(target=lambda: codes.append(processes.wait(server)), daemon=True).start()
        while not received and not codes:
            time.sleep(times.here().look_s)
        if codes:
            log(f"sshd has ended (exit code {codes[0]})")
            return codes[0] or 1
        workers = processes.workers_here()
        log(f"got {signal.Signals(received[0]).name}: forwarding it to {len(workers)} workers")
        for worker in workers:
            with contextlib.suppress(psutil.Error):
                worker.send_signal(received[0])
        while processes.workers_here():
            time.sleep(times.here().look_s)
        os.kill(server, signal.SIGTERM)
        return 128 + received[0]
