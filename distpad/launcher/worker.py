"""One worker: runs the job's command as its child, and reports its output and exit code to the host's agent.

    python -m distpad.launcher.worker FOLDER

An engine's launcher starts this program in place of the command. It sends its rank to the agent, which listens at
FOLDER/HOST.sock, and receives the command, variables and secrets. It then sends the bytes of the command's output, and
its exit code. The command and its descendants never outlive this process, which never outlives its agent.
"""

from __future__ import annotations

import contextlib
import functools
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

from distpad.launcher import gpus, processes, times

CHUNK = 1 << 16  # bytes of output in one message
RANK = ("DISTPAD_RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
SIZE = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
LOCAL_RANK = ("DISTPAD_LOCAL_RANK", "HOROVOD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(folder: str) -> int:
    """Run one worker. Returns the command's exit code, or 128 + N if signal N ended it."""
    processes.adopt_orphans()
    worker = Worker(connect(folder))
    for number in FORWARDED:
        signal.signal(number, lambda received, _: worker.signal(received))
    return worker.run()


def connect(folder: str, within_s: float = times.AGENT_WITHIN_S) -> socket.socket:
    """Connect to this host's agent."""
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
                sys.exit(f"distpad worker: no agent listens at {path} ({error.strerror}).")
            time.sleep(0.05)


class Worker:
    """The command's parent."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.reader = connection.makefile("rb")
        self.lock = threading.Lock()
        self.leave = threading.Event()  # set when the agent allows this worker to exit
        self.child: subprocess.Popen[bytes] | None = None
        self.pending: list[int] = []  # signals that arrived before the child started

    def run(self) -> int:
        self.send(
            is_="hello", pid=os.getpid(), parent=os.getppid(), host=socket.gethostname(), **membership(os.environ)
        )
        line = self.reader.readline()
        if not line:
            return 1  # the agent ended before it sent orders
        orders = json.loads(line)
        for number in orders["ignored"]:
            signal.signal(number, signal.SIG_IGN)  # the command inherits it
        listener = threading.Thread(target=self.listen, args=(orders["grace_s"],), daemon=True)
        try:
            self.child = start(orders)
        except OSError as error:
            code = 127 if isinstance(error, FileNotFoundError) else 126
            what = error.filename or orders["command"][0]
            self.send(is_="output", stream="stderr", text=f"distpad: cannot start {what}: {error.strerror}\n")
            listener.start()
            return self.finish(code, orders)
        for number in self.pending:
            self.signal(number)
        sources = (self.child.stdout, "stdout"), (self.child.stderr, "stderr")
        pumps = [threading.Thread(target=self.pump, args=each, daemon=True) for each in sources]
        for thread in (*pumps, listener):
            thread.start()
        code = self.child.returncode = processes.wait(self.child.pid)
        self.child = None  # another process may get its number
        end = time.monotonic() + times.LEFTOVERS_S
        for pump in pumps:
            pump.join(max(0, end - time.monotonic()))
        return self.finish(code, orders)

    def finish(self, code: int, orders: dict[str, Any]) -> int:
        """Report the exit code. After a failure, wait before exiting, so that other workers can report their errors.

        Engines end all workers as soon as one process ends.
        """
        self.send(is_="exit", code=code, left=processes.kill_descendants())
        if code and orders["holds_failures"]:
            self.leave.wait(orders["grace_s"] + times.LEFTOVERS_S)
        return code

    def pump(self, source: BinaryIO, stream: str) -> None:
        """Send the command's output. JSON holds its bytes as text with surrogates for what is not UTF-8."""
        while chunk := os.read(source.fileno(), CHUNK):
            self.send(is_="output", stream=stream, text=chunk.decode("utf-8", "surrogateescape"))

    def listen(self, grace_s: float) -> None:
        """Handle the agent's messages, each of which is a signal, and end the command when the agent is gone."""
        for line in self.reader:
            self.leave.set()
            self.signal(json.loads(line))
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
        """Send a signal to the command's process group."""
        child = self.child
        if child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, number)

    def send(self, is_: str, **fields: Any) -> None:
        # If the agent is gone, `listen` ends the command.
        with self.lock, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps({"is": is_, **fields}).encode() + b"\n")


def membership(environ: Mapping[str, str]) -> dict[str, int | None]:
    """The engine's ``rank``, ``size`` and ``local_rank`` of this process, each None if its variable is not set."""

    def first(names: tuple[str, ...]) -> int | None:
        return next((int(environ[name]) for name in names if environ.get(name, "").isdecimal()), None)

    return {"rank": first(RANK), "size": first(SIZE), "local_rank": first(LOCAL_RANK)}


def start(orders: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    """Start the command in a process group of its own, which dies with this process."""
    env = {**os.environ, **orders["env"]}
    # Slurm may have divided a host's cores among its tasks already
    threads = os.environ.get("SLURM_CPUS_PER_TASK") or str(max(1, len(os.sched_getaffinity(0)) // orders["slots"]))
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        env[name] = env.get(name) or threads  # otherwise each worker uses all cores of its host
    if orders["gpus"]:
        env["CUDA_VISIBLE_DEVICES"] = gpus.of_worker(orders["gpus"], membership(env)["local_rank"] or 0, env)
    return subprocess.Popen(
        orders["command"],
        cwd=orders["cwd"],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=functools.partial(processes.die_with_parent, os.getpid()),  # no thread runs yet
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
