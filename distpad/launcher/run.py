"""Run a job to its end, with restarts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping

from distpad.launcher import attempt, outcomes, output, render, spec, times


def run(job: spec.Job, environ: Mapping[str, str]) -> int:
    """Run a job to its end, with restarts, and return the exit code of the worker that failed first.

    Args:
      job: the job.
      environ: the launcher's variables.

    Raises:
      ValueError: a secret's file cannot be read, a variable of ``--env`` is not set, or the log folder is not writable.
    """
    secrets = read_secrets(job.secret)
    mpi = mpi_version(job, environ)
    if job.launcher == "mpirun" and not mpi:
        raise ValueError(
            "launch: mpirun was not found, expected Open MPI on PATH. Debian: apt-get install openmpi-bin. Or: --gloo."
        )
    limit = time.monotonic() + (job.timeout_s or math.inf)
    output.allow_open_files(job)
    with received_signals() as received:
        for number in range(job.max_restarts + 1):
            # The agent of a lost host may still be ending the previous attempt, which therefore has another id.
            this = dataclasses.replace(job, id=f"{job.id}-{number}")
            ended = attempt.Attempt(this, number, environ, secrets, mpi, received, limit).run()
            left = job.max_restarts - number
            if not ended.code or not left or not ended.may_retry or ended.code in job.no_retry:
                break
            pause = min(job.backoff_s * 2 ** min(number, 30), times.LONGEST_BACKOFF_S)
            outcomes.log(f"starting again in {pause:g} s ({left} of {job.max_restarts} restarts left)")
            end = time.monotonic() + pause
            while time.monotonic() < end and not received:
                time.sleep(times.POLL_S)
            if received:
                return 128 + received[0]
    return ended.code


def read_secrets(given: Iterable[str]) -> dict[str, str]:
    """The values of secrets NAME=FILE, without the newlines at the end of their files."""
    found = {}
    for name, _, path in (each.partition("=") for each in given):
        try:
            found[name] = pathlib.Path(path).read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"launch: --secret {name}: {path} cannot be read: {error}.") from error
        if "\0" in found[name]:
            raise ValueError(f"launch: --secret {name}: {path} holds a NUL byte, which a variable cannot hold.")
    return found


def mpi_version(job: spec.Job, environ: Mapping[str, str]) -> str:
    """The first line of ``mpirun --version``, since versions 4 and 5 take different options; empty if there is none."""
    if job.launcher != "mpirun":
        return ""
    try:
        env = render.engine_env(job, environ)
        found = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=20, env=env)
        version = found.stdout.partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if "Open MPI" not in version:
        raise ValueError(f"launch: mpirun --version is {version!r}, expected Open MPI.")
    return version


@contextlib.contextmanager
def received_signals() -> Iterator[list[int]]:
    """A list that collects SIGINT, SIGTERM and SIGHUP while the context is open.

    A signal that is ignored stays ignored: SIGHUP under nohup, SIGINT in the background of a shell script.
    """
    received: list[int] = []
    all_ = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    numbers = [number for number in all_ if signal.getsignal(number) is not signal.SIG_IGN]
    before = [signal.signal(number, lambda got, _: received.append(got)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
