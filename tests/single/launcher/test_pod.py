"""What a pod works out from its environment: who it is, who the others are, and which job it launches."""

from __future__ import annotations

import functools

import pytest
import tensorflow as tf

from distpad.launcher import outcomes, pod, spec

JOB = {
    "JOB_COMPLETION_INDEX": "1",
    "DISTPAD_JOB_NAME": "train",
    "DISTPAD_SERVICE": "workers",
    "DISTPAD_WORKERS": "3",
}
JOBSET = {
    "JOB_COMPLETION_INDEX": "1",
    "DISTPAD_JOBSET_NAME": "train",
    "DISTPAD_REPLICATED_JOB": "node",
    "DISTPAD_JOB_INDEX": "0",
    "DISTPAD_WORKERS": "4",
}


# -- workers ----------------------------------------------------------------------------------------------------------


def test_a_pod_of_an_indexed_job():
    found = pod.member("indexed-job", JOB, 2222)
    assert (found.index, found.port) == (1, 2222)
    assert found.names == ("train-0.workers", "train-1.workers", "train-2.workers")


def test_the_namespace_is_part_of_the_names():
    assert pod.member("indexed-job", {**JOB, "POD_NAMESPACE": "team"}, 2222).names[1] == "train-1.workers.team.svc"


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_a_pod_of_a_jobset(kind):
    found = pod.member(kind, JOBSET, 3000)
    assert found.names == tuple(f"train-node-0-{each}.train" for each in range(4))
    assert (found.index, found.port) == (1, 3000)


def test_what_a_training_gets(monkeypatch):
    env = pod.member("indexed-job", JOB, 2222).env({"MINE": "x", "TF_CONFIG": "old"})
    monkeypatch.setenv("TF_CONFIG", env["TF_CONFIG"])
    read = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    assert (read.task_type, read.task_id, read.cluster_spec().jobs) == ("worker", 1, ["worker"])
    assert read.cluster_spec().job_tasks("worker") == [f"train-{i}.workers:2222" for i in range(3)]
    assert env["MINE"] == "x"
    expected = {name: env[f"DISTPAD_{name}"] for name in ("BACKEND", "WORKERS", "HOSTS", "RANK")}
    assert expected == {"BACKEND": "multiworker", "WORKERS": "3", "HOSTS": "3", "RANK": "1"}


@pytest.mark.parametrize("name", JOB)
def test_a_missing_variable_says_who_sets_it(name):
    with pytest.raises(ValueError, match=f"pod: {name} is not set: .+ sets it"):
        pod.member("indexed-job", {**JOB, name: ""}, 2222)


@pytest.mark.parametrize("name", ["DISTPAD_JOBSET_NAME", "DISTPAD_REPLICATED_JOB", "DISTPAD_JOB_INDEX"])
def test_a_missing_label_is_named(name):
    with pytest.raises(ValueError, match=rf"pod: {name} is not set: .+ from the label jobset\.sigs\.k8s\.io/"):
        pod.member("jobset", {**JOBSET, name: ""}, 2222)


@pytest.mark.parametrize("workers", ["0", "two", "-1", "1.5"])
def test_a_number_that_is_none(workers):
    with pytest.raises(ValueError, match=r"pod: DISTPAD_WORKERS is '.+', expected an integer from 1\."):
        pod.member("indexed-job", {**JOB, "DISTPAD_WORKERS": workers}, 2222)


def test_numbers_that_do_not_go_together():
    for index in ("3", "-1", "x"):
        with pytest.raises(ValueError, match=rf"train-{index}.workers, expected one of the 3 .* to train-2.workers\."):
            pod.member("indexed-job", {**JOB, "JOB_COMPLETION_INDEX": index}, 2222)
    with pytest.raises(ValueError, match=r"this pod's name is train-node-2-1.train, expected one of the 4"):
        pod.member("jobset", {**JOBSET, "DISTPAD_JOB_INDEX": "2"}, 2222)


# -- MPI --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hostfile(tmp_path):
    (tmp_path / "hostfile").write_text("t-worker-0.t.ns.svc slots=2\nt-worker-1.t.ns.svc slots=2\n")
    return {"OMPI_MCA_orte_default_hostfile": str(tmp_path / "hostfile")}


launcher = functools.partial(pod.mpi_job, "mpi-launcher", command=("train",))
elastic = functools.partial(pod.mpi_job, "mpi-elastic-launcher", command=("train",))


def test_the_job_of_an_operators_host_file(hostfile):
    job = launcher({**hostfile, "DISTPAD_WORKERS": "2"}, secret=("KEY=/run/key",))
    assert job.hosts == (spec.Host("t-worker-0.t.ns.svc", 2), spec.Host("t-worker-1.t.ns.svc", 2))
    assert (job.np, job.launcher, job.backend, job.network_interface) == (4, "mpirun", "horovod", "eth0")
    assert job.secret == ("KEY=/run/key",) and job.max_restarts == 0  # the launcher's Job restarts its pod
    assert launcher({**hostfile, "DISTPAD_GPUS": "2"}).gpus == 2 and job.gpus == 0
    assert launcher({**hostfile, "NCCL_SOCKET_IFNAME": "net1"}).network_interface == "net1"


def test_the_operators_variable_tells_where_its_host_file_is(hostfile):
    assert launcher(hostfile).np == 4
    with pytest.raises(ValueError, match="/etc/mpi/hostfile cannot be read"):
        launcher({})


def test_a_host_file_with_another_number_of_pods(hostfile):
    with pytest.raises(ValueError, match=r"DISTPAD_WORKERS is 3, expected .+ names 2: t-worker-0\.t\.ns\.svc, "):
        launcher({**hostfile, "DISTPAD_WORKERS": "3"})


def test_an_elastic_job():
    job = elastic({"DISTPAD_WORKERS": "3", "DISTPAD_SLOTS": "2"})
    assert (job.min_np, job.max_np, job.slots_per_host, job.launcher) == (2, 6, 2, "horovodrun")
    assert job.host_discovery_script == "/etc/mpi/discover_hosts.sh"
    with pytest.raises(ValueError, match=r"DISTPAD_SLOTS is not set: .+ which the discovery script leaves out"):
        elastic({"DISTPAD_WORKERS": "3"})


# -- secrets ----------------------------------------------------------------------------------------------------------


def test_each_file_of_a_folder_is_a_secret(tmp_path):
    (tmp_path / "API_KEY").write_text("x")
    (tmp_path / "..data").mkdir()  # Kubernetes's own
    assert pod.secret_files(str(tmp_path)) == (f"API_KEY={tmp_path}/API_KEY",)
    assert pod.secret_files(str(tmp_path / "none")) == ()
    with pytest.raises(ValueError, match=r"pod: .+/API_KEY cannot be read: Not a directory"):
        pod.secret_files(str(tmp_path / "API_KEY"))


# -- words ------------------------------------------------------------------------------------------------------------


def test_few_names_are_shown():
    assert outcomes.few(["a", "b"]) == "a, b"
    assert outcomes.few([str(i) for i in range(20)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
