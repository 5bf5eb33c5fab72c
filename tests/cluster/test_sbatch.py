"""The batch scripts of launch/slurm in a real Slurm: their processes, and the job's state and exit code."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import sys
import time

import pytest
import slurm

import needs
from scripts import script

MULTIWORKER = """
import os, socket
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
total = strategy.run(lambda: tf.distribute.get_replica_context().all_reduce("SUM", tf.constant(1.0)))
print(f"on {socket.gethostname()}: {float(total):g}, {os.environ['TF_CONFIG']}", flush=True)
"""
TRAINING = slurm.ROOT / "tests" / "small_training.py"
LIMIT_S = 240  # of a training, on a busy machine
HOSTILE = ["two words", "", "$(touch injected)", "'single' \"double\"", "new\nline", "*", "--flag", "back\\slash", "--"]
SMALL = ("--cpus-per-task=1", "--ntasks-per-node=1")  # the size that one machine can run
SCRIPTS = ("horovod", "multiworker")


pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("slurm")]  # one Slurm for all tests


@pytest.fixture(scope="module")
def cluster():
    with slurm.start(cpus=32, gpus=4) as running:
        yield running


@pytest.fixture
def run(cluster):
    """Submit a script of launch/slurm and wait for its end."""

    def submit(name: str, *command: str, options=(), limit_s: float = 120, **env: str) -> slurm.Job:
        # Slurm's GPUs are files here, which nvidia-smi does not list
        settings = {"DISTPAD_PYTHON": sys.executable, "PYTHONPATH": str(slurm.ROOT), "GPUS": "0", **env}
        script = slurm.ROOT / "launch" / "slurm" / f"{name}.sbatch"
        return cluster.sbatch(script, *command, options=options, env=settings, limit_s=limit_s)

    return submit


def found(output: str, text: str) -> list[str]:
    """The workers' lines that begin with a text, without the launcher's prefix."""
    lines = (line[line.find(text) :] for line in output.splitlines() if text in line and "distpad launch:" not in line)
    return sorted(lines)


# -- trainings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launcher", [pytest.param("srun", marks=pytest.mark.smoke), pytest.param("mpirun", marks=pytest.mark.wide)]
)
def test_horovod(run, launcher):
    needs.program("mpirun")
    job = run("horovod", sys.executable, str(TRAINING), "2", options=SMALL, limit_s=LIMIT_S, LAUNCHER=launcher)
    assert (job.state, job.code) == ("COMPLETED", 0), job.output
    assert sorted(re.findall(r"worker \d of \d on .*", job.output)) == [
        f"worker {rank} of 2 on node{rank + 1} trained, error small, GPUs 0,1,2,3" for rank in (0, 1)
    ]


@pytest.mark.wide
@pytest.mark.smoke
def test_multiworker(run):
    job = run("multiworker", sys.executable, "-c", MULTIWORKER, options=["--gpus-per-node=0"], limit_s=LIMIT_S)
    assert (job.state, job.code) == ("COMPLETED", 0), job.output
    lines = found(job.output, "on node")
    for index, line in enumerate(lines):
        total, config = line.removeprefix(f"on node{index + 1}: ").split(", ", 1)
        workers = json.loads(config)["cluster"]["worker"]
        assert total == "2" and json.loads(config)["task"] == {"type": "worker", "index": index}
        assert [address.split(":")[0] for address in workers] == ["node1", "node2"]
    assert len(lines) == 2


# -- the command ------------------------------------------------------------------------------------------------------

ECHO = "import json, os, sys; print('ARGUMENTS ' + json.dumps([sys.argv[1:], os.getcwd()]), flush=True)"


@pytest.mark.parametrize("name", SCRIPTS)
def test_arguments_arrive_unchanged(run, name):
    """With the script's own numbers of tasks, cores and GPUs, in the folder of the sbatch call."""
    job = run(name, sys.executable, "-c", ECHO, *HOSTILE)
    assert (job.state, job.code) == ("COMPLETED", 0), job.output
    lines = found(job.output, "ARGUMENTS ")
    assert len(lines) == {"horovod": 8, "multiworker": 2}[name]
    for line in lines:
        assert json.loads(line.removeprefix("ARGUMENTS ")) == [HOSTILE, str(pathlib.Path.cwd())]
    assert not pathlib.Path("injected").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_exit_code_is_the_trainings(run, name):
    job = run(name, "sh", "-c", '[ "$(hostname)" = node1 ] || exit 42; sleep 3', options=SMALL)
    assert (job.state, job.code) == ("FAILED", 42), job.output
    assert "worker 1 on node2 failed first (exit code 42)" in job.output


@pytest.mark.parametrize(("name", "launcher"), [("horovod", "srun"), ("horovod", "mpirun"), ("multiworker", "")])
def test_each_node_sees_the_gpus_that_slurm_gave_it(cluster, run, name, launcher):
    """GPUs differ from those of the launcher's node: another job has the first two of node2."""
    script = cluster.folder / "other.sh"
    script.write_text("#!/bin/bash\nsleep 100\n")
    other = cluster.submit(script, options=["--nodelist=node2", "--gpus-per-node=2"])
    try:
        options = [*SMALL, "--gpus-per-node=2"]
        job = run(name, "sh", "-c", "echo GPUS $(hostname) $CUDA_VISIBLE_DEVICES", options=options, LAUNCHER=launcher)
    finally:
        cluster.run("scancel", other)
    assert (job.state, job.code) == ("COMPLETED", 0), job.output
    assert found(job.output, "GPUS ") == ["GPUS node1 0,1", "GPUS node2 2,3"]


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="GPUs are here")
@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_trains_on_the_cpus_of_nodes_with_gpus(run, name):
    job = run(name, "echo", "trained", options=[*SMALL, "--gpus-per-node=2"], GPUS="")  # Slurm tells their number
    assert (job.state, job.code) == ("FAILED", 3) and not found(job.output, "trained"), job.output
    needed = {"horovod": 1, "multiworker": 2}[name]
    assert f"node2 has no {needed} GPUs for its workers: TensorFlow is built for the CPU" in job.output


TRAINS = "trap 'echo saved; exit 0' TERM; echo begun; while :; do sleep 0.1; done"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_training_can_save_before_its_time_is_up(cluster, name):
    """Slurm's signal (--signal=B:TERM@60) reaches all workers."""
    script = slurm.ROOT / "launch" / "slurm" / f"{name}.sbatch"
    env = {"DISTPAD_PYTHON": sys.executable, "PYTHONPATH": str(slurm.ROOT), "GPUS": "0"}
    job = cluster.submit(script, "sh", "-c", TRAINS, options=SMALL, env=env)
    limit = time.monotonic() + 120
    while len(found(cluster.output(job), "begun")) < 2:
        assert time.monotonic() < limit, cluster.output(job)
        time.sleep(slurm.POLL_S)
    assert cluster.run("scancel", "--batch", "--signal=TERM", job).returncode == 0
    ended = cluster.wait(job, limit_s=120)
    assert (ended.state, ended.code) == ("FAILED", 143), ended.output
    assert found(ended.output, "saved") == ["saved", "saved"]


# -- containers -------------------------------------------------------------------------------------------------------

# Replaces srun, since pyxis is not installed: records the options for pyxis, and removes them.
NOTING_SRUN = """kept=()
for word; do [[ $word == --container-* ]] && echo "$word" >>"$NOTES" || kept+=("$word"); done
exec {srun} "${{kept[@]}}"
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_containers(cluster, run, name):
    programs = cluster.folder / "programs"
    programs.mkdir(exist_ok=True)
    noting = NOTING_SRUN.format(srun=shutil.which("srun")).replace("$NOTES", str(cluster.folder / name))
    script(programs / "srun", noting, "bash")
    path = f"{programs}:{pathlib.Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    image = {"CONTAINER_IMAGE": "/images/my train.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    command = ["sh", "-c", 'echo "CONFIG ${TF_CONFIG:-none}"']
    job = run(name, *command, options=SMALL, PATH=path, **image)
    assert (job.state, job.code) == ("COMPLETED", 0), job.output
    here = pathlib.Path.cwd()
    assert (cluster.folder / name).read_text().splitlines() == [
        "--container-image=/images/my train.sqsh",
        f"--container-mounts=/tmp:/tmp,{here}:{here},/data:/data",
        f"--container-workdir={here}",
    ]
    configs = found(job.output, "CONFIG ")
    assert len(configs) == 2 and all(("node1:" in config) == (name == "multiworker") for config in configs)


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = [
    ("horovod", (), {}, "horovod.sbatch: error: no command. It follows the script's name"),
    ("multiworker", (), {}, "multiworker.sbatch: error: no command. It follows the script's name"),
    ("horovod", ("true",), {"LAUNCHER": "ssh"}, "LAUNCHER is ssh, expected srun or mpirun"),
    ("horovod", ("true",), {"LAUNCHER": "mpirun", "CONTAINER_IMAGE": "i"}, "expected srun, whose plug-in"),
    ("multiworker", ("true",), {"DISTPAD_PYTHON": "/no/python"}, "/no/python cannot import distpad. Activate its"),
    ("multiworker", ("true",), {"PORT": "80"}, "--port is 80, expected 1024"),
]


@pytest.mark.parametrize(("name", "command", "env", "message"), REFUSED)
def test_what_is_refused(run, name, command, env, message):
    job = run(name, *command, **env)
    assert (job.state, job.code) == ("FAILED", 2), job.output
    assert message in job.output
