"""The command line under the engines' own launchers, and jobs that lose a worker."""

from __future__ import annotations

import pathlib
import re
import shutil

import pytest

import worlds

HERE = pathlib.Path(__file__).parent
LIMIT_S = 200
CERTIFIED_S = 220  # seven graphs on each worker


@pytest.mark.wide
@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_certify_passes_under_the_engines_launcher(world):
    code, output, _ = worlds.start(world, "-m", "distpad", "certify", "--cases", "12", limit_s=LIMIT_S)
    assert "2 replicas on 2 workers" in output
    assert code == 0, output
    assert output.count(" yes") == 14, output


@pytest.mark.wide
@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_certify_fails_for_the_mean_of_means(world):
    code, output, _ = worlds.start(world, "-m", "distpad", "certify", "--cases", "1", "--naive", limit_s=LIMIT_S)
    assert code != 0
    assert "NOT PASSED" in output, output


OWN = HERE.parent / "to_certify.py"


@pytest.fixture
def certified(tmp_path, monkeypatch):
    """Run ``distpad certify my_training:FUNCTION`` in the module's folder. Each worker's initial weights differ."""
    shutil.copy(OWN, tmp_path / "my_training.py")
    monkeypatch.chdir(tmp_path)

    def run(world, function):
        command = ["-m", "distpad", "certify", f"my_training:{function}", "--cases", "1"]
        return worlds.start(world, *command, limit_s=CERTIFIED_S)

    return run


@pytest.mark.wide
@pytest.mark.timeout(CERTIFIED_S + 20)
@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_what_one_trains_with_is_certified(certified, world):
    code, output, _ = certified(world, "right")
    assert "2 replicas on 2 workers" in output, output
    assert code == 0, output
    assert "uneven rows" in output, output
    assert re.search(r"\bpassed$", output, re.MULTILINE), output


@pytest.mark.wide
@pytest.mark.timeout(CERTIFIED_S + 20)
@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_own_loss_that_averages_locally_is_not_certified(certified, world):
    code, output, _ = certified(world, "wrong")
    assert "2 replicas on 2 workers" in output, output
    assert code == 1, output
    assert "NOT PASSED" in output and "own mean" in output, output


@pytest.mark.wide
@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_a_worker_that_dies_leaves_nobody_waiting(world):
    code, output, seconds = worlds.start(world, HERE / "dying_worker.py", limit_s=LIMIT_S)
    assert "worker 0 made a step" in output and "worker 1 made a step" in output, output
    assert code != 0
    assert "must not be reached" not in output
    assert seconds < LIMIT_S


@pytest.mark.wide
def test_workers_leave_together():
    """A worker that exits while another worker still receives breaks its connection."""
    code, output, _ = worlds.start("multiworker:2", HERE / "late_worker.py", limit_s=LIMIT_S)
    assert code == 0, output
    times = {
        (what, int(worker)): float(at)
        for worker, what, at in re.findall(r"worker (\d) (came|left) at ([\d.]+)", output)
    }
    assert len(times) == 4, output
    assert times["came", 0] - times["came", 1] > 1  # otherwise this test proves nothing
    assert times["left", 1] >= times["came", 0]
