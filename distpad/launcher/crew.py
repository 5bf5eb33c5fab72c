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


class Member:
    """One process. Threads read its output; the event ``closed`` is its last.

    It has a session of its own, so that Ctrl-C reaches the launcher alone, which forwards it. Its working directory is
    /, since horovodrun inserts the directory's name unquoted into a shell command.
    """

    dies_with_us = False  # an agent notices itself that the launcher is gone, and ends the job on its host

    def __init__(
        self, host: str, argv: Sequence[str], env: Mapping[str, str], events: queue.Queue[Event], slots: int = 0
    ) -> None:
        self.host, self.events, self.slots = host, events, slots
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            argv,
            env=dict(env),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=functools.partial(processes.die_with_parent, os.getpid()) if self.dies_with_us else None,
        )
        self.wrote: collections.deque[str] = collections.deque(maxlen=20)  # lines that are no messages
        self.lock = threading.Lock()
        handlers = ((self.process.stdout, self.handle_output), (self.process.stderr, self.handle_text))
        self.readers = [threading.Thread(target=self._read, args=each, daemon=True) for each in handlers]
        for thread in (*self.readers, threading.Thread(target=self._wait, daemon=True)):
            thread.start()

    def handle_output(self, line: bytes) -> None:
        """Handle a line of standard output."""
        self.handle_text(line)

    def handle_text(self, line: bytes) -> None:
        """Handle a line that is no message."""
        self.wrote.append(line.decode("utf-8", "replace").rstrip("\r\n"))

    def emit(self, **message: Any) -> None:
        self.events.put(Event(self.host, message))

    def _read(self, pipe: Any, handle: Callable[[bytes], None]) -> None:
        for line in pipe:
            handle(line)

    def _wait(self) -> None:
        code = self.process.wait()
        for reader in self.readers:
            reader.join(1)  # a child of the process may hold the pipe
        self.emit(**{"is": "closed"}, code=code)

    def has_ended(self, after_s: float) -> bool:
        """Whether the process has ended, and was started at least so many seconds ago."""
        return self.process.poll() is not None and time.monotonic() > self.began + after_s

    def kill(self, number: int) -> None:
        """Send a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Agent(Member):
    """The launcher's end of an agent."""

    last_heard = 0.0  # when, by the monotonic clock

    def handle_output(self, line: bytes) -> None:
        self.last_heard = math.inf  # while the queue is full and its reader waits, the agent does not count as lost
        try:
            self.emit(**{"is": "", **json.loads(line)})
        except (ValueError, TypeError):
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

    def handle_text(self, line: bytes) -> None:
        super().handle_text(line)
        self.emit(**{"is": "output"}, rank=None, stream="stderr", text=line.decode("utf-8", "surrogateescape"))
