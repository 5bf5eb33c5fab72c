"""Elastic jobs of real workers that are killed, removed and added: no example is lost or seen twice."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess

import elastic_worker
import numpy as np
import pytest

from elastic_job import BOTH, ROOT, Job
from scripts import script

WORKER = pathlib.Path(__file__).with_name("elastic_worker.py")
START_S = CHANGE_S = END_S = 180  # limits for a busy machine; the usual times are a tenth of these
STEPS = elastic_worker.EPOCHS * -(-elastic_worker.EXAMPLES // elastic_worker.BATCH)
pytestmark = pytest.mark.timeout(4 * START_S)


def made(folder: pathlib.Path, hosts: tuple[str, ...] = BOTH, **settings: str) -> Job:
    return Job(folder, hosts, WORKER, folder, **settings)


def trained_by(workers: int, step: int = 0):
    return lambda event: event["what"] == "step" and event["workers"] == workers and event["step"] > step


def formed_by(workers: int):
    """A predicate of events: the start of training with this number of workers."""
    return lambda event: event["what"] == "began" and event["workers"] == workers


def expected_weights() -> np.ndarray:
    """Gradient descent with momentum in NumPy, on whole batches."""
    rows = elastic_worker.examples()
    plans = [elastic_worker.sampler(rows).plan(epoch) for epoch in range(elastic_worker.EPOCHS)]
    weights, velocity = np.zeros(elastic_worker.WIDTH), np.zeros(elastic_worker.WIDTH)
    for step in (step for plan in plans for step in plan):
        x, y = (np.concatenate([rows[i][name] for i in step]) for name in "xy")
        gradient = 2 * x.T @ (x @ weights - y) / len(y)
        velocity = 0.5 * velocity - elastic_worker.RATE * gradient
        weights = weights + velocity
    return weights


def check(job: Job) -> None:
    """Check that the job succeeds, trains on each example once per epoch, and leaves no process."""
    (job.folder / "go").touch()
    assert job.finish(END_S) == 0, job.told()
    (result,) = (
        json.loads(path.read_text()) for path in job.folder.glob("result-*")
    )  # exactly one worker writes the result
    assert result["step"] == len(result["losses"]) == STEPS
    for epoch in range(elastic_worker.EPOCHS):
        seen = sorted(index for number, *indices in result["seen"] if number == epoch for index in indices)
        assert seen == list(range(elastic_worker.EXAMPLES)), epoch
    np.testing.assert_allclose(result["weights"], expected_weights(), rtol=1e-9)


@pytest.mark.wide  # tests/faults/test_chaos.py kills workers by default
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_is_killed_is_replaced(tmp_path, victim):
    with made(tmp_path) as job:
        killed = job.wait_for(lambda event: trained_by(2, 6)(event) and event["worker"] == victim, START_S)
        at = job.kill(killed["pid"])
        job.wait_for(formed_by(1), CHANGE_S, after=at)
        job.wait_for(formed_by(2), CHANGE_S, after=at)
        check(job)
        pids = {event["pid"] for event in job.events()}
    assert len(pids) == 3 and killed["pid"] in pids


@pytest.mark.wide
def test_hosts_are_taken_away_and_given_back(tmp_path):
    """Worker 0's host first, so that another worker writes the result. Announced changes repeat no step."""
    with made(tmp_path) as job:
        job.wait_for(trained_by(2, 2), START_S)
        job.list_hosts(BOTH[1])
        alone = job.wait_for(formed_by(1), CHANGE_S)
        job.list_hosts(*reversed(BOTH))
        again = job.wait_for(formed_by(2), CHANGE_S, after=alone["at"])
        check(job)
        steps = [event["step"] for event in job.events() if event["what"] == "step" and event["pid"] == alone["pid"]]
    assert steps == list(range(1, STEPS + 1))
    assert 2 < alone["step"] <= again["step"] < STEPS


# -- the scripts ------------------------------------------------------------------------------------------------------


def run(name: str, *arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DISTPAD_HOSTS_FILE": "", **settings}
    return subprocess.run(
        [ROOT / "launch" / name, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120
    )


def test_hosts_are_read_in_the_forms_that_people_write(tmp_path):
    hosts = tmp_path / "my hosts"
    hosts.write_text("# all\n\nnode1:4\n  node2 slots=2 max_slots=3\nnode3   # one\n10.0.0.4:1")
    expected = "node1:4\nnode2:2\nnode3:1\n10.0.0.4:1"
    for done in (run("discover_hosts.sh", hosts), run("discover_hosts.sh", DISTPAD_HOSTS_FILE=str(hosts))):
        assert (done.returncode, done.stdout.rstrip("\n"), done.stderr) == (0, expected, "")
    for done in (run("discover_hosts.sh"), run("discover_hosts.sh", tmp_path / "none")):
        assert (done.returncode, done.stdout) == (1, "") and "discover_hosts: error: " in done.stderr


def test_elastic_sh_is_a_thin_layer(tmp_path):
    printing = '[ "$1" = -c ] && exit; printf "%s\\n" "$DISTPAD_HOSTS_FILE" "$@"'
    python = script(tmp_path / "my python", printing)
    (tmp_path / "hosts").touch()
    given = ("--hosts-file", tmp_path / "hosts", "--min-np", 2, "--max-np", 4, "--tee", "--", "a b", "--min-np", "c")
    done = run("elastic.sh", *given, DISTPAD_PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    hosts, *argv = done.stdout.splitlines()
    assert hosts == str(tmp_path / "hosts")
    assert " ".join(argv[:12]) == "-m distpad launch --backend horovod --gloo -np 2 --min-np 2 --max-np 4"
    assert argv[12:14] == ["--host-discovery-script", str(ROOT / "launch" / "discover_hosts.sh")]
    assert argv[-5:] == ["--tee", "--", "a b", "--min-np", "c"]
    for wrong, message in ((("--", "x"), "--hosts-file is missing"), (given[:2], "no COMMAND")):
        done = run("elastic.sh", *wrong)
        assert done.returncode == 2 and message in done.stderr
