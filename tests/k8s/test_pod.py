"""`distpad pod` in pods: network namespaces with the files and variables of Kubernetes and its operators."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time

import pytest

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
GANGS = {
    "indexed-job": ("train-{}", "workers", of_job),
    "jobset": ("train-node-0-{}", "train", of_jobset),
    "trainjob": ("train-node-0-{}", "train", of_jobset),
}


@contextlib.contextmanager
def gang(kind: str, count: int, workers: int | None = None):
    """Pods, and a function that starts the entry point in each."""
    name, service, variables = GANGS[kind]
    with pods.up([name.format(index) for index in range(count)], service=service) as up:

        def start(index: int, *command, flags=FLAGS, **env) -> subprocess.Popen:
            argv = [*POD, kind, *flags, "--", *map(str, command)]
            return up[index].popen(argv, {**variables(index, workers or count), **QUICK, **env})

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


# -- the world --------------------------------------------------------------------------------------------------------


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["indexed-job", "jobset"])
def test_workers_sum(kind):
    """TensorFlow trains as an ordinary user, who can write only to /tmp."""
    with gang(kind, 2) as (_, start):
        codes, outputs = finish(*(start(i, sys.executable, SUMMING, 3) for i in range(2)), limit_s=TRAINING_LIMIT_S)
    assert codes == [0, 0], outputs
    assert [f"worker {i} of 2 sums" in outputs[i] for i in range(2)] == [True, True] and "step 2" in outputs[1]


@pytest.mark.parametrize("kind", ["indexed-job", "jobset", pytest.param("trainjob", marks=pytest.mark.wide)])
def test_what_the_training_is_told(kind):
    with gang(kind, 3) as (_, start):
        codes, outputs = finish(*(start(i, *scripted("all=report"), MINE="x y") for i in range(3)))
    name, service, _ = GANGS[kind]
    behind = f"{service}.{pods.NAMESPACE}.svc" if kind == "indexed-job" else service
    for index, text in enumerate(outputs):
        assert f'{{\\"type\\": \\"worker\\", \\"index\\": {index}}}' in text and '"MINE": "x y"' in text
        for other in range(3):
            assert f"{name.format(other)}.{behind}:2222" in text
        assert '"DISTPAD_WORKERS": "3"' in text and '"DISTPAD_HOSTS": "3"' in text
    assert codes == [0, 0, 0]


# -- peers that do not come -------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_there_is_named():
    with gang("indexed-job", 3) as (_, start):
        began = time.monotonic()
        flags = ("--wait-s", "12")  # enough for both other pods to start on a busy machine
        codes, outputs = finish(*(start(i, *scripted("all=sleep:600"), flags=flags) for i in (0, 2)), limit_s=120)
    assert codes == [3, 3] and time.monotonic() < began + 100
    assert all("missing after 12 s: train-1.workers.default.svc\n" in text for text in outputs), outputs


@pytest.mark.wide  # like a missing pod
def test_a_peer_that_nobody_knows_is_named():
    with gang("indexed-job", 2, workers=3) as (_, start):
        codes, outputs = finish(*(start(i, *scripted("all=sleep:600"), flags=("--wait-s", "8")) for i in range(2)))
    assert codes == [3, 3]
    assert all("8 s: train-2.workers.default.svc (name does not resolve)" in text for text in outputs), outputs


@pytest.mark.wide  # like any other pod
def test_the_first_pod_is_not_there():
    with gang("jobset", 2) as (_, start):
        codes, outputs = finish(start(1, *scripted("all=sleep:600"), flags=("--wait-s", "8")))
    assert codes == [3] and "train-node-0-0.train (no answer on port 2223)" in outputs[0]


def test_pods_that_come_late():
    with gang("indexed-job", 2) as (_, start):
        second = start(1, *scripted("all=exit:0"))
        time.sleep(3)
        codes, outputs = finish(start(0, *scripted("all=exit:0")), second)
    assert codes == [0, 0], outputs


def test_pods_that_were_told_different_numbers():
    with gang("indexed-job", 3) as (_, start):
        first = start(0, *scripted("all=exit:0"), DISTPAD_WORKERS="2", flags=("--wait-s", "5"))
        codes, outputs = finish(start(1, *scripted("all=exit:0")), first)
    first, second = (f"train-{i}.workers.default.svc" for i in range(2))
    assert (
        codes == [2, 3] and f"pod: {first} is configured for 2 workers, {second} for 3, expected the same" in outputs[0]
    )


# -- ends -------------------------------------------------------------------------------------------------------------


def test_an_exit_code_arrives():
    with gang("indexed-job", 3) as (up, start):
        codes, outputs = finish(*(start(i, *scripted("1=exit:42", "all=sleep:600")) for i in range(3)), limit_s=120)
        assert [pod.host.processes() for pod in up] == [[], [], []]
    assert codes == [4, 42, 4], outputs
    assert "train-1.workers.default.svc failed (exit code 42): the training cannot continue" in outputs[2]


def test_nobody_succeeds_before_all_have():
    with gang("indexed-job", 2) as (_, start):
        began = time.monotonic()
        codes, outputs = finish(*(start(i, *scripted("1=sleep:3")) for i in range(2)))
        assert codes == [0, 0] and time.monotonic() > began + 3, outputs
        codes, outputs = finish(*(start(i, *scripted("1=sleep:2", "1=exit:9")) for i in range(2)))
        assert codes == [4, 9] and "this worker was done, but restarts with the others" in outputs[0]


def test_others_that_do_not_finish():
    with gang("indexed-job", 2) as (_, start):
        flags = (*FLAGS, "--finish-s", "2")
        codes, outputs = finish(*(start(i, *scripted("1=sleep:600"), flags=flags) for i in range(2)), limit_s=120)
    assert codes == [124, 4] and "another one is not after 2 s" in outputs[0]


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.wide)])
def test_a_pod_that_is_killed(lost):
    with gang("indexed-job", 2) as (up, start):
        running = [start(i, *scripted("all=ignore-terms", "all=sleep:600")) for i in range(2)]
        wait_for(running[1 - lost], "ignoring")
        up[lost].kill()
        codes, outputs = finish(*running, limit_s=120)
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 4
    assert f"train-{lost}.workers.default.svc was lost: the training cannot continue" in outputs[1 - lost]


@pytest.mark.wide
def test_a_pod_that_is_killed_in_training():
    """TensorFlow's own error or the time limit ends the job; it does not hang."""
    with gang("indexed-job", 2) as (up, start):
        running = [start(i, sys.executable, SUMMING, 1000, 0.2) for i in range(2)]
        wait_for(running[0], "step 2", TRAINING_LIMIT_S)
        up[1].kill()
        codes, outputs = finish(*running, limit_s=120)
    assert codes[0] != 0 and "train-1.workers.default.svc was lost" in outputs[0], outputs


def test_a_pod_that_is_cut_off():
    with gang("indexed-job", 2) as (up, start):
        running = [start(i, *scripted("all=write:1", "all=sleep:600")) for i in range(2)]
        wait_for(running[0], "line 0")
        up[1].host.cut()
        codes, outputs = finish(*running, limit_s=120)  # both detect the silence
    assert codes == [4, 4], outputs
    assert "train-1.workers.default.svc was lost" in outputs[0] and "train-0.workers.default.svc was lost" in outputs[1]


def test_a_replaced_pod_waits_until_all_are_replaced():
    with gang("indexed-job", 2) as (up, start):
        flags = ("--grace-s", "4", "--wait-s", "40")
        first = start(0, *scripted("all=ignore-terms", "all=sleep:600"), flags=flags)
        start(1, *scripted("all=sleep:600"))
        wait_for(first, "ignoring")
        up[1].kill()
        second = start(1, *scripted("all=exit:0"), flags=flags)  # while the first pod still belongs to the old gang
        codes, outputs = finish(first)
        assert codes == [4], outputs
        codes, outputs = finish(start(0, *scripted("all=exit:0")), second)
    assert codes == [0, 0], outputs


def at_sigterm(code: int) -> list:
    """A training that ends with a given code at SIGTERM."""
    program = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(CODE)); print('up'); time.sleep(600)"
    return [sys.executable, "-uc", program.replace("CODE", str(code))]


def test_sigterm_is_passed_on_to_all():
    with gang("indexed-job", 2) as (_, start):
        running = [start(i, *at_sigterm(77)) for i in range(2)]
        for process in running:
            wait_for(process, "up")
        running[1].terminate()
        codes, outputs = finish(*running, limit_s=120)
    assert codes == [4, 77], outputs  # the first pod got no SIGTERM from Kubernetes
    assert (
        "got SIGTERM: forwarding it to the training" in outputs[1]
        and "train-1.workers.default.svc is being terminated" in outputs[0]
    )


def test_a_training_that_stops_at_sigterm_is_not_done():
    with gang("indexed-job", 1) as (_, start):
        running = start(0, *at_sigterm(0))
        wait_for(running, "up")
        running.terminate()
        assert finish(running)[0] == [143]


def test_sigterm_while_it_waits():
    with gang("indexed-job", 2) as (_, start):
        waiting = start(0, *scripted("all=exit:0"))
        wait_for(waiting, "waiting for train-1")
        waiting.terminate()
        codes, _ = finish(waiting)
    assert codes == [143]


def test_a_command_that_is_not_there():
    with gang("indexed-job", 1) as (_, start):
        codes, outputs = finish(start(0, "no-such-command"))
    assert codes == [127] and "cannot start no-such-command" in outputs[0]


def test_settings_that_are_missing():
    with gang("indexed-job", 1) as (_, start):
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
            argv = [*POD, "mpi-worker", "--keys", self.folder / "ssh"]
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
        where = ("--keys", self.folder / "ssh", "--host-discovery-script", mounted / "discover_hosts.sh")
        argv = [*POD, kind, *FLAGS, *where, *flags, "--", *map(str, command)]
        return self.launcher.popen(argv, {**operator_env, **QUICK, **env})


@pytest.fixture
def mpi_job():
    if shutil.which("mpirun") is None:
        missing = "no mpirun. Debian: apt-get install openmpi-bin"
        (pytest.fail if os.environ.get("DISTPAD_CI") else pytest.skip)(missing)
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
        with pods.up(NAMES, service="train", shared=[folder]) as up:
            yield MpiJob(up, folder)


HOROVOD = [sys.executable, "-m", "distpad", "certify", "--replicas", "2", "--cases", "2"]


@pytest.mark.wide
def test_mpirun_over_ssh_as_an_ordinary_user(mpi_job):
    mpi_job.start_workers(0, 1)
    codes, outputs = finish(mpi_job.start("mpi-launcher", *HOROVOD), limit_s=TRAINING_LIMIT_S)
    assert codes == [0], outputs
    assert "2 replicas on 2 workers" in outputs[0] and "NOT PASSED" not in outputs[0]
    (key,) = mpi_job.workers[0].run(["stat", "-c", "%a %u", f"/tmp/distpad-ssh-{hosts.USER}/key"]).stdout.splitlines()
    assert key == f"600 {hosts.USER}"


def test_an_mpi_worker_that_exits_with_42(mpi_job):
    mpi_job.start_workers(0, 1)
    codes, outputs = finish(mpi_job.start("mpi-launcher", *scripted("1=exit:42", "0=sleep:600")))
    assert codes == [42], outputs


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


def test_an_mpi_job_starts_again_when_its_pods_are_back(mpi_job):
    mpi_job.start_workers(0, 1)
    program = """
import os, time
print("attempt", os.environ["DISTPAD_ATTEMPT"], flush=True)
time.sleep(100 if os.environ["DISTPAD_ATTEMPT"] == "0" else 0)
"""
    running = mpi_job.start("mpi-launcher", sys.executable, "-c", program, DISTPAD_MAX_RESTARTS="1")
    wait_for(running, "[worker 1] attempt 0")
    mpi_job.workers[1].kill()
    wait_for(running, "starting again")
    time.sleep(3)
    mpi_job.start_workers(1)
    codes, outputs = finish(running)
    assert codes == [0] and "[worker 1] attempt 1" in outputs[0], outputs


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


def test_an_mpi_worker_that_is_not_there_is_named(mpi_job):
    mpi_job.start_workers(0)
    codes, outputs = finish(mpi_job.start("mpi-launcher", *HOROVOD, flags=("--wait-s", "3")), limit_s=120)
    assert codes == [3] and f"missing after 3 s: {MPI_HOSTS[1]} (no sshd answers on port 2222)" in outputs[0]


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
    assert codes == [3] and "pods for 1 workers" in outputs[0]


def test_keys_that_are_not_there(mpi_job):
    argv = [*POD, "mpi-worker", "--keys", mpi_job.folder / "nothing"]
    done = mpi_job.workers[0].run(argv)
    assert done.returncode == 2 and "expected the key pair of the operator's Secret" in done.stdout


def test_the_keys_stay_private(mpi_job):
    mpi_job.start_workers(0)
    place = f"/tmp/distpad-ssh-{hosts.USER}"
    end, found = time.monotonic() + 60, []
    while len(found) != 2 and time.monotonic() < end:
        done = mpi_job.workers[0].run(["stat", "-c", "%a", place, f"{place}/key"])
        found = done.stdout.split() if done.returncode == 0 else []
    assert [int(mode, 8) & (stat.S_IRWXG | stat.S_IRWXO) for mode in found] == [0, 0]
