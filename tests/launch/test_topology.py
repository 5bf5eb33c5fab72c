"""Jobs that the engines' own launchers start with a wrong topology: no worker trains, all end."""

from __future__ import annotations

import os
import pathlib

import pytest

import worlds

WORKER = pathlib.Path(__file__).parent / "topology_worker.py"
LIMIT_S = 200
OVER_GLOO = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}  # like a build without MPI
# removes the variables by which mpirun's ranks find one another, which another MPI's mpirun does not set
ANOTHER_MPI = "import os, sys; os.execve(sys.executable, [sys.executable, *sys.argv[1:]], {n: v for n, v in " + (
    "os.environ.items() if not n.startswith(('PMIX_', 'OMPI_')) or n.startswith('OMPI_COMM_WORLD_')})"
)
# set in the worker, since distpad launch overrides the variable
EXPECT_THREE = (
    "import os, sys; os.environ.update(DISTPAD_WORKERS='3'); os.execv(sys.executable, ['python', *sys.argv[1:]])"
)
WRONG = {
    "Gloo under mpirun": (
        *("mpirun:2", [], OVER_GLOO),
        "Horovod reports 1 worker, expected 2, set by OMPI_COMM_WORLD_SIZE",
    ),
    "another mpirun": (*("mpirun:2", ["-c", ANOTHER_MPI], {}), "Horovod was built with another MPI than the launcher"),
    "three workers of two": (
        *("horovod:2", [], {"DISTPAD_WORKERS": "3"}),
        "Horovod reports 2 workers, expected 3, set by DISTPAD_WORKERS",
    ),
    "two hosts of one": (
        *("horovod:2", [], {"DISTPAD_WORKERS": "2", "DISTPAD_HOSTS": "2"}),
        "Horovod reports 1 host, expected 2, set by DISTPAD_HOSTS",
    ),
    "three workers of a strategy": (
        *("multiworker:2", ["-c", EXPECT_THREE], {}),
        "MultiWorkerMirroredStrategy reports 2 workers, expected 3",
    ),
}


# tests/single/launcher/test_topology.py covers all cases without engines
@pytest.mark.parametrize(
    ("world", "before", "settings", "message"),
    [
        pytest.param(*case, id=name, marks=[] if name == "Gloo under mpirun" else pytest.mark.wide)
        for name, case in WRONG.items()
    ],
)
def test_a_wrong_topology_ends_all_workers(world, before, settings, message):
    code, output, _ = worlds.start(world, *before, WORKER, limit_s=LIMIT_S, **settings)
    assert code not in (0, 124), output
    assert message in output, output
    assert " trains" not in output


@pytest.mark.wide
@pytest.mark.parametrize("world", ["horovod:2", "mpirun:2", "multiworker:2"])
def test_a_right_topology(world):
    backend = "multiworker" if world == "multiworker:2" else "horovod"
    settings = {"DISTPAD_BACKEND": backend, "DISTPAD_WORKERS": "2", "DISTPAD_HOSTS": "1"}
    code, output, _ = worlds.start(world, WORKER, limit_s=LIMIT_S, **settings)
    assert code == 0, output
    assert "worker 0 of 2 trains" in output and "worker 1 of 2 trains" in output


def test_the_expected_number_of_replicas(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    settings = {"DISTPAD_BACKEND": "mirrored", "DISTPAD_WORKERS": "1", "DISTPAD_HOSTS": "1", "DISTPAD_REPLICAS": "3"}
    code = "import distpad.backends as b, os; e = b.start(); print(e.num_replicas, 'replicas', flush=True); os._exit(0)"
    code, output, _ = worlds.start("local", "-c", code, limit_s=LIMIT_S, **settings)
    assert code == 0 and "3 replicas" in output, output
    assert os.environ.get("DISTPAD_REPLICAS") is None
