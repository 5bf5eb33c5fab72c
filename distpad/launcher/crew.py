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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from distpad.launcher import processes


class Event(NamedTuple):
    """A message from a host's agent, or from the engine's launcher (empty host)."""

    host: str
    message: dict[str, Any]


def spawn(argv: Sequence[str], env: Mapping[str, str], *, dies_with_us: bool) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, so that Ctrl-C reaches the launcher alone, which forwards it.

    The working directory is /, since horovodrun inserts its name unquoted into a shell command.
    """
    tie = functools.partial(processes.die_with_parent, os.getpid()) if dies_with_us else None
    return subprocess.Popen(
        argv,
        env=dict(env),
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=tie,
    )


class Member:
    """One process. Threads read its output; the event ``closed`` is its last."""

    dies_with_us = False  # an agent notices itself that the launcher is gone, and ends the job on its host

    def __init__(self, host: str, argv: Sequence[str], env: Mapping[str, str], events: queue.Queue[Event]) -> None:
        self.host = host
        self.events = events
        self.process = spawn(argv, env, dies_with_us=self.dies_with_us)
        self.wrote: collections.deque[str] = collections.deque(
            maxlen=20
        )  # lines on standard error, and lines that are no messages
        self.lock = threading.Lock()
        self.readers = [
            threading.Thread(target=self._read, args=(pipe, handle_output), daemon=True)
            for pipe, handle_output in (
                (self.process.stdout, self.handle_output),
                (self.process.stderr, self.handle_text),
            )
        ]
        for reader in self.readers:
            reader.start()
        threading.Thread(target=self._wait, daemon=True).start()

    def handle_output(self, line: str) -> None:
        """Handle a line of standard output."""
        self.handle_text(line)

    def handle_text(self, line: str) -> None:
        """Handle a line that is no message."""
        self.wrote.append(line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").rstrip("\r\n"))

    def emit(self, **message: Any) -> None:
        self.events.put(Event(self.host, message))

    def _read(self, pipe: Any, handle_output: Callable[[str], None]) -> None:
        for line in pipe:
            handle_output(line.decode("utf-8", "surrogateescape"))

    def _wait(self) -> None:
        code = self.process.wait()
        for reader in self.readers:
            reader.join(1)  # a child of the process may hold the pipe
        self.emit(**{"is": "closed"}, code=code)

    def kill(self, number: int) -> None:
        """Send a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Agent(Member):
    """The launcher's end of an agent."""

    last_heard = 0.0  # when, by the monotonic clock

    def handle_output(self, line: str) -> None:
        self.last_heard = math.inf  # while the queue is full and its reader waits, the agent does not count as lost
        try:
            message = json.loads(line)
            self.events.put(Event(self.host, {"is": message["is"], **message}))
        except (ValueError, TypeError, KeyError):
            self.handle_text(line)  # such as a shell's greeting
        self.last_heard = time.monotonic()

    def send(self, **message: Any) -> None:
        """Send a message to the agent. If it no longer reads, the event ``closed`` follows."""
        with self.lock, contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()


class Engine(Member):
    """horovodrun, mpirun or srun."""

    dies_with_us = True

    def handle_text(self, line: str) -> None:
        super().handle_text(line)
        self.emit(**{"is": "output"}, rank=None, stream="stderr", text=line)
