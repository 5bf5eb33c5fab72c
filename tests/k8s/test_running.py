"""The pods of the built manifests run on a test double of Kubernetes, to the end and under faults.

These tests show the behaviour under failures in k8s/README.md.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal

import pytest

import needs
from k8s import manifests, namespace

LIMIT_S = 300
SMALL = ("--strings=64", "--eval-strings=8", "--batch=12", "--no-drift")
# overlay | pods that train | the host name of one that is not the first pod
GANGS = {"indexed-job": (2, "train-1"), "jobset": (2, "train-node-0-1"), "trainjob": (2, "train-node-0-1")}
MPI = {"mpijob": (2, "train-worker-1"), "trainjob-mpi": (2, "train-node-0-1")}
ELASTIC = {"mpijob-elastic": (2, "train-worker-1")}
ALL = {**GANGS, **MPI, **ELASTIC}
RESTARTING = ("indexed-job", "mpijob")  # by the test doubles; other jobs are restarted by JobSet itself
RESTARTS = 1  # instead of 3

wide = pytest.mark.wide
# Trainer creates pods by a JobSet, and the pods of its MPI jobs resemble the MPI operator's
ONCE = ["indexed-job", "jobset", pytest.param("trainjob", marks=wide), pytest.param("trainjob-mpi", marks=wide)]
pytestmark = pytest.mark.timeout(2 * LIMIT_S + 60)  # for two waits; the second one reports a timeout


@contextlib.contextmanager
def applied(overlay, *training, command=None, wait_s=None, workers=None):
    """Apply an overlay with a user's patches, in a new namespace.

    Args:
        overlay: one of ALL.
        training: further arguments of the training.
        command: another training command.
        wait_s: the time for which pods wait for one another.
        workers: the number of pods that train.
    """
    if "mpi" in overlay:
        needs.program("mpirun")
    resources = manifests.overlay(overlay)
    for path, value in manifests.scalars(resources).items():
        if path.endswith("backoffLimit") and value == 3:
            name, _, inner = path.partition(" ")
            manifests.put(manifests.find(resources, name), inner, RESTARTS)
    for pod in manifests.pods(resources).values():
        (container,) = pod["spec"]["containers"]
        if wait_s is not None and "--" in container["command"]:
            container["command"][-1:] = ["--wait-s", str(wait_s), "--"]
        if container.get("args"):
            container["args"] = [*(command or [*container["args"], *training])]
        for variable in container["env"]:
            if workers and variable["name"] == "DISTPAD_WORKERS":
                variable["value"] = str(workers)
    if workers:
        manifests.put(manifests.find(resources, "MPIJob/train"), "spec.mpiReplicaSpecs.Worker.replicas", workers)
    with namespace.of(resources) as cluster:
        yield cluster
        left = {host.name: host.processes() for host in cluster.nodes.values() if host.processes()}
        assert not left, cluster.output()


def trained(cluster):
    """The folder of the training's files."""
    return cluster.state / "claims" / "checkpoints" / "handwriting"


def saved(cluster):
    """The steps that have checkpoints."""
    return sorted(int(path.stem.partition("-")[2]) for path in trained(cluster).glob("checkpoints/ckpt-*.index"))


def saved_at_sigterm(cluster):
    """The step that all trainings report as saved at SIGTERM."""
    (step,) = set(re.findall(r"SIGTERM: step (\d+) is saved", cluster.output()))
    return int(step)


def begins(cluster, last):
    """The first steps of successive trainings, without the launcher's repetitions."""
    first = [pod.log for pod in cluster.pods if re.search(r"launcher|-0\.", pod.name) and "worker" not in pod.name]
    lines = [line for log in first for line in log.splitlines() if not line.startswith("distpad launch: ")]
    return [int(step) for line in lines for step in re.findall(rf"(\d+)/{last} \[00:00<\?", line)]


def starts(cluster, host_name):
    """The number of starts of pods with this name, and of their containers."""
    return sum(1 + pod.restarts for pod in cluster.pods if pod.host.name == host_name)


def counted(cluster):
    """The number of failures that the job has counted against its limit."""
    return getattr(cluster.job, "launcher", cluster.job).failures


def assert_trained(cluster, overlay, steps, replicas=None):
    summary = json.loads((trained(cluster) / "summary.json").read_text())
    wanted = {"backend": "horovod" if "mpi" in overlay else "multiworker", "steps": steps}
    wanted["replicas"] = replicas or ALL[overlay][0]
    assert {key: summary[key] for key in wanted} == wanted
    assert saved(cluster)[-1] == steps


# -- to the end -------------------------------------------------------------------------------------------------------


# By default one kind trains. The pods of the other kinds run below without TensorFlow; mpirun's workers busy-wait.
@pytest.mark.parametrize(
    "overlay", ["jobset", *(pytest.param(name, marks=wide) for name in ("indexed-job", "trainjob", *MPI))]
)
def test_it_trains_in_small(overlay):
    with applied(overlay, command=["python", "tests/small_training.py", "2"]) as cluster:
        assert cluster.finish(LIMIT_S) == "Complete", cluster.output()
        assert all(pod.restarts == 0 for pod in cluster.pods)
        for worker in range(2):
            assert re.search(rf"worker {worker} of 2 on \S+ trained, error small", cluster.output()), cluster.output()


@pytest.mark.parametrize("overlay", [*GANGS, *MPI])
def test_it_runs_to_the_end(overlay):
    """A job without TensorFlow, in which every worker must start and succeed."""
    with applied(overlay, command=["sh", "-c", 'echo "$DISTPAD_WORKERS workers as expected"']) as cluster:
        assert cluster.finish(LIMIT_S) == "Complete", cluster.output()
        assert cluster.output().count("2 workers as expected") == 2, cluster.output()
        assert all(pod.restarts == 0 for pod in cluster.pods)
        codes = {pod.host.name: pod.exit_code for pod in cluster.pods}
        assert {code for name, code in codes.items() if "worker" not in name} <= {0, 143}, codes


@wide
@pytest.mark.parametrize("overlay", [pytest.param(name, marks=pytest.mark.smoke) for name in ALL])
def test_it_trains_to_the_end_with_the_certificate_passed(overlay):
    with applied(overlay, *SMALL, "--steps=12") as cluster:
        assert cluster.finish(LIMIT_S) == "Complete", cluster.output()
        assert_trained(cluster, overlay, steps=12)
        assert all(pod.restarts == 0 for pod in cluster.pods)
        codes = {pod.host.name: pod.exit_code for pod in cluster.pods}
        serving = {name: code for name, code in codes.items() if "mpi" in overlay and "launcher" not in name}
        assert set(codes.values()) - {143} == {0} and set(serving.values()) <= {143}, codes
        output = cluster.output()
        assert "passed" in output and "NOT PASSED" not in output, output


# -- a pod is killed --------------------------------------------------------------------------------------------------


@wide
@pytest.mark.parametrize("overlay", RESTARTING)
def test_a_killed_pod_starts_all_again_from_the_last_checkpoint(overlay):
    _, victim = ALL[overlay]
    with applied(overlay, *SMALL, "--steps=200", "--checkpoint-every=5") as cluster:
        cluster.until(lambda: saved(cluster), LIMIT_S)
        cluster.named(victim).signal(signal.SIGKILL)
        assert cluster.finish(LIMIT_S) == "Complete", cluster.output()
        assert_trained(cluster, overlay, steps=200)
        last = begins(cluster, 200)[-1]  # the first training may end before it prints its first step
        assert last >= 5 and last % 5 == 0, cluster.output()
        assert starts(cluster, victim) == 2
        if overlay == "indexed-job":
            assert [pod.exit_code for pod in cluster.pods] == [4, 137, 0, 0]
        assert counted(cluster) == 1


# -- exit codes -------------------------------------------------------------------------------------------------------


@wide
@pytest.mark.parametrize("overlay", [*GANGS, "trainjob-mpi"])
def test_wrong_usage_is_final(overlay):
    with applied(overlay, "--loss=none-such") as cluster:
        assert cluster.finish(LIMIT_S) == "Failed"
        assert "invalid choice: 'none-such'" in cluster.output()
        names = [pod.host.name for pod in cluster.pods]
        assert len(names) == len(set(names)) and not any(pod.restarts for pod in cluster.pods), names
        assert 2 in [pod.exit_code for pod in cluster.pods]


@pytest.mark.parametrize("overlay", ONCE)
def test_a_command_that_is_not_there_is_final(overlay):
    with applied(overlay, command=["none-such"]) as cluster:
        assert cluster.finish(LIMIT_S) == "Failed"
        names = [pod.host.name for pod in cluster.pods]
        assert len(names) == len(set(names)), cluster.output()
        assert {126, 127} & {pod.exit_code for pod in cluster.pods}


@pytest.mark.parametrize("overlay", ["indexed-job", pytest.param("mpijob", marks=wide)])
def test_failures_are_retried_up_to_the_limit(overlay):
    """One worker fails each time, with the code that the Job of an indexed-job does not count from the entry point.

    The limit counts failures, not failed pods.
    """
    rank = "${DISTPAD_RANK:-$OMPI_COMM_WORLD_RANK}"
    code = 4 if overlay == "indexed-job" else 7
    with applied(
        overlay, command=["sh", "-c", f'echo "attempt of rank {rank}"; test {rank} = 0 || exit {code}; sleep 60']
    ) as cluster:
        assert cluster.finish(LIMIT_S) == "Failed"
        line = "[worker 1] attempt of rank 1\n" if overlay == "mpijob" else "attempt of rank 1\n"
        assert cluster.output().count(line) == RESTARTS + 1, cluster.output()
        if overlay == "indexed-job":
            assert cluster.job.reason == "BackoffLimitExceeded"
            assert sorted(pod.exit_code for pod in cluster.pods) == [1] * 2 + [4] * 2
        else:
            assert cluster.named("train-launcher").exit_code == 7


# -- preemption -------------------------------------------------------------------------------------------------------


@wide
@pytest.mark.parametrize("overlay", RESTARTING)
def test_a_preempted_pod_saves_a_checkpoint_first(overlay):
    _, victim = ALL[overlay]
    with applied(overlay, *SMALL, "--steps=250", "--checkpoint-every=7") as cluster:
        cluster.until(lambda: saved(cluster), LIMIT_S)
        cluster.named(victim).evict()
        assert cluster.finish(LIMIT_S) == "Complete", cluster.output()
        assert_trained(cluster, overlay, steps=250)
        assert begins(cluster, 250)[-1] == saved_at_sigterm(cluster), cluster.output()
        (code,) = [pod.exit_code for pod in cluster.pods if pod.disrupted]
        assert code == 143
        assert counted(cluster) == (1 if overlay == "mpijob" else 0)


@wide
@pytest.mark.parametrize("overlay", ["jobset", "trainjob"])
def test_a_jobset_sees_the_preemption_and_no_failure(overlay):
    """All workers end with 143, of which the JobSet counts none: it sees the disrupted pod first."""
    _, victim = ALL[overlay]
    with applied(overlay, *SMALL, "--steps=250", "--checkpoint-every=7") as cluster:
        cluster.until(lambda: saved(cluster), LIMIT_S)
        cluster.named(victim).evict()
        assert cluster.finish(LIMIT_S) == "Failed"
        assert saved(cluster)[-1] == saved_at_sigterm(cluster)
        (job,) = cluster.job.jobs.values()
        assert job.reason == "PodFailurePolicy" and "has condition DisruptionTarget" in job.message


@wide
def test_a_preempted_launcher_saves_a_checkpoint_too():
    with applied("mpijob", *SMALL, "--steps=200", "--checkpoint-every=7") as cluster:
        cluster.until(lambda: saved(cluster), LIMIT_S)
        first = cluster.named("train-launcher")
        first.evict()
        assert cluster.finish(LIMIT_S) == "Complete", cluster.output()
        assert first.exit_code == 143 and begins(cluster, 200)[-1] == saved_at_sigterm(cluster), cluster.output()


def test_a_job_survives_the_node_of_its_launcher():
    again = "/checkpoints/again-$OMPI_COMM_WORLD_RANK"
    command = ["sh", "-c", f"test -e {again} && exit; touch {again}; echo first; sleep 100"]
    with applied("mpijob", command=command) as cluster:
        cluster.until(lambda: cluster.output().count("] first") == 2, LIMIT_S)
        cluster.named("train-launcher").evict()
        assert cluster.finish(LIMIT_S) == "Complete", cluster.output()
        assert starts(cluster, "train-launcher") == 2 and counted(cluster) == 1
        assert starts(cluster, "train-worker-0") == 1


# -- a pod does not come ----------------------------------------------------------------------------------------------


def test_a_missing_peer_is_named_and_counts():
    _, absent = ALL["indexed-job"]
    with applied("indexed-job", command=["true"], wait_s=4) as cluster:
        cluster.unschedulable.add(absent)
        cluster.until(lambda: len(cluster.pods) == 2, LIMIT_S)
        first = cluster.pods[0]
        assert first.exit_code == 3 and re.search(rf"missing after 4 s: {absent}\.train", first.log), first.log
        assert counted(cluster) == 1
        cluster.unschedulable.clear()
        assert cluster.finish(LIMIT_S) == "Complete", cluster.output()


def test_a_missing_worker_of_an_elastic_job_is_waited_for():
    with applied("mpijob-elastic", command=["true"], workers=1) as cluster:
        cluster.unschedulable.add("train-worker-0")
        cluster.until(lambda: cluster.pods, LIMIT_S)
        with pytest.raises(TimeoutError):
            cluster.until(lambda: cluster.named("train-launcher").ended, 3)
        cluster.unschedulable.clear()
        assert cluster.finish(LIMIT_S) == "Complete", cluster.output()


# -- elastic ----------------------------------------------------------------------------------------------------------


@wide
@pytest.mark.parametrize("way", ["killed", "deleted"])
def test_an_elastic_job_loses_and_regains_a_pod(way):
    """All present workers certify themselves at the start of each world."""
    with applied("mpijob-elastic", *SMALL, "--steps=1500", "--commit-every=5", workers=2) as cluster:

        def certified(workers):
            """The number of certificates with this number of workers."""
            launchers = [pod.log for pod in cluster.pods if pod.host.name == "train-launcher"]
            return "".join(launchers).count(f"{workers} replicas on {workers} workers")

        cluster.until(lambda: certified(2), LIMIT_S)
        victim = cluster.named("train-worker-1")
        victim.signal(signal.SIGKILL) if way == "killed" else victim.delete()
        cluster.until(lambda: certified(1), LIMIT_S)
        cluster.until(lambda: certified(2) == 2, LIMIT_S)
        assert cluster.finish(LIMIT_S) == "Complete", cluster.output()
        assert_trained(cluster, "mpijob-elastic", steps=1500, replicas=2)
        assert starts(cluster, "train-launcher") == 1 and starts(cluster, "train-worker-1") == 2
