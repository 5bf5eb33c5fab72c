"""The command line under the engines' own launchers, and what becomes of a job that loses a worker."""

from __future__ import annotations

import pathlib
import re

import pytest

import worlds

HERE = pathlib.Path(__file__).parent
LIMIT_S = 100
CERTIFIED_S = 180  # seven graphs on each worker


@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_certify_passes_under_the_engines_launcher(world):
    code, output, _ = worlds.start(world, "-m", "distpad", "certify", "--cases", "12", limit_s=LIMIT_S)
    assert "2 replicas on 2 workers" in output
    assert code == 0, output
    assert output.count(" yes") == 14, output


@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_certify_fails_for_the_mean_of_means(world):
    code, output, _ = worlds.start(world, "-m", "distpad", "certify", "--cases", "1", "--naive", limit_s=LIMIT_S)
    assert code != 0
    assert "NOT PASSED" in output, output


OWN = """
import numpy as np
import tensorflow as tf
import distpad

def each(y_true, y_pred):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y_true, y_pred)

def mean(y_true, y_pred, lengths):
    valid = tf.sequence_mask(lengths, tf.shape(y_pred)[1], y_pred.dtype)
    return tf.reduce_sum(each(y_true, y_pred) * valid) / tf.reduce_sum(valid)

def to_certify(loss=None):
    random = np.random.default_rng(1)
    batch = {"x": random.normal(size=[6, 4, 3]), "y": random.integers(0, 2, [6, 4]), "lengths": [4, 1, 2, 1, 4, 1]}
    model = tf.keras.Sequential([tf.keras.Input([None, 3]), tf.keras.layers.Dense(2)])
    return {"model": model, "loss": loss or distpad.DistributedLoss(each), "batch": batch}

def wrong():
    return to_certify(mean)
"""


@pytest.fixture
def certified(tmp_path, monkeypatch):
    """Runs ``distpad certify my_training:FUNCTION`` where the module is, as users do; each worker's model begins with
    weights of its own."""
    (tmp_path / "my_training.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)

    def run(world, function):
        command = ["-m", "distpad", "certify", f"my_training:{function}", "--cases", "1"]
        return worlds.start(world, *command, limit_s=CERTIFIED_S)

    return run


@pytest.mark.timeout(CERTIFIED_S + 20)
@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_what_one_trains_with_is_certified(certified, world):
    code, output, _ = certified(world, "to_certify")
    assert "2 replicas on 2 workers" in output, output
    assert code == 0, output
    assert "uneven rows" in output, output
    assert re.search(r"\bpassed$", output, re.MULTILINE), output


@pytest.mark.timeout(CERTIFIED_S + 20)
@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_own_loss_that_averages_locally_is_not_certified(certified, world):
    code, output, _ = certified(world, "wrong")
    assert "2 replicas on 2 workers" in output, output
    assert code == 1, output
    assert "NOT PASSED" in output and "own mean" in output, output


@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_a_worker_that_dies_leaves_nobody_waiting(world):
    code, output, seconds = worlds.start(world, HERE / "dying_worker.py", limit_s=LIMIT_S)
    assert "worker 0 made a step" in output and "worker 1 made a step" in output, output
    assert code != 0
    assert "must not be reached" not in output
    assert seconds < LIMIT_S / 2


def test_workers_leave_together():
    """One that exits while another still receives breaks the connection that this comes over."""
    code, output, _ = worlds.start("multiworker:2", HERE / "late_worker.py", limit_s=LIMIT_S)
    assert code == 0, output
    times = {
        (what, int(worker)): float(at)
        for worker, what, at in re.findall(r"worker (\d) (came|left) at ([\d.]+)", output)
    }
    assert len(times) == 4, output
    assert times["came", 0] - times["came", 1] > 1  # or this proves nothing
    assert times["left", 1] >= times["came", 0]
