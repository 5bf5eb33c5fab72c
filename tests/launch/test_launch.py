"""The command line under the engines' own launchers, and what becomes of a job that loses a worker."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import worlds

HERE = pathlib.Path(__file__).parent
LIMIT_S = 100


def started(world: str, *arguments: str) -> tuple[int, str, float]:
    """Run Python with ``arguments`` on each worker of a world: exit code, output, seconds. Leaves nobody behind."""
    kind, count = worlds.parse(world)
    argv = [*worlds.STARTERS[kind](count), sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "TF_CPP_MIN_LOG_LEVEL": "2"}
    began = time.monotonic()
    process = subprocess.Popen(
        argv, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{world} hung: {process.communicate()[0]}")
    return process.returncode, output, time.monotonic() - began


@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_certify_passes_under_the_engines_launcher(world):
    code, output, _ = started(world, "-m", "distpad", "certify", "--cases", "12")
    assert "2 replicas on 2 workers" in output
    assert code == 0, output
    assert output.count(" yes") == 12, output


@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_certify_fails_for_the_mean_of_means(world):
    code, output, _ = started(world, "-m", "distpad", "certify", "--cases", "1", "--naive")
    assert code != 0
    assert "NOT PASSED" in output, output


@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_a_worker_that_dies_leaves_nobody_waiting(world):
    code, output, seconds = started(world, str(HERE / "dying_worker.py"))
    assert "worker 0 made a step" in output and "worker 1 made a step" in output, output
    assert code != 0
    assert "must not be reached" not in output
    assert seconds < LIMIT_S
