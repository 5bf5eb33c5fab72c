"""`distpad pod` in pods: network namespaces with the files and variables of Kubernetes and its operators."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

import needs
from cluster import hosts, pods
from launched import QUICK, WORKER

HERE = pathlib.Path(__file__).resolve().parent
SUMMING = HERE / "summing.py"
POD = [sys.executable, "-m", "distpad", "pod"]
FLAGS = ("--grace-s", "2", "--wait-s", "60")
TRAINING_LIMIT_S = 240

pytestmark = pytest.mark.timeout(500)


# -- pods that are started as a Job's and a JobSet's ------------------------------------------------------------------


def of_job(index: int, workers: int) -> dict[str, str]:
    """The variables of a pod of the Indexed Job "train"."""
    return {
        "JOB_COMPLETION_INDEX": str(index),
        "POD_NAMESPACE": pods.NAMESPACE,
        "DISTPAD_JOB_NAME": "train",
        "DISTPAD_SERVICE": "workers",
        "DISTPAD_WORKERS": str(workers),
    }


def of_jobset(index: int, workers: int) -> dict[str, str]:
    """The variables of a pod of the JobSet "train" with the replicated job "node"."""
    return {
        "JOB_COMPLETION_INDEX": str(index),
        "DISTPAD_JOBSET_NAME": "train",
        "DISTPAD_REPLICATED_JOB": "node",
        "DISTPAD_JOB_INDEX": "0",
        "DISTPAD_WORKERS": str(workers),
    }


# kind | host names | Service | variables
KINDS = {
    "indexed-job": ("train-{}", "workers", of_job),
    "jobset": ("train-node-0-{}", "train", of_jobset),
    "trainjob": ("train-node-0-{}", "train", of_jobset),
}


@contextlib.contextmanager
def job(kind: str, count: int, mounts=()):
    """Pods, and a function that starts the entry point in each."""
    name, service, variables = KINDS[kind]
    with pods.up([name.format(index) for index in range(count)], service=service, mounts=mounts) as up:

        def start(index: int, *command, flags=FLAGS, **env) -> subprocess.Popen:
            argv = [*POD, kind, *flags, "--", *map(str, command)]
            return up[index].popen(argv, {**variables(index, count), **QUICK, **env})

        yield up, start


def scripted(*words) -> list:
    return [sys.executable, WORKER, *words]


def finish(*processes: subprocess.Popen, limit_s: float = 120) -> tuple[list[int], list[str]]:
    """Wait for the processes, and return their exit codes and outputs."""
    end = time.monotonic() + limit_s
    outputs = [process.communicate(timeout=max(1, end - time.monotonic()))[0] for process in processes]
    return [process.returncode for process in processes], outputs


def wait_for(process: subprocess.Popen, words: str, limit_s: float = 120) -> None:
    """Read the process's output up to a line with these words."""
    end, lines = time.monotonic() + limit_s, []
    while time.monotonic() < end:
        lines.append(process.stdout.readline())
        if words in lines[-1]:
            return
        assert lines[-1], "".join(lines)
    raise TimeoutError("".join(lines))


# -- the training's environment ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["indexed-job", "jobset", pytest.param("trainjob", marks=pytest.mark.wide)])
def test_the_training_gets_its_topology_variables_and_secrets(kind, tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "API_KEY").write_text("s3cret\n")
    (tmp_path / "..data").mkdir()  # as the kubelet makes it
    with job(kind, 3, mounts=[pods.Mount("/run/secrets/distpad", tmp_path, "ro")]) as (_, start):
        codes, outputs = finish(*(start(i, *scripted("all=report"), MINE="x y") for i in range(3)))
    name, service, _ = KINDS[kind]
    behind = f"{service}.{pods.NAMESPACE}.svc" if kind == "indexed-job" else service
    for index, text in enumerate(outputs):
        assert f'{{\\"type\\": \\"worker\\", \\"index\\": {index}}}' in text
        assert '"MINE": "x y"' in text and '"API_KEY": "s3cret"' in text
        for other in range(3):
            assert f"{name.format(other)}.{behind}:2222" in text
        assert '"DISTPAD_WORKERS": "3"' in text and '"DISTPAD_HOSTS": "3"' in text
    assert codes == [0, 0, 0]


# -- pods that do not come --------------------------------------------------------------------------------------------


def test_a_pod_that_is_not_there_is_named():
    with job("indexed-job", 3) as (_, start):
        began = time.monotonic()
        limits = {0: 12, 2: 15}  # pod 2 starts in time and ends later, also on a busy machine
        script = scripted("all=sleep:600")
        started = [start(i, *script, flags=("--wait-s", str(limit))) for i, limit in limits.items()]
        codes, outputs = finish(*started, limit_s=120)
    assert codes == [3, 3] and time.monotonic() < began + 100
    for words in ("waiting for", "missing after 12 s:"):
        assert f"{words} train-1.workers.default.svc\n" in outputs[0], outputs
    assert re.search(r"missing after 15 s: (the pods that )?train-0\.workers", outputs[1]), outputs


# -- ends -------------------------------------------------------------------------------------------------------------


def test_an_exit_code_arrives():
    with job("indexed-job", 3) as (up, start):
        codes, outputs = finish(*(start(i, *scripted("1=exit:42", "all=sleep:600")) for i in range(3)), limit_s=120)
        assert [pod.host.processes() for pod in up] == [[], [], []]
    assert codes == [4, 42, 4], outputs
    assert "train-1.workers.default.svc failed or was lost: this worker ends with it" in outputs[2]


# A Job ignores exit code 4, and a JobSet's pod waits after 143 for the end of another pod.
@pytest.mark.parametrize(("kind", "code", "expected"), [("indexed-job", 4, 1), ("jobset", 143, 1), ("jobset", 4, 4)])
def test_codes_that_the_entry_point_uses_itself(kind, code, expected):
    with job(kind, 1) as (_, start):
        codes, outputs = finish(start(0, *scripted(f"0=exit:{code}")))
    assert codes == [expected], outputs


def test_nobody_succeeds_before_all_have():
    with job("indexed-job", 2) as (_, start):
        began = time.monotonic()
        codes, outputs = finish(*(start(i, *scripted("1=sleep:3")) for i in range(2)))
        assert codes == [0, 0] and time.monotonic() > began + 3, outputs
        for failing in range(2):
            words = scripted(f"{failing}=sleep:2", f"{failing}=exit:9")
            codes, outputs = finish(*(start(i, *words) for i in range(2)))
            assert (codes[failing], codes[1 - failing]) == (9, 4), outputs


def test_others_that_do_not_finish():
    with job("indexed-job", 2) as (_, start):
        flags = (*FLAGS, "--finish-s", "2")
        codes, outputs = finish(*(start(i, *scripted("1=sleep:600"), flags=flags) for i in range(2)), limit_s=120)
    assert codes == [124, 4] and "another one is not after 2 s" in outputs[0]


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.wide)])
def test_a_pod_that_is_killed(lost):
    with job("indexed-job", 2) as (up, start):
        running = [start(i, *scripted("all=ignore-terms", "all=sleep:600")) for i in range(2)]
        wait_for(running[1 - lost], "ignoring")
        up[lost].kill()
        codes, outputs = finish(*running, limit_s=120)
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 4
    assert f"train-{lost}.workers.default.svc failed or was lost" in outputs[1 - lost]


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["indexed-job", "jobset"])
def test_a_pod_that_is_killed_in_training(kind):
    """TensorFlow itself ends the other worker of a JobSet, which does not hang."""
    with job(kind, 2) as (up, start):
        running = [start(i, sys.executable, SUMMING, 1000, 0.2) for i in range(2)]
        wait_for(running[0], "step 2", TRAINING_LIMIT_S)
        up[1].kill()
        codes, outputs = finish(*running, limit_s=120)
    assert codes[0] == (4 if kind == "indexed-job" else 1), outputs


def test_a_pod_that_is_cut_off():
    with job("indexed-job", 2) as (up, start):
        running = [start(i, *scripted("all=write:1", "all=sleep:600")) for i in range(2)]
        wait_for(running[0], "line 0")
        up[1].host.cut()
        codes, outputs = finish(*running, limit_s=120)  # both detect the silence
    assert codes == [4, 4], outputs


def test_a_replaced_pod_waits_until_all_are_replaced():
    with job("indexed-job", 2) as (up, start):
        flags = ("--grace-s", "4", "--wait-s", "40")
        first = start(0, *scripted("all=ignore-terms", "all=sleep:600"), flags=flags)
        start(1, *scripted("all=sleep:600"))
        wait_for(first, "ignoring")
        up[1].kill()
        second = start(1, *scripted("all=exit:0"), flags=flags)  # while the first pod still trains
        codes, outputs = finish(first)
        assert codes == [4], outputs
        codes, outputs = finish(start(0, *scripted("all=exit:0")), second)
    assert codes == [0, 0], outputs


def at_sigterm(code: int) -> list:
    """A training that ends with a given code at SIGTERM."""
    program = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(CODE)); print('up'); time.sleep(600)"
    return [sys.executable, "-uc", program.replace("CODE", str(code))]


def test_all_workers_end_with_143_and_one_pod_got_sigterm():
    """distpad.Preemption ends all workers at one step, so the other pod's may end first."""
    with job("indexed-job", 2) as (_, start):
        other = start(0, "sh", "-c", "echo up; sleep 1; exit 143")
        running = start(1, "sh", "-c", "trap 'sleep 3; exit 143' TERM; echo up; while :; do sleep 0.1; done")
        for process in (other, running):
            wait_for(process, "up")
        running.terminate()
        codes, outputs = finish(other, running, limit_s=120)
    assert codes == [4, 143], outputs
    assert "got SIGTERM: forwarding it to the training" in outputs[1]


@pytest.mark.parametrize(("code", "expected"), [(77, 77), (0, 143)])  # a training that stops early is not done
def test_sigterm_reaches_the_training(code, expected):
    with job("jobset", 1) as (_, start):
        running = start(0, *at_sigterm(code))
        wait_for(running, "up")
        running.terminate()
        assert finish(running)[0] == [expected]


def test_sigterm_while_the_training_starts():
    """The signal arrives when the training runs already, but its start has not returned."""
    program = """
import asyncio, os, signal, subprocess
from distpad.launcher import pod, podrun

class Interrupted(subprocess.Popen):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        os.kill(os.getpid(), signal.SIGTERM)

subprocess.Popen = Interrupted
print(asyncio.run(podrun.work(pod.Member(0, ("train",)), ["sleep", "100"], dict(os.environ))))
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "143\n")


def test_sigterm_while_it_waits():
    with job("indexed-job", 2) as (_, start):
        waiting = start(0, *scripted("all=exit:0"))
        wait_for(waiting, "waits for the others")
        waiting.terminate()
        codes, _ = finish(waiting)
    assert codes == [143]


def test_a_command_that_is_not_there():
    with job("indexed-job", 1) as (_, start):
        codes, outputs = finish(start(0, "no-such-command"))
    assert codes == [127] and "cannot start no-such-command" in outputs[0]


def test_settings_that_are_missing():
    with job("indexed-job", 1) as (_, start):
        codes, outputs = finish(start(0, "true", DISTPAD_WORKERS=""))
    assert codes == [2] and "pod: DISTPAD_WORKERS is" in outputs[0]


# -- MPI --------------------------------------------------------------------------------------------------------------

NAMES = ("train-launcher", "train-worker-0", "train-worker-1")
MPI_HOSTS = [f"{name}.train.{pods.NAMESPACE}.svc" for name in NAMES[1:]]
# the variables that the MPI operator sets on the launcher (pkg/controller/mpi_job_controller.go of v0.8)
OPERATOR = {
    "K_MPI_JOB_ROLE": "launcher",
    "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
    "OMPI_MCA_orte_set_default_slots": "1",
    "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
    "NVIDIA_VISIBLE_DEVICES": "",
    "NVIDIA_DRIVER_CAPABILITIES": "",
}


class MpiJob:
    """The pods of an MPIJob "train" with two workers, and the operator's mounts."""

    def __init__(self, up, folder: pathlib.Path) -> None:
        (self.launcher, *self.workers), self.folder = up, folder
        self.sshds: list[subprocess.Popen] = []

    def start_workers(self, *which: int) -> None:
        for index in which:
            argv = [*POD, "mpi-worker"]
            self.sshds.append(self.workers[index].popen(argv, {"K_MPI_JOB_ROLE": "worker", **QUICK}))

    def discover(self, *which: int) -> None:
        """Write the operator's discovery script for the running pods."""
        script = self.folder / "mpi" / "discover_hosts.sh"
        fresh = script.with_suffix(".new")
        fresh.write_text("#!/bin/sh\n" + "".join(f"echo {MPI_HOSTS[i]}\n" for i in which))
        fresh.chmod(0o555)
        os.replace(fresh, script)

    def start(self, kind: str, *command, flags=(), **env) -> subprocess.Popen:
        mounted = self.folder / "mpi"
        operator_env = {**OPERATOR, "OMPI_MCA_orte_default_hostfile": str(mounted / "hostfile"), "DISTPAD_WORKERS": "2"}
        where = ("--host-discovery-script", mounted / "discover_hosts.sh")
        argv = [*POD, kind, *FLAGS, *where, *flags, "--", *map(str, command)]
        return self.launcher.popen(argv, {**operator_env, **QUICK, **env})


@pytest.fixture
def mpi_job():
    needs.program("mpirun")
    with tempfile.TemporaryDirectory(prefix="distpad-mpi-job-") as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        keys, mounted = folder / "ssh", folder / "mpi"
        keys.mkdir()
        mounted.mkdir()
        # the operator creates an ECDSA key named id_rsa; a Secret's files belong to root, and the fsGroup can read them
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-N", "", "-C", "", "-f", keys / "id_rsa"], check=True
        )
        shutil.copy(keys / "id_rsa.pub", keys / "authorized_keys")
        for file in keys.iterdir():
            os.chown(file, 0, hosts.USER)
            file.chmod(0o440)
        (mounted / "hostfile").write_text("".join(f"{host} slots=1\n" for host in MPI_HOSTS))
        secrets = folder / "secrets"
        secrets.mkdir()
        (secrets / "API_KEY").write_text("s3cret\n")
        mounts = [pods.Mount(str(folder), folder), pods.Mount("/etc/mpi-ssh", keys, "ro")]
        mounts.append(pods.Mount("/run/secrets/distpad", secrets, "ro"))
        with pods.up(NAMES, service="train", mounts=mounts) as up:
            yield MpiJob(up, folder)


HOROVOD = [sys.executable, "-m", "distpad", "certify", "--replicas", "2", "--cases", "2"]


@pytest.mark.wide
def test_mpirun_over_ssh_as_an_ordinary_user(mpi_job):
    mpi_job.start_workers(0, 1)
    codes, outputs = finish(mpi_job.start("mpi-launcher", *HOROVOD), limit_s=TRAINING_LIMIT_S)
    assert codes == [0], outputs
    assert "2 replicas on 2 workers" in outputs[0] and "NOT PASSED" not in outputs[0]


def test_variables_and_secrets_reach_mpi_workers_and_an_exit_code_arrives(mpi_job):
    mpi_job.start_workers(0, 1)
    command = scripted("0=report", "1=sleep:1", "1=exit:42", "0=sleep:600")
    codes, outputs = finish(mpi_job.start("mpi-launcher", *command, MINE="x y"))
    assert codes == [42], outputs
    assert '"MINE": "x y"' in outputs[0] and '"API_KEY": "s3cret"' in outputs[0], outputs


def test_an_mpi_worker_pod_that_is_killed(mpi_job):
    mpi_job.start_workers(0, 1)
    running = mpi_job.start("mpi-launcher", *scripted("all=write:1", "all=sleep:600"))
    wait_for(running, "line 0")
    mpi_job.workers[1].kill()
    codes, outputs = finish(running, limit_s=120)
    assert codes == [4] and f"{MPI_HOSTS[1]} was lost" in outputs[0], outputs


def test_sigterm_at_the_mpi_launcher(mpi_job):
    mpi_job.start_workers(0, 1)
    running = mpi_job.start("mpi-launcher", *scripted("all=write:1", "all=sleep:600"))
    wait_for(running, "line 0")
    running.terminate()
    codes, outputs = finish(running, limit_s=120)
    assert codes == [143], outputs


def test_ssh_checks_host_keys(mpi_job):
    """The key of a host is the operator's, and no other is accepted."""
    mpi_job.start_workers(0)
    wait_for(mpi_job.sshds[0], "Server listening")
    for options, code in ((), 0), (("-o", "KnownHostsCommand=none"), 255):
        done = mpi_job.launcher.run(["ssh", *options, MPI_HOSTS[0], "echo there"])
        assert (done.returncode, "there" in done.stdout) == (code, not code), done.stdout


def test_sigterm_at_an_mpi_worker(mpi_job):
    """The training gets the signal and has time to save. The job ends with the training's exit code."""
    mpi_job.start_workers(0, 1)
    running = mpi_job.start("mpi-launcher", *at_sigterm(77))
    wait_for(running, "[worker 1] up")
    mpi_job.sshds[1].terminate()
    codes, outputs = finish(running, mpi_job.sshds[1], limit_s=120)
    assert codes == [77, 143], outputs
    assert f"worker 1 on {MPI_HOSTS[1]} failed first (exit code 77)" in outputs[0]
    assert "got SIGTERM: forwarding it to 1 workers" in outputs[1]


def test_a_new_launcher_waits_for_the_training_of_the_old_one(mpi_job):
    """A Job replaces the pod of a drained node before that pod has ended."""
    mpi_job.start_workers(0, 1)
    # worker 1 speaks some time after both have begun: one that SIGTERM finds without a trap would end the other
    saving = "trap 'sleep 6; echo saved; exit 143' TERM; sleep 2; echo up; while :; do sleep 0.1; done"
    first = mpi_job.start("mpi-launcher", "sh", "-c", saving, flags=("--grace-s", "20"))
    wait_for(first, "[worker 1] up")
    first.terminate()
    codes, outputs = finish(first, mpi_job.start("mpi-launcher", "true"))
    assert codes == [143, 0] and "saved" in outputs[0], outputs
    assert "waiting for the training of an earlier launcher to end on" in outputs[1], outputs


def test_an_mpi_worker_that_is_not_there_is_named(mpi_job):
    mpi_job.start_workers(0)
    codes, outputs = finish(mpi_job.start("mpi-launcher", *HOROVOD, flags=("--wait-s", "3")), limit_s=120)
    assert codes == [3] and f"{MPI_HOSTS[1]} cannot be used: no ssh server listens there" in outputs[0], outputs


def test_a_hostfile_with_other_pods_than_promised(mpi_job):
    codes, outputs = finish(mpi_job.start("mpi-launcher", *HOROVOD, DISTPAD_WORKERS="3"))
    assert codes == [2] and "DISTPAD_WORKERS is 3" in outputs[0] and MPI_HOSTS[1] in outputs[0]


@pytest.mark.wide
def test_an_elastic_job_by_the_operators_script(mpi_job):
    """The script prints the running hosts, without slots: at first one of two."""
    mpi_job.discover()
    mpi_job.start_workers(0, 1)
    running = mpi_job.start("mpi-elastic-launcher", *HOROVOD, flags=("--min-np", "2"), DISTPAD_SLOTS="1")
    time.sleep(2)
    mpi_job.discover(0, 1)
    codes, outputs = finish(running, limit_s=TRAINING_LIMIT_S)
    assert codes == [0], outputs
    assert "2 replicas on 2 workers" in outputs[0]


def test_an_elastic_job_without_pods(mpi_job):
    mpi_job.discover()
    codes, outputs = finish(mpi_job.start("mpi-elastic-launcher", *HOROVOD, flags=("--wait-s", "2"), DISTPAD_SLOTS="1"))
    assert codes == [3] and "no hosts were found" in outputs[0], outputs
