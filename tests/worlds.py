"""Run the tests of tests/replicas in a world: an engine with a number of replicas, in real processes.

    python tests/worlds.py mirrored:4
    python tests/worlds.py horovod:2 -k loss

Worlds: local, onedevice, mirrored:N (N devices of one process), multiworker:N, horovod:N (over Gloo), mpirun:N (Horovod
over MPI). Every process runs the same tests; worlds of several processes run those of tests/workers too. Tests of
programs start them in a world with ``start``.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import needs

TESTS = pathlib.Path(__file__).resolve().parent
CODE = os.pathsep.join([str(TESTS.parent), str(TESTS / "quick")])
LIMIT_S = 1200
GRACE_S = 15


def parse(spec: str) -> tuple[str, int]:
    """``"mirrored:4"`` as ``("mirrored", 4)``."""
    kind, _, count = spec.partition(":")
    return kind, int(count or 1)


def command(spec: str, arguments: list[str]) -> list[str]:
    """What starts a world: its own launcher, around the same pytest in each process."""
    several = parse(spec)[0] in STARTERS
    folders = [str(TESTS / "replicas")] + [str(TESTS / "workers")] * several
    return [*launcher(spec), sys.executable, str(TESTS / "rank.py"), *folders, *arguments]


def launcher(spec: str) -> list[str]:
    """What starts a world's processes; nothing for worlds of one process."""
    kind, count = parse(spec)
    return STARTERS.get(kind, lambda _: [])(count)


def _horovod(count: int) -> list[str]:
    return [_beside_python("horovodrun"), "--gloo", "-np", str(count)]


def _mpirun(count: int) -> list[str]:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    quiet = ["--mca", "btl_vader_single_copy_mechanism", "none"]  # containers forbid what it would use
    waits = ["--mca", "mpi_yield_when_idle", "1"]  # beside other tests, a rank that waits leaves the core to them
    return ["mpirun", *root, "--oversubscribe", "--bind-to", "none", *quiet, *waits, "-np", str(count)]


def _multiworker(count: int) -> list[str]:
    return [sys.executable, "-m", "distpad", "launch", "-np", str(count), "--"]


STARTERS = {"horovod": _horovod, "mpirun": _mpirun, "multiworker": _multiworker}


def _beside_python(name: str) -> str:
    found = pathlib.Path(sys.executable).with_name(name)
    return str(found) if found.exists() else name


def run(spec: str, arguments: list[str], limit_s: float = LIMIT_S, **settings: str) -> int:
    """Start a world and wait for it, at most ``limit_s``; print what its ranks wrote where that helps."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "DISTPAD_WORLD": spec, "DISTPAD_RANK_OUTPUT": folder, **settings}
        environment["PYTHONPATH"] = os.pathsep.join([CODE, os.environ.get("PYTHONPATH", "")])
        argv = command(spec, arguments)
        if shutil.which(argv[0]) is None:
            print(f"{spec}: {argv[0]} is missing. Install it as launch/install_horovod.sh --help tells.")
            return 3
        process = subprocess.Popen(argv, env=environment, start_new_session=True, stdin=subprocess.DEVNULL)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            print(f"{spec}: not done after {limit_s:.0f} s, ended")
            code = 124
        finally:
            end(process)
        outputs = sorted(pathlib.Path(folder).iterdir())
        for output in outputs if code else outputs[:1]:
            print(f"--- {spec} {output.name}\n{output.read_text(errors='replace')}", flush=True)
        return code


def end(process: subprocess.Popen) -> None:
    """End a process that leads a session, and whoever is left of it: a launcher first gets the time to end its workers,
    which may have groups of their own."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Finished(NamedTuple):
    """What became of a program: the launcher's exit code, all that its processes wrote, and how long it took."""

    code: int
    output: str
    seconds: float


def start(spec: str, *arguments: str | os.PathLike[str], limit_s: float, **settings: str) -> Finished:
    """Run Python with these arguments on every worker of a world. Where its engine is missing, the test that asks for
    it is skipped at a desk, and fails in CI.

    Raises:
        TimeoutError: it was not done within ``limit_s`` seconds; with what it wrote. Nobody is left behind.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"} | settings
    environment["PYTHONPATH"] = os.pathsep.join([CODE, os.environ.get("PYTHONPATH", "")])
    argv = [*launcher(spec), sys.executable, *map(str, arguments)]
    if shutil.which(argv[0]) is None:
        needs.missing(f"{spec}: {argv[0]} is missing; launch/install_horovod.sh --help tells how to get it")
    began = time.monotonic()
    process = subprocess.Popen(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        end(process)
        raise TimeoutError(f"{argv}: not done after {limit_s:.0f} s\n{process.communicate()[0]}") from None
    return Finished(process.returncode, output, time.monotonic() - began)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the world ends with this process
    sys.exit(run(sys.argv[1], sys.argv[2:]))
