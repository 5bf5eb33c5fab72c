"""Starts N local worker processes of one command, each with its TF_CONFIG."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE_S = 10.0
POLL_S = 0.02
DESCRIPTION = """Starts N local processes of COMMAND, each with its TF_CONFIG (free ports on 127.0.0.1), for
tf.distribute.MultiWorkerMirroredStrategy. Each line they print gets its worker's number in front. When one fails,
the others get 10 seconds to say what they saw, then are ended; the exit code is that of the first that failed."""
EXAMPLES = """examples:
  launch/multiworker.sh -np 2 -- python examples/handwriting/train.py --backend multiworker
  launch/multiworker.sh -np 3 --timeout-s 60 -- python -c 'import os; print(os.environ["TF_CONFIG"])'

exit codes: that of the worker that failed first (128 + N where signal N ended it), 2 usage, 124 time limit,
126 or 127 where COMMAND cannot be started, 130 and 143 after SIGINT and SIGTERM."""


def say(message: str) -> None:
    print(f"multiworker: {message}", file=sys.stderr, flush=True)


def free_ports(count: int) -> list[int]:
    """Finds free ports; all are held until the last is found, so that none is found twice."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def worker_env(index: int, addresses: list[str]) -> dict[str, str]:
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    return {**os.environ, "TF_CONFIG": json.dumps(config), "PYTHONUNBUFFERED": "1"}


class Crew:
    """The running workers, and what becomes of them."""

    def __init__(self) -> None:
        self.workers: list[subprocess.Popen[str]] = []
        self.printers: list[threading.Thread] = []
        self.lock = threading.Lock()
        self.received = 0  # the signal that this launcher got

    def start(self, command: list[str], count: int) -> None:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
        for index in range(count):
            worker = subprocess.Popen(
                command,
                env=worker_env(index, addresses),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # its own group: its children can be ended with it
            )
            self.workers.append(worker)
            for source, target in ((worker.stdout, sys.stdout), (worker.stderr, sys.stderr)):
                printer = threading.Thread(target=self.copy, args=(source, target, f"[worker {index}] "), daemon=True)
                printer.start()
                self.printers.append(printer)

    def copy(self, source, target, prefix: str) -> None:
        for line in source:
            try:
                with self.lock:
                    target.write(f"{prefix}{line.rstrip()}\n")
                    target.flush()
            except OSError:
                continue  # nobody reads us any more, as under `| head`: read on, or the worker blocks

    def alive(self) -> bool:
        return any(worker.poll() is None for worker in self.workers)

    def failed(self) -> int | None:
        """The index of a worker that failed, if one did."""
        return next((i for i, worker in enumerate(self.workers) if worker.poll()), None)

    def send(self, number: int) -> None:
        for worker in self.workers:
            # The group outlives its first process where that left children behind.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, number)

    def wait(self, seconds: float) -> bool:
        """Waits for all workers' ends; false where some still run after this time."""
        end = time.monotonic() + seconds
        while self.alive() and time.monotonic() < end:
            time.sleep(POLL_S)
        return not self.alive()

    def end(self, number: int = signal.SIGTERM) -> None:
        self.send(number)
        self.wait(GRACE_S)
        self.send(signal.SIGKILL)
        for thread in self.printers:
            thread.join(timeout=2)

    def watch(self, timeout_s: float | None) -> int:
        """Waits for the end of the job, in whichever way it comes, and returns the exit code."""
        end = time.monotonic() + timeout_s if timeout_s else None
        while not self.received:
            failed = self.failed()
            if failed is not None:
                code = self.workers[failed].returncode
                how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
                say(f"worker {failed} failed ({how})")
                if not self.wait(GRACE_S):
                    say(f"ending the others, which still run after {GRACE_S:.0f} s")
                self.end()
                return code if code > 0 else 128 - code
            if not self.alive():
                self.end()
                return 0
            if end and time.monotonic() > end:
                running = [i for i, worker in enumerate(self.workers) if worker.poll() is None]
                say(f"not done after {timeout_s:g} s: ending workers {', '.join(map(str, running))}")
                self.end()
                return 124
            time.sleep(POLL_S)
        say(f"got {signal.Signals(self.received).name}: passing it on")
        self.end(self.received)
        return 128 + self.received


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="launch/multiworker.sh",
        usage="%(prog)s [-np N] [--timeout-s S] -- COMMAND...",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-np", type=int, default=2, metavar="N", help="number of workers (default: 2)")
    parser.add_argument("--timeout-s", type=float, metavar="S", help="end all after this many seconds (default: never)")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    command = arguments[split + 1 :]
    if not command:
        parser.error("no COMMAND. It goes after --, e.g.: -np 2 -- python train.py")
    if options.np < 1:
        parser.error(f"-np is {options.np}, expected 1 or more")
    if options.timeout_s is not None and options.timeout_s <= 0:
        parser.error(f"--timeout-s is {options.timeout_s:g}, expected more than 0")
    return options, command


def main() -> int:
    options, command = parse(sys.argv[1:])
    crew = Crew()

    def receive(number: int, _frame: object) -> None:
        crew.received = number

    signal.signal(signal.SIGINT, receive)
    signal.signal(signal.SIGTERM, receive)
    try:
        crew.start(command, options.np)
    except OSError as error:
        say(f"cannot start {command[0]}: {error.strerror}")
        crew.end()
        return 127 if isinstance(error, FileNotFoundError) else 126
    return crew.watch(options.timeout_s)


if __name__ == "__main__":
    sys.exit(main())
