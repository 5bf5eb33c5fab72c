"""An elastic job across hosts: a worker on another host is killed and replaced, and no example is lost."""

from __future__ import annotations

import json
import sys

import pytest

from cluster import hosts
from elastic_job import ROOT, Job

sys.path.insert(0, str(ROOT / "tests" / "launch"))

import elastic_worker  # from the tests on one host

LIMIT_S = 120
pytestmark = pytest.mark.timeout(4 * LIMIT_S)


def trained_by(workers: int, step: int = 0):
    return lambda event: event["what"] == "step" and event["workers"] == workers and event["step"] > step


@pytest.mark.wide
def test_a_worker_on_another_host_is_killed_and_replaced(tmp_path):
    with hosts.cluster(2) as pair:
        with Job(tmp_path, ("host1:1", "host2:1"), elastic_worker.__file__, tmp_path, on=pair[0]) as job:
            job.wait_for(trained_by(2, 6), LIMIT_S)
            (remote,) = set(job.workers()) & set(pair[1].processes())
            killed = job.kill(remote)
            job.wait_for(trained_by(1), LIMIT_S, after=killed)
            job.wait_for(
                lambda event: event["workers"] == 2, LIMIT_S, after=killed + 1
            )  # it may be waiting for the file by now
            assert set(job.workers()) & set(pair[1].processes())
            (tmp_path / "go").touch()
            assert job.finish(LIMIT_S) == 0, job.told()
        assert {host.name: host.processes() for host in pair} == {"host1": [], "host2": []}
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("result-*"))
    for epoch in range(elastic_worker.EPOCHS):
        seen = sorted(index for number, *indices in result["seen"] if number == epoch for index in indices)
        assert seen == list(range(elastic_worker.EXAMPLES)), epoch
