"""The expected topology compared with the engine's report: each way to start wrong, and the cause in the message."""

from __future__ import annotations

import json
import timeit

import pytest
import tensorflow as tf

import distpad
from distpad import backends
from distpad.backends import expected_gpus
from distpad.backends.start import _gpu_of
from distpad.launcher import builds, gpus, topology

pytestmark = pytest.mark.one_stack

TWO = json.dumps({"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}})
ALONE = topology.Report("Horovod", workers=1, replicas=1, hosts=1, controller="mpi")
OVER_GLOO = topology.Report("Horovod", workers=1, replicas=1, hosts=1, controller="gloo")
TWO_RANKS = topology.Report("Horovod", workers=2, replicas=2, hosts=1, controller="mpi")
STRATEGY = topology.Report("MultiWorkerMirroredStrategy", workers=1, replicas=1, hosts=1)
MIRRORED = topology.Report("MirroredStrategy", workers=1, replicas=1, hosts=1)
OPEN_MPI_5 = {"PRTE_LAUNCHED": "1", "OMPI_COMM_WORLD_SIZE": "2"}  # as in its ranks


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in (
        *topology._WORKERS,
        "TF_CONFIG",
        "DISTPAD_HOSTS",
        "DISTPAD_REPLICAS",
        "DISTPAD_BACKEND",
        "DISTPAD_GPUS",
    ):
        monkeypatch.delenv(name, raising=False)


WRONG = {
    "Gloo under mpirun": (
        OVER_GLOO,
        {"OMPI_COMM_WORLD_SIZE": "2"},
        r"Horovod reports 1 worker, expected 2, set by OMPI_COMM_WORLD_SIZE.*2 jobs of one.*"
        r"runs over Gloo.*horovodrun --gloo.*install_horovod.sh --mpi on",
    ),
    "another MPI": (
        ALONE,
        {"OMPI_COMM_WORLD_SIZE": "2"},
        r"another MPI than the launcher's.*install_horovod.sh --force",
    ),
    "MPICH": (ALONE, {"PMI_SIZE": "8"}, r"expected 8, set by PMI_SIZE"),
    "a stray horovodrun": (OVER_GLOO, {"HOROVOD_SIZE": "4"}, r"expected 4, set by HOROVOD_SIZE"),
    "srun without --mpi": (ALONE, {"SLURM_STEP_NUM_TASKS": "2"}, r"2, set by SLURM_STEP_NUM_TASKS.*srun --mpi=pmix"),
    "the same by distpad launch": (
        ALONE,
        {"DISTPAD_WORKERS": "2", "DISTPAD_BACKEND": "horovod", "SLURM_STEP_NUM_TASKS": "2"},
        r"expected 2, set by DISTPAD_WORKERS.*srun --mpi=pmix",
    ),
    "too few": (TWO_RANKS, {"DISTPAD_WORKERS": "3"}, r"Horovod reports 2 workers, expected 3.*did not join.*unset it"),
    "too many": (TWO_RANKS, {"DISTPAD_WORKERS": "1"}, r"Horovod reports 2 workers, expected 1"),
    "Horovod instead of a strategy": (
        ALONE,
        {"DISTPAD_WORKERS": "2", "DISTPAD_BACKEND": "multiworker"},
        r"started for MultiWorkerMirroredStrategy: launch with --backend horovod",
    ),
    "a strategy instead of Horovod": (
        STRATEGY,
        {"DISTPAD_WORKERS": "2", "DISTPAD_BACKEND": "horovod"},
        r"Strategy reports 1 worker, expected 2.*started for Horovod: write backend='horovod'",
    ),
    "a strategy under mpirun": (STRATEGY, {"OMPI_COMM_WORLD_SIZE": "2"}, r"2 jobs of one.*started for Horovod"),
    "a strategy without TF_CONFIG": (STRATEGY, {"SLURM_STEP_NUM_TASKS": "2"}, r"TF_CONFIG must name the workers"),
    "a strategy made too early": (STRATEGY, {"TF_CONFIG": TWO}, r"expected 2, set by TF_CONFIG"),
    "one host of two": (
        TWO_RANKS,
        {"DISTPAD_WORKERS": "2", "DISTPAD_HOSTS": "2"},
        r"Horovod reports 1 host, expected 2, set by DISTPAD_HOSTS. All 2 workers.*--hostfile.*--dry-run",
    ),
    "two hosts of one": (
        topology.Report("Horovod", workers=2, replicas=2, hosts=2),
        {"DISTPAD_HOSTS": "1"},
        r"reports 2 hosts, expected 1.*Two names of one host",
    ),
    "one GPU of four": (
        MIRRORED,
        {"DISTPAD_REPLICAS": "4", "CUDA_VISIBLE_DEVICES": "0"},
        r"MirroredStrategy reports 1 replica, expected 4, set by DISTPAD_REPLICAS.*CUDA_VISIBLE_DEVICES is '0'",
    ),
    "Open MPI 5, by distpad launch": (
        TWO_RANKS,
        {**OPEN_MPI_5, "DISTPAD_HOSTS": "2", "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile"},
        r"expected 2, set by DISTPAD_HOSTS.*Open MPI 5, which ignores.*PRTE_MCA_prte_default_hostfile=/etc/mpi",
    ),
    "no number": (ALONE, {"DISTPAD_WORKERS": "two"}, r"DISTPAD_WORKERS is 'two', expected an integer"),
    "fewer than the minimum": (
        ALONE,
        {"DISTPAD_WORKERS": "2", "HOROVOD_ELASTIC": "1", "HOROVOD_SIZE": "2"},
        r"reports 1 worker, expected 2",
    ),
}
RIGHT = {
    "nothing expected": (ALONE, {}),
    "mpirun": (TWO_RANKS, {"OMPI_COMM_WORLD_SIZE": "2"}),
    "one by mpirun": (ALONE, {"OMPI_COMM_WORLD_SIZE": "1"}),
    "distpad launch": (TWO_RANKS, {"DISTPAD_WORKERS": "2", "DISTPAD_HOSTS": "1", "DISTPAD_BACKEND": "horovod"}),
    "hvd.init(comm=[0, 1])": (TWO_RANKS, {"OMPI_COMM_WORLD_SIZE": "4"}),
    "mpirun inside a step": (TWO_RANKS, {"OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "3"}),
    "one rank inside a step": (ALONE, {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "3"}),
    "a batch script of two tasks": (ALONE, {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}),
    "hosts unknown to this rank": (topology.Report("Horovod", 3, 3, hosts=None), {"DISTPAD_HOSTS": "2"}),
    "elastic, shrunk": (ALONE, {"HOROVOD_ELASTIC": "1", "HOROVOD_SIZE": "2", "DISTPAD_HOSTS": "2"}),
    "elastic, grown": (TWO_RANKS, {"HOROVOD_ELASTIC": "1", "DISTPAD_WORKERS": "1", "DISTPAD_HOSTS": "3"}),
    "foreign nonsense": (ALONE, {"OMPI_COMM_WORLD_SIZE": "many", "PMI_SIZE": "", "TF_CONFIG": "{"}),
}


@pytest.mark.parametrize(("report", "environ", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_topology_raises_with_its_cause(report, environ, message):
    with pytest.raises(distpad.DistpadError, match=message):
        topology.check(report, environ)


@pytest.mark.parametrize(("report", "environ"), RIGHT.values(), ids=RIGHT)
def test_a_right_topology_passes(report, environ):
    topology.check(report, environ)


# -- Open MPI 5 under an operator: it ignores the host file -----------------------------------------------------------


@pytest.fixture
def operator(tmp_path):
    file = tmp_path / "hostfile"
    file.write_text("# made by the operator\nworker-0.job.ns.svc slots=1\nworker-1.job.ns.svc:1\n")
    return {**OPEN_MPI_5, "OMPI_MCA_orte_default_hostfile": str(file)}


def test_open_mpi_5_on_a_launcher(operator):
    with pytest.raises(distpad.DistpadError, match=r"reports 1 host, expected those 2, set by OMPI_MCA_orte_default"):
        topology.check(TWO_RANKS, operator)


@pytest.mark.parametrize(
    "change",
    [
        {"PRTE_MCA_prte_default_hostfile": "/etc/mpi/hostfile"},
        {"OMPI_MCA_orte_default_hostfile": "/does/not/exist"},  # a worker, where the file is not
        {"PRTE_LAUNCHED": None},  # Open MPI 4, which reads it
    ],
    ids=["set for 5", "no file", "Open MPI 4"],
)
def test_host_files_that_are_not_ignored(operator, change):
    topology.check(TWO_RANKS, {name: value for name, value in {**operator, **change}.items() if value})


def test_a_rank_on_a_host_of_the_file(operator, monkeypatch):
    monkeypatch.setattr(topology.socket, "gethostname", lambda: "worker-1")
    topology.check(TWO_RANKS, operator)


def test_ranks_on_several_hosts(operator):
    topology.check(topology.Report("Horovod", 2, 2, hosts=2), operator)


# -- callers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DISTPAD_WORKERS", "SLURM_STEP_NUM_TASKS"])
def test_alone_among_several(monkeypatch, name):
    monkeypatch.setenv(name, "2")
    for call in (backends.resolve, backends.start, lambda: backends.start("mirrored", 2)):
        with pytest.raises(ValueError, match=f"{name} expects 2 workers, but no engine with several workers runs"):
            call()
    assert backends.resolve("local").num_replicas == backends.start("local").num_replicas == 1


def test_the_engines_own_variable_decides_the_remedy(monkeypatch):
    monkeypatch.setenv("DISTPAD_WORKERS", "2")
    monkeypatch.setenv("TF_CONFIG", TWO)
    with pytest.raises(ValueError, match="TF_CONFIG names 2 workers, but no strategy is in scope"):
        backends.resolve()
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    with pytest.raises(ValueError, match="HOROVOD_SIZE expects 2 ranks, but Horovod is not initialised"):
        backends.resolve()


def test_a_mirrored_strategy_in_scope_has_one_worker(monkeypatch):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    monkeypatch.setenv("TF_CONFIG", TWO)
    with strategy.scope(), pytest.raises(ValueError, match="TF_CONFIG names 2 workers"):
        backends.resolve()
    assert backends.resolve(strategy).num_replicas == 1  # an explicit backend is not checked


def test_the_expected_number_of_replicas(monkeypatch):
    monkeypatch.setenv("DISTPAD_BACKEND", "mirrored")
    monkeypatch.setenv("DISTPAD_REPLICAS", "2")
    with pytest.raises(distpad.DistpadError, match="MirroredStrategy reports 1 replica, expected 2"):
        backends.resolve(tf.distribute.MirroredStrategy(["CPU:0"]))
    assert backends.resolve(tf.distribute.OneDeviceStrategy("CPU:0")).num_replicas == 1


def test_start_follows_the_launcher(monkeypatch):
    monkeypatch.setenv("DISTPAD_BACKEND", "mirrored")
    assert backends.start().strategy.num_replicas_in_sync == 1
    with pytest.raises(ValueError, match=r"kind is 'horovod', expected 'mirrored', the --backend of distpad launch.*"):
        backends.start("horovod")
    monkeypatch.setenv("DISTPAD_BACKEND", "tpu")
    with pytest.raises(ValueError, match="DISTPAD_BACKEND is 'tpu', expected one of 'mirrored', 'multiworker'"):
        backends.start()


def test_more_replicas_than_gpus(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU:0"] if kind == "GPU" else ["CPU:0"])
    with pytest.raises(ValueError, match="replicas is 2, expected at most 1, the GPUs here"):
        backends.start("mirrored", 2)


GPU_BUILD = {"version": "2.21.0", "cuda": "12.5.1", "cudnn": "9", "for_gpus": True, "capabilities": ["sm_60", "sm_89"]}
DRIVER = {"devices": 2, "names": ["RTX 5090"] * 2, "capabilities": ["12.0"] * 2, "version": "580.95", "cuda": "13.0"}
EXPECTED = "TensorFlow sees {} GPUs?, expected 2, set by DISTPAD_GPUS: "
# seen GPUs, build, driver, CUDA_VISIBLE_DEVICES, message
WITHOUT_GPUS = {
    "this TensorFlow": (
        0,
        None,
        None,
        "0,1",
        EXPECTED.format(0) + "TensorFlow is built for the CPU. launch/environment",
    ),
    "no driver": (0, GPU_BUILD, {"cuda": ""}, "0,1", EXPECTED.format(0) + "NVIDIA's driver is missing. Install"),
    "one GPU": (
        1,
        GPU_BUILD,
        {"names": ["T4"], "devices": 1},
        "0,1",
        EXPECTED.format(1) + "CUDA_VISIBLE_DEVICES is '0,1'",
    ),
    "an empty list": (0, GPU_BUILD, {}, "", EXPECTED.format(0) + "CUDA_VISIBLE_DEVICES is ''. Unset it"),
    "libraries": (0, GPU_BUILD, {}, "0,1", EXPECTED.format(0) + "libraries of CUDA 12 and cuDNN 9 are missing"),
    "sm_120": (
        2,
        GPU_BUILD,
        {},
        "0,1",
        "RTX 5090 has compute capability 12.0, TensorFlow 2.21.0 has code for 6.0 to 8.9",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_GPUS)
def test_a_worker_that_expects_gpus_does_not_train_on_the_cpu(monkeypatch, name):
    seen, build, driver, visible, message = WITHOUT_GPUS[name]
    monkeypatch.setenv("DISTPAD_GPUS", "2")
    monkeypatch.setenv("DISTPAD_BACKEND", "mirrored")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    if build is not None:
        monkeypatch.setattr(builds, "tensorflow", lambda: build)
        monkeypatch.setattr(gpus, "driver", lambda: {**DRIVER, **driver})
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [f"{kind}:{i}" for i in range(seen)])
    for call in (backends.start, lambda: backends.resolve(strategy)):
        with pytest.raises(distpad.DistpadError, match=message):
            call()


@pytest.mark.parametrize(("visible", "each", "rank", "own"), [(4, 1, 2, 2), (1, 1, 3, 0), (2, 2, 3, 0), (4, 0, 3, 3)])
def test_the_gpu_of_a_rank(monkeypatch, visible, each, rank, own):
    monkeypatch.setenv("DISTPAD_GPUS", str(each or ""))
    assert _gpu_of(rank, list(range(visible))) == own


def test_a_rank_that_has_not_chosen_its_gpu(monkeypatch):
    """Every rank would use GPU 0 of its host."""
    monkeypatch.setenv("DISTPAD_GPUS", "1")
    monkeypatch.setattr(builds, "tensorflow", lambda: GPU_BUILD)
    monkeypatch.setattr(gpus, "driver", lambda: {**DRIVER, "capabilities": ["8.9"] * 2})
    for name in ("list_physical_devices", "get_visible_devices"):
        monkeypatch.setattr(tf.config, name, lambda kind: [f"{kind}:0", f"{kind}:1"])
    expected_gpus.check()
    with pytest.raises(
        distpad.DistpadError, match=r"this rank uses 2 GPUs, expected 1 by its local rank\. Call distpad"
    ):
        expected_gpus.check(has_chosen=True)


def test_the_check_is_fast(monkeypatch):
    monkeypatch.setenv("DISTPAD_WORKERS", "2")
    seconds = min(timeit.repeat(lambda: topology.check(TWO_RANKS), number=1000, repeat=5)) / 1000
    assert seconds < 1e-3, seconds  # 10 microseconds on an idle machine
