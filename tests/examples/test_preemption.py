"""The handwriting example under SIGTERM: it saves, leaves, and goes on from there as if nothing had happened."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import signal
import sys
import time

import numpy as np
import psutil
import pytest

import elastic_job
import launched
import worlds

TRAIN = pathlib.Path(__file__).resolve().parents[2] / "examples" / "handwriting" / "train.py"
WRONG = pathlib.Path(__file__).with_name("wrong_train.py")
LIMIT_S = 240
STEPS, EVERY = 130, 13  # below the last, no checkpoint falls on a step where workers agree, a multiple of 10
SMALL = ("--batch", 12, "--strings", 64, "--boundaries", 2, "--eval-strings", 4, "--checkpoint-every", EVERY)
ENGINES = {
    "mirrored": ("--backend", "mirrored"),
    "multiworker": ("--backend", "multiworker"),
    "gloo": ("--backend", "horovod", "--gloo"),
    "mpi": ("--backend", "horovod", "--mpi"),
}
pytestmark = pytest.mark.timeout(3 * LIMIT_S + 20)


class Training(launched.Launched):
    """``train.py`` by ``distpad launch``, with two replicas."""

    def __init__(self, engine: str, out: pathlib.Path, *arguments: object):
        missing = engine in ("gloo", "mpi") and not pathlib.Path(sys.executable).with_name("horovodrun").exists()
        if missing or (engine == "mpi" and shutil.which("mpirun") is None):
            (pytest.fail if os.environ.get("DISTPAD_CI") else pytest.skip)(f"{engine}: Horovod or mpirun is missing")
        self.out = out
        flags = ENGINES[engine]
        command = [sys.executable, TRAIN, *flags[:2], "--replicas", 2, "--steps", STEPS, *SMALL, "--out", out]
        super().__init__("-np", 2, *flags, command=[*command, *arguments])

    def wait_for_checkpoint(self) -> None:
        end = time.monotonic() + LIMIT_S
        while not saved(self.out):
            assert self.process.poll() is None and time.monotonic() < end, self.process.communicate(timeout=LIMIT_S)
            time.sleep(0.02)

    def ranks(self) -> dict[int, int]:
        """The pid of each worker that trains."""
        found = {}
        for process in psutil.process_iter():
            try:
                variables = process.environ()
                if variables.get("DISTPAD_MARK") == self.mark and process.cmdline()[1:2] == [str(TRAIN)]:
                    found[int(variables.get("DISTPAD_RANK") or variables["OMPI_COMM_WORLD_RANK"])] = process.pid
            except psutil.Error:
                continue
        return found

    def finish(self, limit_s: float = LIMIT_S) -> Training:
        super().finish(limit_s)
        self.told = f"{self.stdout}\n{self.stderr}"
        assert self.left() == [], self.told
        return self


def saved(out: pathlib.Path) -> list[int]:
    """The steps of the checkpoints that there are."""
    return sorted(int(path.name.rpartition("-")[2]) for path in out.glob("checkpoints/step-*"))


def weights(out: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(out / "reader" / "weights.npz") as arrays:
        return dict(arrays)


@pytest.mark.wide  # three trainings; the pipeline's and the launcher's own tests resume, and hand on SIGTERM
@pytest.mark.parametrize("engine", ENGINES)
def test_sigterm_to_one_worker_costs_no_step(tmp_path, engine):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = Training(engine, whole, "--no-drift").finish()
    assert done.code == 0, done.told

    training = Training(engine, parts, "--no-drift")
    training.wait_for_checkpoint()
    ranks = training.ranks()
    assert sorted(ranks) == ([0] if engine == "mirrored" else [0, 1])
    os.kill(ranks[max(ranks)], signal.SIGTERM)
    training.finish()
    assert training.code == 143 and "Traceback" not in training.told, training.told
    if engine != "mirrored":  # both with the same
        assert re.search(r"then failed: worker \d \(exit code 143\)\n", training.told), training.told
    step = saved(parts)[-1]
    assert step % 10 == 0 and step % EVERY and EVERY < step < STEPS
    assert f"SIGTERM: saved after step {step}." in training.told
    assert not (parts / "summary.json").exists()

    done = Training(engine, parts, "--resume=auto").finish()
    assert done.code == 0 and re.search(rf"\b{step}/{STEPS}\b", done.told), done.told
    assert not list(parts.glob("drift-*"))  # that belongs to the beginning
    expected, found = weights(whole), weights(parts)
    assert len(expected) > 5
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.wide
def test_sigterm_to_the_launcher_is_one_for_all(tmp_path):
    training = Training("multiworker", tmp_path, "--no-drift")
    training.wait_for_checkpoint()
    training.process.terminate()
    training.finish()
    assert training.code == 143 and saved(tmp_path)[-1] % EVERY, training.told


@pytest.mark.wide
def test_a_later_sigterm_ends_a_worker_that_waits_for_another(tmp_path):
    training = Training("multiworker", tmp_path, "--no-drift")
    training.wait_for_checkpoint()
    ranks = training.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    time.sleep(1)  # worker 0 comes to where it waits
    worker = psutil.Process(ranks[0])
    for _ in range(2):  # at once, as from Slurm and from a launcher
        worker.terminate()
        time.sleep(0.5)
    assert worker.is_running() and training.process.poll() is None
    time.sleep(5)
    worker.terminate()
    worker.wait(5)
    training.finish()
    assert training.code == 143, training.told
    last = saved(tmp_path)[-1]
    assert last % EVERY == 0  # they could not agree: it goes on from what was there before
    done = Training("multiworker", tmp_path, "--resume=auto").finish()
    assert done.code == 0 and re.search(rf"\b{last}/{STEPS}\b", done.told), done.told


@pytest.mark.wide
def test_sigterm_before_the_first_step_ends_a_worker_at_once(tmp_path):
    """While it measures the drift, for some seconds, with an engine that would rather take the signal itself."""
    out = tmp_path / "out"
    training = Training("multiworker", out)
    end = time.monotonic() + LIMIT_S
    while not out.exists() and time.monotonic() < end:  # made when the engine has started
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(training.ranks()[1], signal.SIGTERM)
    training.finish()
    assert training.code == 143 and "worker 1 on localhost failed first (signal" in training.told, training.told
    assert not saved(out)


@pytest.mark.wide
@pytest.mark.timeout(5 * LIMIT_S)
def test_elastic_training_under_sigterm(tmp_path):
    """To one worker: the others go on. To all: it ends, and goes on from what was saved. Each world is certified."""
    out, steps = tmp_path / "out", 600
    arguments = ("--backend", "horovod", "--elastic", "--certify", "--steps", steps, "--out", out, *SMALL)
    job = elastic_job.Job(tmp_path, elastic_job.BOTH, TRAIN, *arguments, "--commit-every", 5)
    with job:
        job.wait_until(lambda: saved(out), LIMIT_S)
        first = job.workers()
        assert sorted(first.values()) == [0, 1]
        told = next(pid for pid, rank in first.items() if rank == 0)  # who writes
        job.kill(told, signal.SIGTERM)
        again = lambda: [pid for pid in job.workers() if pid not in first]
        job.wait_until(again, LIMIT_S)
        job.wait_until(lambda: len(certified(job)) == 3, LIMIT_S)
        last = saved(out)[-1]
        job.wait_until(lambda: saved(out)[-1] > last, LIMIT_S)
        job.terminate()
        assert job.finish(LIMIT_S) == 143, job.told()
        assert certified(job) == [2, 1, 2], job.told()
        assert len(re.findall(r"SIGTERM: saved after step \d+", job.output)) >= 2, job.told()
    step = saved(out)[-1]
    assert last < step < steps and step % 10 == 0
    with elastic_job.Job(tmp_path, elastic_job.BOTH, TRAIN, *arguments, "--resume=auto") as job:
        assert job.finish(LIMIT_S) == 0, job.told()
        assert re.search(rf"\b{step}/{steps}\b", job.output) and certified(job) == [2], job.told()


def certified(job: elastic_job.Job) -> list[int]:
    """The numbers of workers of each certificate."""
    return [int(count) for count in re.findall(r"distpad certificate: .* on (\d+) workers", job.output)]


@pytest.mark.wide  # tests/replicas/test_certificate_own.py certifies what is wrong in the worlds
@pytest.mark.parametrize("world", ["mirrored:2", "multiworker:2", "horovod:2"])
def test_certify_stops_a_training_whose_gradients_are_off(tmp_path, world):
    backend, replicas = world.split(":")
    arguments = ("--backend", backend, "--replicas", replicas, "--certify", "--out", tmp_path)
    code, output, _ = worlds.start(world, WRONG, *map(str, (*arguments, *SMALL)), limit_s=LIMIT_S)
    assert code not in (0, 124) and 'train.py", line' not in output, output
    assert first_said(output).count("NOT PASSED: gradients are off by 1.0%") == 1, output
    error = f"train.py: --certify: gradients on these {replicas} replicas are off by 1.0%"
    assert first_said(output).count(error) == (1 if backend == "mirrored" else 2), output
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.wide
def test_certify_stops_an_elastic_training_whose_gradients_are_off(tmp_path):
    arguments = ("--backend", "horovod", "--elastic", "--certify", "--out", tmp_path / "out", *SMALL)
    with elastic_job.Job(tmp_path, elastic_job.BOTH, WRONG, *arguments) as job:
        assert job.finish(LIMIT_S) == 1, job.told()
    assert first_said(job.output).count("NOT PASSED") == 1 and not saved(tmp_path / "out"), job.told()


def first_said(output: str) -> str:
    """What workers wrote, without what the launcher says of it once more."""
    return "\n".join(line for line in output.splitlines() if not line.startswith("distpad launch:"))
