"""A worker dies, stops, or is cut off, in each phase of a training: the others end within a limit, which names it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

import worlds
from cluster import hosts
from launched import LIMIT_S, Launched

WORKER = pathlib.Path(__file__).with_name("phases_worker.py")
PHASES = ("start", "broadcast", "reading", "gradient", "evaluating", "saving", "exit")
VICTIM, LOST_S = 1, 8
ENDS_S = {"SIGKILL": 30, "SIGSTOP": LOST_S + 30, "cut": LOST_S + 30}  # on a busy machine; free: a few seconds
ENGINES = {
    "multi-worker": ("--backend", "multiworker"),
    "Horovod, Gloo": ("--backend", "horovod", "--gloo"),
    "Horovod, MPI": ("--backend", "horovod", "--mpi"),
}
# what engines say themselves: they name a worker that died, but Gloo names none that stopped
ALONE_SAYS = re.compile(r"/job:worker/replica:0/task:1|Process name: 1|Timed out waiting \d+ms for \w+")
BY_DEFAULT = [("Horovod, MPI", "SIGSTOP", "gradient"), ("multi-worker", "SIGKILL", "reading")]


def cases() -> list:
    every = [(engine, fault, phase) for engine in ENGINES for fault in ENDS_S for phase in PHASES]
    return [pytest.param(*case, marks=[] if case in BY_DEFAULT else pytest.mark.wide) for case in every]


@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.parametrize(("engine", "fault", "phase"), cases())
def test_the_others_end_and_name_it(engine, fault, phase, tmp_path, record_fault):
    options = [*ENGINES[engine], "-np", "2", "--lost-after-s", str(LOST_S)]
    with contextlib.ExitStack() as stack:
        machines = stack.enter_context(hosts.cluster(2)) if fault == "cut" else None
        if machines:
            options += ["-H", "host1:1,host2:1", "--network-interface", "eth0"]
        command = [sys.executable, WORKER, tmp_path, phase, VICTIM]
        job = Launched(*options, command=command, host=machines and machines[0])
        pid = reached(job.process, tmp_path / "reached")
        time.sleep(1)  # the other worker comes to the collective
        began = time.monotonic()
        if machines:
            machines[1].cut()
        else:
            os.kill(pid, signal.Signals[fault])
        try:
            done = job.finish(2 * ENDS_S[fault])
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job goes on, {2 * ENDS_S[fault]} s after the fault") from None
        seconds = time.monotonic() - began
        said = [line for line in done.stderr.splitlines() if line.startswith("distpad launch:")]
        record_fault(f"{fault}, {phase}", engine, said[1] if len(said) > 1 else "nothing said", seconds)
        assert done.code not in (0, 124) and seconds < ENDS_S[fault], done.stderr
        # a shorter stop is no fault; TensorFlow's own limit may come first
        assert fault != "SIGSTOP" or engine == "multi-worker" or seconds > LOST_S, done.stderr
        named = "host2 was lost, with worker 1" if machines else r"worker 1 on \S+ failed first \(signal SIGKILL"
        assert any(re.search(named, line) for line in said), done.stderr
        end = time.monotonic() + LOST_S + 10
        while done.left() and time.monotonic() < end:
            time.sleep(0.1)
        assert not done.left()


@pytest.mark.wide
@pytest.mark.timeout(3 * LIMIT_S)
@pytest.mark.parametrize("phase", ["reading", "gradient", "evaluating"])
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("engine", ["multi-worker", "Horovod, Gloo"])
def test_what_engines_notice_without_the_launcher(engine, fault, phase, tmp_path, record_fault):
    with alone(engine, tmp_path, phase) as first:
        pid = reached(first, tmp_path / "reached")
        time.sleep(1)
        began = time.monotonic()
        os.kill(pid, signal.Signals[fault])
        code = first.wait(LIMIT_S)
        seconds = time.monotonic() - began
    output = (tmp_path / "output").read_text(errors="replace")
    cause = next((found[0] for found in map(ALONE_SAYS.search, output.splitlines()) if found), "nothing said")
    record_fault(f"{fault}, {phase}", f"{engine} alone", cause, seconds)
    assert code and cause != "nothing said", output


@contextlib.contextmanager
def alone(engine: str, folder: pathlib.Path, phase: str) -> Iterator[subprocess.Popen]:
    """Two workers without ``distpad launch``. Yields what ends after the first: this worker, or Horovod's launcher."""
    command = [sys.executable, str(WORKER), str(folder), phase, str(VICTIM)]
    environments = [{}]
    if engine == "multi-worker":
        cluster = {"worker": [f"127.0.0.1:{free_port()}" for _ in range(2)]}
        tasks = [{"cluster": cluster, "task": {"type": "worker", "index": index}} for index in range(2)]
        environments = [{"TF_CONFIG": json.dumps(task), "DISTPAD_RANK": str(i)} for i, task in enumerate(tasks)]
    else:
        command = [*worlds.launcher("horovod:2"), *command]
    started = []
    try:
        with (folder / "output").open("w") as output:
            for environment in environments:
                env = {**os.environ, "PYTHONPATH": worlds.CODE, **environment}
                streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
                started.append(subprocess.Popen(command, env=env, start_new_session=True, **streams))
        yield started[0]
    finally:
        for process in started:
            worlds.end(process)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def reached(process: subprocess.Popen, file: pathlib.Path) -> int:
    """The process id of the victim, once it waits for its fault."""
    end = time.monotonic() + LIMIT_S
    while not file.exists():
        assert time.monotonic() < end and process.poll() is None, "the victim did not come to its phase"
        time.sleep(0.05)
    return int(file.read_text())
