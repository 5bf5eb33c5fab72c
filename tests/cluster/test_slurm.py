"""The test module tests/cluster/slurm.py behaves like a real Slurm; and the behaviour that the launchers rely on."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import sys
import time

import pytest
import slurm

import needs

HOROVOD = """
import socket
import horovod.tensorflow as hvd
import tensorflow as tf
hvd.init()
total = hvd.allreduce(tf.constant(1.0 + hvd.rank()), op=hvd.Sum, name="total")
line = f"rank {hvd.rank()} of {hvd.size()} on {socket.gethostname()}: {float(total):g}\\n"
print(line, end="", flush=True)
"""
# Containers forbid Open MPI 4's single-copy mechanism; a task must not be bound to one core.
MPIRUN = ["mpirun", "--allow-run-as-root", "--bind-to", "none", "--map-by", "slot"]
MPIRUN += ["--mca", "btl_vader_single_copy_mechanism", "none"]


pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("slurm")]  # one Slurm for all tests


@pytest.fixture(scope="module")
def cluster():
    with slurm.start() as running:
        yield running


@pytest.fixture
def script(cluster):
    """Write a batch script from lines."""

    def write(*lines: str) -> pathlib.Path:
        path = cluster.folder / "script.sh"
        path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
        return path

    return write


# -- the cluster ------------------------------------------------------------------------------------------------------


def test_nodes_are_hosts(cluster):
    assert cluster.states() == {"node1": "idle", "node2": "idle"}
    done = cluster.run("srun", "-N2", "--label", "sh", "-c", "hostname; hostname -I; getent hosts login node1 node2")
    assert done.returncode == 0, done.stderr
    for rank, name in enumerate(cluster.nodes):
        own = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith(f"{rank}: ")]
        known = [["10.0.0.1", "login"], ["10.0.0.11", "node1"], ["10.0.0.12", "node2"]]
        assert own == [[name], [f"10.0.0.1{rank + 1}"], *known]


def test_a_job_that_fails_is_reported(cluster, script):
    job = cluster.sbatch(script('printf "<%s>" "$@"', "echo error >&2", "exit 42"), "two words", "$(x)", "")
    assert (job.state, job.code, job.signal) == ("FAILED", 42, 0)
    assert job.output == "<two words><$(x)><>error\n"


def _wait_until_begun(cluster, job):
    limit = time.monotonic() + 60
    while "begun" not in cluster.output(job):
        assert time.monotonic() < limit
        time.sleep(slurm.POLL_S)


def test_a_signal_reaches_the_batch_script(cluster, script):
    """The signal of --signal=B:TERM@60, before the time limit."""
    job = cluster.submit(script("trap 'echo saved; exit 7' TERM", "echo begun", "while :; do sleep 0.1; done"))
    _wait_until_begun(cluster, job)
    assert cluster.run("scancel", "--batch", "--signal=TERM", job).returncode == 0
    ended = cluster.wait(job, limit_s=20)
    assert (ended.state, ended.code) == ("FAILED", 7) and ended.output.endswith("\nsaved\n"), ended.output


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_is_left(raises):
    class ErrorInside(Exception):
        pass

    def left() -> list[str]:
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            try:
                if str(running.folder).encode() in path.read_bytes():
                    found.append(path.with_name("cmdline").read_text().replace("\0", " "))
            except OSError:
                continue  # the process has ended
        return found

    with pytest.raises(ErrorInside) if raises else contextlib.nullcontext(), slurm.start(nodes=1) as running:
        sleeper = subprocess.Popen(running.argv("srun", "sleep", "100"), env=running.env())
        limit = time.monotonic() + 20
        while not any(line.startswith("sleep ") or "/sleep " in line for line in left()):
            assert time.monotonic() < limit
            time.sleep(slurm.POLL_S)
        if raises:
            raise ErrorInside
    sleeper.wait(10)
    limit = time.monotonic() + 5  # the kernel kills a namespace's processes asynchronously
    while left():
        assert time.monotonic() < limit, left()
        time.sleep(slurm.POLL_S)
    assert not running.folder.exists()


# -- what the launchers rely on ---------------------------------------------------------------------------------------


def test_scontrol_does_not_tell_of_errors_by_its_exit_code(cluster):
    """Callers must check that it printed a name."""
    done = cluster.run("scontrol", "show", "hostnames", "a[1-2]b")
    assert (done.returncode, done.stdout) == (0, "") and "Invalid hostlist" in done.stderr


def test_srun_carries_lines_both_ways(cluster):
    """Like the launcher's messages to its agents: lines in both directions, and the end of the input."""
    inner = [
        "srun",
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        "--nodelist=node2",
        "--unbuffered",
        "--mpi=none",
        "--quiet",
    ]
    talk = subprocess.Popen(
        cluster.argv("salloc", "--quiet", "-N2", "--ntasks-per-node=1", *inner, "sh", "-c", "hostname; cat; exit 9"),
        env=cluster.env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    try:
        assert talk.stdout.readline() == "node2\n"
        for number in range(100):
            began = time.monotonic()
            talk.stdin.write(f"line {number}\n")
            assert talk.stdout.readline() == f"line {number}\n"
            assert time.monotonic() - began < 5  # not only at the end
        assert talk.communicate(timeout=20)[0] == ""
    finally:
        talk.kill()
    assert talk.returncode == 9


GPUS = 'echo $(hostname) $SLURM_LOCALID sees "$CUDA_VISIBLE_DEVICES"'


@pytest.mark.parametrize(("option", "agents_see"), [("--gpus-per-node=2", "0,1"), ("--gpus-per-task=1", "0")])
def test_which_gpus_a_launchers_agent_sees(cluster, script, option, agents_see):
    """With --gpus-per-task an agent, which is one task, sees one GPU. launch/slurm therefore uses --gpus-per-node."""
    agent = f"srun --overlap --nodes=1 --ntasks=1 --nodelist=node2 sh -c '{GPUS}'"
    job = cluster.sbatch(script(agent), options=["--nodes=2", "--ntasks-per-node=2", option])
    assert (job.state, job.output) == ("COMPLETED", f"node2 0 sees {agents_see}\n")


def ranks(output: str) -> list[str]:
    return sorted(line for line in output.splitlines() if line.startswith("rank "))


def _need_horovod() -> None:
    needs.program("mpirun")
    needs.program("horovodrun")


EXPECTED = ["rank 0 of 2 on node1: 3", "rank 1 of 2 on node2: 3"]


@pytest.mark.wide
def test_horovod_under_srun(cluster):
    _need_horovod()
    assert "pmix" in cluster.run("srun", "--mpi=list").stdout.split()
    done = cluster.run("srun", "-N2", "--mpi=pmix", sys.executable, "-c", HOROVOD, limit_s=100)
    assert done.returncode == 0, done.stderr
    assert ranks(done.stdout) == EXPECTED


@pytest.mark.wide
def test_horovod_under_mpirun(cluster):
    """mpirun finds the allocation's nodes itself, and starts its daemons there by srun."""
    _need_horovod()
    allocate = ["salloc", "--quiet", "-N2", "--ntasks-per-node=1"]
    done = cluster.run(*allocate, *MPIRUN, "-np", "2", sys.executable, "-c", HOROVOD, limit_s=100)
    assert done.returncode == 0, done.stderr
    assert ranks(done.stdout) == EXPECTED
