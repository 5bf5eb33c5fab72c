"""Running a job to its end, with its restarts."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping

from distpad.launcher import attempt, outcomes, render, spec, times


def run(job: spec.Job, environ: Mapping[str, str], are_ready: Callable[[list[int]], bool] | None = None) -> int:
    """Run a job to its end, with its restarts; the exit code is that of the worker that failed first.

    Args:
      job: the job.
      environ: the launcher's variables.
      are_ready: waits for the hosts before each start, as long as the list of received signals is empty.

    Raises:
      ValueError: a secret's file that cannot be read, a variable that is not set, a hostile folder.
    """
    secrets = read_secrets(job.secrets)
    mpi = mpi_version(job, environ) if job.launcher == "mpirun" else ""
    began = time.monotonic()
    with received_signals() as received:
        for number in range(job.max_restarts + 1):
            if are_ready is not None and not are_ready(received):
                return 128 + received[0] if received else outcomes.HOST
            limit = None if job.timeout_s is None else began + job.timeout_s
            # Agents of a host that was lost may still be ending the attempt before: theirs is another job.
            this = dataclasses.replace(job, id=f"{job.id}-{number}")
            outcome = attempt.Attempt(this, number, environ, secrets, mpi, received, limit).run()
            left = job.max_restarts - number
            if not outcome.code or not left or not outcome.may_retry or outcome.code in job.no_retry:
                break
            pause = min(job.backoff_s * 2**number, times.LONGEST_BACKOFF_S)
            outcomes.say(f"starting again in {pause:g} s ({left} of {job.max_restarts} restarts left)")
            end = time.monotonic() + pause
            while time.monotonic() < end and not received:
                time.sleep(times.POLL_S)
            if received:
                return 128 + received[0]
    return outcome.code


def read_secrets(files: Mapping[str, str]) -> dict[str, str]:
    """The secrets' values; a file's last line end is not part of one."""
    found = {}
    for name, path in files.items():
        try:
            found[name] = pathlib.Path(path).read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"launch: --secret {name}: {path} cannot be read: {error}.") from error
        if "\0" in found[name]:
            raise ValueError(f"launch: --secret {name}: {path} holds a NUL byte, which no variable can.")
    return found


def mpi_version(job: spec.Job, environ: Mapping[str, str]) -> str:
    """The first line of ``mpirun --version``: versions 4 and 5 take other options."""
    try:
        env = render.engine_env(job, environ)
        found = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=20, env=env)
        version = found.stdout.partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(
            "launch: mpirun was not found, expected Open MPI on PATH. Debian: apt-get install openmpi-bin. Or: --gloo."
        ) from error
    if "Open MPI" not in version:
        raise ValueError(f"launch: mpirun says it is {version!r}, expected Open MPI, whose options it is given.")
    return version


@contextlib.contextmanager
def received_signals() -> Iterator[list[int]]:
    """A list to which SIGINT and SIGTERM are added while this is open."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda got, _: received.append(got)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
