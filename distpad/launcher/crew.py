"""The processes that the launcher starts: one agent per host, and the engine's own launcher.

Their messages and output arrive in one queue of events.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import math
import os
import queue
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distpad.launcher import processes

CHANGED = "If the host was reinstalled: ssh-keygen -R {host}, then: ssh {host}"
NO_PYTHON = ("it has no Python at {python}", "Install one there, or choose another with --python")
NO_DISTPAD = ("distpad is not installed there for {python}", "Install it there: {python} -m pip install distpad")
# output of ssh, srun or the shell | problem, remedy
MEANINGS = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": ("its host key has changed", CHANGED),
    "Host key verification failed": ("its host key is not known here", "Verify and accept it: ssh {host}"),
    "Permission denied": ("it accepts no key of this user", "Try: ssh-copy-id {host}"),
    "Could not resolve hostname": ("its name does not resolve", "Check the spelling, the DNS and /etc/hosts"),
    "Connection refused": ("no ssh server listens there", "Check on the host: systemctl status ssh"),
    "Connection timed out": ("it does not answer", "Check that it is up and that port 22 is open"),
    "No route to host": ("there is no route to it", "Check that it is up"),
    "No module named 'distpad": NO_DISTPAD,
    "No module named distpad": NO_DISTPAD,
    "No such file or directory": NO_PYTHON,
    "not found": NO_PYTHON,
}


class Event(NamedTuple):
    """A message from a host's agent, or from the engine's launcher (empty host)."""

    host: str
    message: dict[str, Any]


class Member:
    """One process: the agent of a host, or horovodrun, mpirun or srun (empty host).

    Threads read its output; the event ``closed`` is its last. It has a session of its own, so that Ctrl-C reaches this
    process alone, which forwards it. Its working directory is /, since horovodrun inserts the directory's name unquoted
    into a shell command. An engine's launcher dies with this process. An agent notices itself that this process has
    ended, and ends the job on its host.
    """

    def __init__(self, host: str, argv: Sequence[str], env: Mapping[str, str], events: queue.Queue[Event]) -> None:
        self.host, self.events = host, events
        self.began = self.last_heard = time.monotonic()
        self.process = subprocess.Popen(
            argv,
            env=dict(env),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=None if host else functools.partial(processes.die_with_parent, os.getpid()),
        )
        self.wrote: collections.deque[str] = collections.deque(maxlen=20)  # lines that are no messages
        self.lock = threading.Lock()
        pipes = (self.process.stdout, bool(host)), (self.process.stderr, False)
        self.readers = [threading.Thread(target=self._read, args=each, daemon=True) for each in pipes]
        for thread in (*self.readers, threading.Thread(target=self._wait, daemon=True)):
            thread.start()

    def _read(self, pipe: Any, sends_messages: bool) -> None:
        for line in pipe:
            self.last_heard = math.inf  # while the queue is full and its reader waits, the agent does not count as lost
            message = None
            if sends_messages:
                with contextlib.suppress(ValueError):  # such as a shell's greeting
                    message = json.loads(line)
            if isinstance(message, dict):
                self.emit(**{"is": "", **message})
            else:
                self.wrote.append(line.decode("utf-8", "replace").rstrip("\r\n"))
                if not self.host:
                    text = line.decode("utf-8", "surrogateescape")
                    self.emit(**{"is": "output"}, rank=None, stream="stderr", text=text)
            self.last_heard = time.monotonic()

    def emit(self, **message: Any) -> None:
        self.events.put(Event(self.host, message))

    def _wait(self) -> None:
        code = self.process.wait()
        for reader in self.readers:
            reader.join(1)  # a child of the process may hold the pipe
        self.emit(**{"is": "closed"}, code=code)

    def send(self, **message: Any) -> None:
        """Send a message to an agent. If it no longer reads, the event ``closed`` follows."""
        with self.lock, contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """Let an agent end."""
        with self.lock, contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()

    def kill(self, number: int) -> None:
        """Send a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def unreachable(agent: Member, python: str, code: int | None, within_s: float) -> dict[str, str]:
    """Why an agent did not answer, with a remedy, derived from the output of the command that starts it.

    Args:
      agent: the agent.
      python: the Python that runs it.
      code: the command's exit code; None if it has not ended.
      within_s: the time limit.
    """
    host, wrote = agent.host, list(agent.wrote)
    for mark, meaning in MEANINGS.items():
        if mark in "\n".join(wrote):
            why, remedy = (part.format(host=host, python=python) for part in meaning)
            return {"unreachable": why, "remedy": remedy}
    why, remedy = f"it did not answer within {within_s:g} s", f"Check that this command ends: ssh {host} hostname"
    if code is not None:
        why = f"the command that starts a program there ended with exit code {code}"
        remedy = f"Try: ssh {host} {python} -m distpad"
    return {"unreachable": f"{why}: {wrote[-1].strip() if wrote else 'no output'}", "remedy": remedy}
