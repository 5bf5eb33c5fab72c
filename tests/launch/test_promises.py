"""Jobs that come up as less than they were launched as, by the engines' own launchers: no worker trains, all end."""

from __future__ import annotations

import os
import pathlib

import pytest

import worlds

WORKER = pathlib.Path(__file__).parent / "promised_worker.py"
LIMIT_S = 200
OVER_GLOO = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}  # as if it were built without MPI
# mpirun's ranks lose what its MPI would find the others by, as those of another MPI's mpirun never have it
OF_ANOTHER_MPI = "import os, sys; os.execve(sys.executable, [sys.executable, *sys.argv[1:]], {n: v for n, v in " + (
    "os.environ.items() if not n.startswith(('PMIX_', 'OMPI_')) or n.startswith('OMPI_COMM_WORLD_')})"
)
# set in the worker, since distpad launch hands on no promise but its own
THREE_PROMISED = (
    "import os, sys; os.environ.update(DISTPAD_WORKERS='3'); os.execv(sys.executable, ['python', *sys.argv[1:]])"
)
BROKEN = {
    "Gloo under mpirun": (
        *("mpirun:2", [], OVER_GLOO),
        "Horovod reports 1 worker, expected 2, which OMPI_COMM_WORLD_SIZE promises",
    ),
    "another mpirun": (*("mpirun:2", ["-c", OF_ANOTHER_MPI], {}), "The MPI that Horovod was built with is not"),
    "three workers of two": (
        *("horovod:2", [], {"DISTPAD_WORKERS": "3"}),
        "Horovod reports 2 workers, expected 3, which DISTPAD_WORKERS promises",
    ),
    "two hosts of one": (
        *("horovod:2", [], {"DISTPAD_WORKERS": "2", "DISTPAD_HOSTS": "2"}),
        "Horovod reports 1 host, expected 2, which DISTPAD_HOSTS promises",
    ),
    "three workers of a strategy": (
        *("multiworker:2", ["-c", THREE_PROMISED], {}),
        "MultiWorkerMirroredStrategy reports 2 workers, expected 3",
    ),
}


# tests/single/test_promises.py has every way to come up wrong, with engines that are not there
@pytest.mark.parametrize(
    ("world", "before", "settings", "message"),
    [
        pytest.param(*case, id=name, marks=[] if name == "Gloo under mpirun" else pytest.mark.wide)
        for name, case in BROKEN.items()
    ],
)
def test_a_broken_promise_ends_all_workers(world, before, settings, message):
    code, output, _ = worlds.start(world, *before, WORKER, limit_s=LIMIT_S, **settings)
    assert code not in (0, 124), output
    assert message in output, output
    assert " trains" not in output


@pytest.mark.wide
@pytest.mark.parametrize("world", ["horovod:2", "mpirun:2", "multiworker:2"])
def test_a_kept_promise(world):
    backend = "multiworker" if world == "multiworker:2" else "horovod"
    settings = {"DISTPAD_BACKEND": backend, "DISTPAD_WORKERS": "2", "DISTPAD_HOSTS": "1"}
    code, output, _ = worlds.start(world, WORKER, limit_s=LIMIT_S, **settings)
    assert code == 0, output
    assert "worker 0 of 2 trains" in output and "worker 1 of 2 trains" in output


def test_replicas_as_promised(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    settings = {"DISTPAD_BACKEND": "mirrored", "DISTPAD_WORKERS": "1", "DISTPAD_HOSTS": "1", "DISTPAD_REPLICAS": "3"}
    told = "import distpad.backends as b, os; e = b.start(); print(e.num_replicas, 'replicas', flush=True); os._exit(0)"
    code, output, _ = worlds.start("local", "-c", told, limit_s=LIMIT_S, **settings)
    assert code == 0 and "3 replicas" in output, output
    assert os.environ.get("DISTPAD_REPLICAS") is None
