"""The processes that the launcher starts: an agent for each host, and the engine's own launcher. What they say comes
through one queue."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import json
import math
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from distpad.launcher import worker


class Event(NamedTuple):
    """Something that was said: by a host's agent, or by the engine's launcher (no host)."""

    host: str
    message: dict[str, Any]


def spawn(argv: Sequence[str], env: Mapping[str, str], *, dies_with_us: bool) -> subprocess.Popen[bytes]:
    """A program out of the terminal's reach: Ctrl-C is ours to pass on. Its folder is the root, since horovodrun puts
    the name of the current one unquoted into a shell's line."""
    libc = ctypes.CDLL(None)
    tie = functools.partial(libc.prctl, worker.PR_SET_PDEATHSIG, signal.SIGKILL) if dies_with_us else None
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
    """One of those processes. Threads read it; ``closed`` is the last that is said of it."""

    dies_with_us = False  # an agent sees for itself that we are gone, and ends the job on its host

    def __init__(self, host: str, argv: Sequence[str], env: Mapping[str, str], events: queue.Queue[Event]) -> None:
        self.host = host
        self.events = events
        self.process = spawn(argv, env, dies_with_us=self.dies_with_us)
        self.wrote: collections.deque[str] = collections.deque(maxlen=20)  # to standard error, or what was no message
        self.lock = threading.Lock()
        self.readers = [
            threading.Thread(target=self._read, args=(pipe, understand), daemon=True)
            for pipe, understand in ((self.process.stdout, self.understand), (self.process.stderr, self.remark))
        ]
        for reader in self.readers:
            reader.start()
        threading.Thread(target=self._wait, daemon=True).start()

    def understand(self, line: str) -> None:
        """A line of its standard output."""
        self.remark(line)

    def remark(self, line: str) -> None:
        """A line that is for people."""
        self.wrote.append(line)

    def say(self, **message: Any) -> None:
        self.events.put(Event(self.host, message))

    def _read(self, pipe: Any, understand: Callable[[str], None]) -> None:
        for line in pipe:
            understand(line.decode("utf-8", "replace").rstrip("\r\n"))

    def _wait(self) -> None:
        code = self.process.wait()
        for reader in self.readers:
            reader.join(1)  # a child of it may hold the pipe
        self.say(**{"is": "closed"}, code=code)

    def kill(self, number: int) -> None:
        """A signal to it and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Agent(Member):
    """The launcher's end of an agent."""

    heard = 0.0  # when, by the monotonic clock

    def understand(self, line: str) -> None:
        self.heard = math.inf  # as long as it waits for us, nobody may take it for lost
        try:
            message = json.loads(line)
            self.events.put(Event(self.host, {"is": message["is"], **message}))
        except (ValueError, TypeError, KeyError):
            self.remark(line)  # a shell's greeting, say
        self.heard = time.monotonic()

    def tell(self, **message: Any) -> None:
        """Say something to the agent; ``closed`` comes where it does not listen any more."""
        with self.lock, contextlib.suppress(OSError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()


class Engine(Member):
    """horovodrun, mpirun or srun."""

    dies_with_us = True

    def remark(self, line: str) -> None:
        super().remark(line)
        self.say(**{"is": "line"}, rank=None, stream="stderr", text=line)
