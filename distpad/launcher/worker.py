"""One worker: starts the job's command as its child, as its host's agent orders, and tells it what becomes of that.

    python -m distpad.launcher.worker FOLDER

An engine's launcher starts this in the command's place. It says which rank the engine gave it, and gets command,
variables and secrets from the agent, which listens at FOLDER/HOST.sock; then it sends each line that the command
writes, and how it ended. The command lives no longer than it, and it no longer than its agent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, BinaryIO

from distpad.launcher import times

LONGEST_LINE = 1 << 16  # longer ones are sent in pieces
PR_SET_PDEATHSIG = 1
RANK = ("DISTPAD_RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
SIZE = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
LOCAL_RANK = ("HOROVOD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(folder: str) -> int:
    """Run one worker; its exit code is the command's, or 128 and the number of the signal that ended it."""
    worker = Worker(connect(folder))
    for number in FORWARDED:
        signal.signal(number, lambda received, _: worker.signal(received))
    return worker.run()


def connect(folder: str, within_s: float = times.AGENT_WITHIN_S) -> socket.socket:
    """The connection to this host's agent."""
    path = os.path.join(folder, f"{socket.gethostname()}.sock")
    end = time.monotonic() + within_s
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except OSError as error:
            connection.close()
            if time.monotonic() > end:
                sys.exit(f"distpad worker: no agent listens at {path} ({error.strerror}): nobody to take orders from.")
            time.sleep(0.05)


class Worker:
    """The command's parent."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.reader = connection.makefile("rb")
        self.lock = threading.Lock()
        self.leave = threading.Event()  # the agent says that nobody needs us any more
        self.child: subprocess.Popen[bytes] | None = None
        self.pending: list[int] = []  # signals that came before the child
        self.ending = False

    def run(self) -> int:
        self.send(
            is_="hello", pid=os.getpid(), parent=os.getppid(), host=socket.gethostname(), **membership(os.environ)
        )
        line = self.reader.readline()
        if not line:
            return 1  # the agent ended before it had orders for us
        orders = json.loads(line)
        try:
            self.child = start(orders)
        except OSError as error:
            code = 127 if isinstance(error, FileNotFoundError) else 126
            what = error.filename or orders["command"][0]
            self.send(is_="line", stream="stderr", text=f"distpad: cannot start {what}: {error.strerror}")
            return self.finish(code, orders)
        self.send(is_="started", pid=self.child.pid)
        for number in self.pending:
            self.signal(number)
        pumps = [
            threading.Thread(target=self.pump, args=(source, name), daemon=True)
            for source, name in ((self.child.stdout, "stdout"), (self.child.stderr, "stderr"))
        ]
        for thread in (*pumps, threading.Thread(target=self.listen, args=(orders["grace_s"],), daemon=True)):
            thread.start()
        code = self.child.wait()
        end = time.monotonic() + times.LEFTOVERS_S
        for pump in pumps:
            pump.join(max(0, end - time.monotonic()))
        self.kill(signal.SIGKILL)  # what the command left in its group
        return self.finish(code if code >= 0 else 128 - code, orders)

    def finish(self, code: int, orders: dict[str, Any]) -> int:
        """Tell how it ended. A failure is held back until the others had time to say what they saw of it: engines end
        them as soon as they see one process end."""
        self.send(is_="exit", code=code)
        if code and orders["holds_failures"]:
            self.leave.wait(orders["grace_s"] + times.LEFTOVERS_S)
        return code

    def pump(self, source: BinaryIO, stream: str) -> None:
        """Send what the command writes, line by line; a carriage return, as progress bars write it, ends one too."""
        rest = b""
        while chunk := os.read(source.fileno(), LONGEST_LINE):
            *lines, rest = (rest + chunk).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
            if len(rest) > LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self.send(is_="line", stream=stream, text=line.decode("utf-8", "replace"))
        if rest:
            self.send(is_="line", stream=stream, text=rest.decode("utf-8", "replace"))

    def listen(self, grace_s: float) -> None:
        """Do what the agent says, and end the command when the agent is gone."""
        for line in self.reader:
            message = json.loads(line)
            if message["do"] == "signal":
                self.signal(message["number"])
            elif message["do"] == "leave":
                self.leave.set()
        self.leave.set()
        self.signal(signal.SIGTERM)
        time.sleep(grace_s)
        self.kill(signal.SIGKILL)

    def signal(self, number: int) -> None:
        if self.child is None:
            self.pending.append(number)
        else:
            self.kill(number)

    def kill(self, number: int) -> None:
        """A signal to the command and all its group."""
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child.pid, number)

    def send(self, is_: str, **fields: Any) -> None:
        # Without an agent nobody reads; `listen` then ends the command.
        with self.lock, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps({"is": is_, **fields}).encode() + b"\n")


def membership(environ: Mapping[str, str]) -> dict[str, int | None]:
    """What the engine says of this process: ``rank``, ``size`` and ``local_rank``, each None where it does not."""

    def first(names: tuple[str, ...]) -> int | None:
        return next((int(environ[name]) for name in names if environ.get(name, "").isdecimal()), None)

    return {"rank": first(RANK), "size": first(SIZE), "local_rank": first(LOCAL_RANK)}


def start(orders: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own, which dies with this process."""
    env = {**os.environ, **orders["env"]}
    # Slurm may have shared a host's cores out already: what this worker may use is its own part then
    threads = os.environ.get("SLURM_CPUS_PER_TASK") or str(max(1, len(os.sched_getaffinity(0)) // orders["slots"]))
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        env[name] = env.get(name) or threads  # else each of a host's workers takes all its cores
    command, libc, parent = orders["command"], ctypes.CDLL(None), os.getpid()

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return subprocess.Popen(
        command,
        cwd=orders["cwd"],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=die_with_parent,  # no thread runs yet
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
