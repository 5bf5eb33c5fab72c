"""An elastic job on three hosts to which faults happen at random times: it ends, and no example is lost or repeated.

    pytest tests/faults/test_chaos.py --chaos-rounds 200 --chaos-jobs 4 -n 4 --chaos-seed 1

A round is one fault, after which the training must go on. Of five rounds each fault has one, in a drawn order. When
all workers that hold the state are lost, the launcher starts the job again, from its last checkpoint. The jobs share
the rounds, and draw from consecutive seeds; with ``-n`` they run side by side, each on hosts of its own.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import pathlib
import random
import signal
import time

import chaos_worker
import numpy as np
import pytest

from cluster import hosts
from elastic_job import Job

WORKER = pathlib.Path(__file__).with_name("chaos_worker.py")
LIMIT_S = 420  # for the training to go on, on a busy machine, also by a new start of the job
GLOO_S = 45  # how long a worker waits for one that joins, and for one behind a cut link
STOPPED_S = 6  # --lost-after-s
RESENT_S = 2 * 120  # after a cut of two minutes at most
EPOCHS = 3  # that the job trains at least
FAULTS = ("kill", "stop", "add", "remove", "cut")
OPTIONS = (
    *("--max-np", "3", "--max-restarts", "100"),
    *("--lost-after-s", str(STOPPED_S), "--grace-s", "1", "--start-timeout-s", "120"),
    *("--launcher-arg=--gloo-timeout-seconds", f"--launcher-arg={GLOO_S}"),
)


class Chaos:
    """A running job, the hosts that it may use, and what can happen to them.

    Args:
      calm: whether a fault waits until all hosts train. Horovod takes minutes to give up a job that loses a worker
        while it forms again.
    """

    def __init__(self, job: Job, machines: tuple[hosts.Host, ...], seed: int, *, calm: bool) -> None:
        self.job, self.draw, self.calm = job, random.Random(seed), calm
        self.machines = {machine.name: machine for machine in machines}
        self.listed = [*self.machines][:2]
        self.behind_cut: hosts.Host | None = None

    def present(self, after: float = 0.0) -> dict[str, int]:
        """The host and process of each worker of the world that trained last, if that was after a time."""
        since = max(after, time.time() - 3)
        recent = itertools.takewhile(lambda event: event["at"] > since, reversed(self.job.events()))
        last: dict[int, dict] = {}
        for event in recent:
            if event["what"] == "step":
                last.setdefault(event["worker"], event)
        whole = {event["host"]: event["pid"] for event in last.values() if event["workers"] == len(last)}
        return whole if len(whole) == len(last) else {}

    def trains(self, after: float, workers: int = 1) -> dict[str, int]:
        """Wait until at least so many workers train."""
        enough = lambda: found if len(found := self.present(after)) >= workers else None
        return self.job.wait_until(enough, LIMIT_S)

    def round(self, fault: str) -> tuple[str, str, float]:
        """Inject a fault, and wait until the training goes on. Returns what was done, what happened, and seconds."""
        # The loss of the last worker that holds the state ends an elastic job, and a host needs a successor to leave.
        least = 1 if fault == "add" else 2
        world = self.trains(time.time(), max(least, len(self.listed)) if self.calm else least)
        time.sleep(self.draw.uniform(0, 1))
        began = time.time()
        done = getattr(self, fault)(world)
        left = self.trains(began + (STOPPED_S if fault in ("stop", "cut") else 0))
        if self.behind_cut:
            self.behind_cut.mend()
            self.behind_cut = None
        return done, f"{len(world)} workers, then {len(left)}", time.time() - began

    def kill(self, world: dict[str, int], number: signal.Signals = signal.SIGKILL) -> str:
        host = self.draw.choice(sorted(world))
        with contextlib.suppress(ProcessLookupError):  # it has just lost its peers, and ended
            self.job.kill(world[host], number)
        return f"{number.name} to the worker on {host}"

    def stop(self, world: dict[str, int]) -> str:
        return self.kill(world, signal.SIGSTOP)

    def add(self, world: dict[str, int]) -> str:
        fresh = self.draw.choice([name for name in self.machines if name not in self.listed])
        self._list([*self.listed, fresh])
        self.job.wait_until(lambda: fresh in self.present(), LIMIT_S)
        return f"{fresh} added"

    def remove(self, world: dict[str, int]) -> str:
        # one host of a worker that holds the state stays
        gone = self.draw.choice([name for name in self.listed if {*world} & {*self.listed} - {name}])
        self._list([name for name in self.listed if name != gone])
        self.job.wait_until(lambda: (found := self.present()) and gone not in found, LIMIT_S)
        return f"{gone} removed"

    def _list(self, names: list[str]) -> None:
        self.listed = names
        self.job.list_hosts(*(f"{name}:1" for name in names))

    def cut(self, world: dict[str, int]) -> str:
        self.behind_cut = self.machines[self.draw.choice([name for name in sorted(world) if name != "host1"])]
        self.behind_cut.cut()
        return f"link of {self.behind_cut.name} cut"


def expected_weights(epochs: int) -> np.ndarray:
    """Gradient descent with momentum in NumPy, on whole batches."""
    rows = chaos_worker.examples()
    sampler = chaos_worker.sampler(rows)
    weights, velocity = np.zeros(chaos_worker.WIDTH), np.zeros(chaos_worker.WIDTH)
    for step in (step for epoch in range(epochs) for step in sampler.plan(epoch)):
        x, y = (np.concatenate([rows[i][name] for i in step]) for name in "xy")
        gradient = 2 * x.T @ (x @ weights - y) / len(y)
        velocity = chaos_worker.MOMENTUM * velocity - chaos_worker.RATE * gradient
        weights = weights + velocity
    return weights


def loss_of(weights: np.ndarray) -> float:
    x, y = (np.concatenate([row[name] for row in chaos_worker.examples()]) for name in "xy")
    return float(np.mean(np.square(x @ weights - y)))


def read_books(folder: pathlib.Path) -> dict[int, list[int]]:
    """The examples of each epoch that has ended; of one that was done again, the last."""
    path = folder / "books"
    return dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}


def check(folder: pathlib.Path) -> dict:
    """Check the books and the loss of a job that has ended. Returns its result."""
    (result,) = (json.loads(path.read_text()) for path in folder.glob("result-*"))
    books = read_books(folder)
    assert sorted(books) == list(range(result["epochs"]))
    every = list(range(chaos_worker.EXAMPLES))
    wrong = {epoch: collections.Counter(seen) for epoch, seen in books.items() if sorted(seen) != every}
    assert not wrong
    assert loss_of(np.array(result["weights"])) == pytest.approx(loss_of(expected_weights(result["epochs"])), rel=1e-4)
    return result


def left_processes(machines: tuple[hosts.Host, ...]) -> dict[str, list[str]]:
    """The processes that stay on each host. Sessions of sshd behind a cut link end when TCP repeats its packet."""
    end = time.monotonic() + RESENT_S
    while True:
        lines = hosts.command_lines()
        found = {machine.name: [lines.get(pid, "") for pid in machine.processes()] for machine in machines}
        found = {name: commands for name, commands in found.items() if commands}
        if not found or time.monotonic() > end:
            return found
        time.sleep(1)


def drawn(rounds: int, seed: int) -> list[str]:
    """The faults in groups of all five. In each a host comes before one goes, so that there are always two."""
    draw, found = random.Random(seed), []
    while len(found) < rounds:
        group = draw.sample(FAULTS, len(FAULTS))
        first, second = sorted(group.index(name) for name in ("add", "remove"))
        group[first], group[second] = "add", "remove"
        found += group
    return found[:rounds]


def pytest_generate_tests(metafunc):
    rounds, jobs, seed = (metafunc.config.getoption(f"--chaos-{name}") for name in ("rounds", "jobs", "seed"))
    shares = [(rounds * (job + 1) // jobs - rounds * job // jobs, seed + job) for job in range(jobs)]
    metafunc.parametrize(("rounds", "seed"), shares)


@pytest.mark.timeout(0)  # each wait has a limit
def test_chaos(tmp_path, rounds, seed, record_fault):
    with hosts.cluster(3) as machines:
        first = tuple(f"{machine.name}:1" for machine in machines[:2])
        with Job(tmp_path, first, WORKER, tmp_path, on=machines[0], options=OPTIONS) as job:
            chaos = Chaos(job, machines, seed, calm=rounds <= len(FAULTS))
            for number, fault in enumerate(drawn(rounds, seed)):
                done, happened, seconds = chaos.round(fault)
                record_fault(f"seed {seed}, round {number + 1:3}: {done}", "Horovod elastic", happened, seconds)
            job.wait_until(lambda: len(read_books(tmp_path)) >= EPOCHS, LIMIT_S)  # on a busy machine, also after it
            (tmp_path / "go").touch()
            assert job.finish(LIMIT_S) == 0, job.told()
        check(tmp_path)
        assert left_processes(machines) == {}
