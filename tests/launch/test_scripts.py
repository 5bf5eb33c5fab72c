"""launch/README.md: its commands run, its config file is valid, and its table lists every script."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import needs
from scripts import script

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
LIMIT_S = 200


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)
    return text


def run(command: list[str], **settings: str) -> subprocess.CompletedProcess[str]:
    path = settings.pop("PATH", os.environ["PATH"])
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{path}"  # as in an active environment
    environment = {**os.environ, "PATH": path, **settings}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


COMMANDS = block("bash").splitlines()


def test_all_engines_are_shown():
    assert [shlex.split(line)[0] for line in COMMANDS] == [
        f"launch/{name}.sh" for name in ("local", "multiworker", "horovodrun", "mpirun")
    ]


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_are_understood(line):
    script, *arguments = shlex.split(line)
    done = run([script, "--dry-run", *arguments])
    assert done.returncode == 0, done.stderr
    engine = pathlib.Path(script).stem
    assert engine in ("local", "multiworker") or f"by {engine}" in done.stdout, done.stdout
    assert "\npython examples/labels/integers.py\n" in done.stdout


def with_gpus(folder: pathlib.Path, count: int) -> str:
    """A PATH whose nvidia-smi lists so many GPUs."""
    script(folder / "nvidia-smi", "\n".join(f"echo 'GPU {i}: NVIDIA L4 (UUID: GPU-{i})'" for i in range(count)))
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("count", "visible", "gpus"), [(4, None, "0,1,2,3"), (4, "1,3", "1,3"), (4, "", ""), (0, "0", "")]
)
def test_a_job_of_this_machine_takes_its_gpus(tmp_path, monkeypatch, count, visible, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shown = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = run(["launch/local.sh", "--dry-run", "--", "true"], PATH=with_gpus(tmp_path, count), **shown)
    assert done.returncode == 0, done.stderr
    expected = len(gpus.split(",")) if gpus else 0
    assert (f"\nDISTPAD_GPUS={expected}\nDISTPAD_HOSTS=1\n" in done.stdout) == bool(gpus), done.stdout
    assert (f"by local rank\n{gpus}\n" in done.stdout) == bool(gpus)


# GPUs, arguments of demo.sh: the stack that it sets up, and the command
DEMOS = {
    "CPU": (0, "", "current", "examples/handwriting/train.py --backend mirrored --replicas 4 --out runs/demo"),
    "GPUs": (2, "", "current-gpu", "examples/handwriting/train.py --backend mirrored --replicas 2 --out runs/demo"),
    "GPUs, but for the CPU": (2, "--stack classic", "classic", "train.py --backend mirrored --replicas 4"),
    "ranks": (
        *(2, "--stack classic-gpu --backend horovod", "classic-gpu --horovod"),
        "-m distpad launch --backend horovod --gloo -np 2 --gpus 2 --gpus-per-worker 1 -- .*train.py --backend horovod",
    ),
    "workers": (8, "--backend multiworker --replicas 4", "current-gpu", "-np 4 --gpus 4 --gpus-per-worker 1 -- "),
}


@pytest.mark.parametrize(("count", "arguments", "stack", "command"), DEMOS.values(), ids=DEMOS)
def test_the_demonstration_takes_the_gpus(tmp_path, monkeypatch, count, arguments, stack, command):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name, body in {
        "launch/environment.sh": f'echo "$@" >>{tmp_path}/stacks; echo {tmp_path}/py',
        "py": 'echo "$DISTPAD_GPUS:" "$@"',
    }.items():
        script(tmp_path / name, body)
    done = run([tmp_path / "launch" / "demo.sh", *arguments.split()], PATH=with_gpus(tmp_path, count))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "stacks").read_text() == f"{stack}\n"
    assert re.search(command, done.stdout), done.stdout
    expected_gpus = re.search(r"^(\d*): examples", done.stdout, re.MULTILINE)  # launched jobs have --gpus instead
    assert expected_gpus is None or expected_gpus[1] == ("2" if stack == "current-gpu" else "")


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="GPUs are here")
def test_without_gpus_nothing_trains():
    done = run(["launch/local.sh", "--gpus", "1", "--", "echo", "trained"])
    assert done.returncode == 3 and "trained" not in done.stdout
    assert re.search("has no 1 GPUs for its workers: (TensorFlow is built for the CPU|NVIDIA's driver)", done.stderr)
    done = run(["benchmarks/gpu.sh"])
    assert done.returncode == 3 and "lists no GPU on this machine" in done.stderr and "gpu.sh --cpu" in done.stderr
    assert run(["benchmarks/gpu.sh", "everything"]).returncode == 2


def test_a_small_training_by_mpirun():
    """tests/cluster/test_launch.py trains by ssh and horovodrun, tests/cluster/test_sbatch.py by srun."""
    needs.program("mpirun")
    # with two workers on two busy cores, Open MPI's busy waiting would slow them down
    slow = ["--launcher-arg=--mca", "--launcher-arg=mpi_yield_when_idle", "--launcher-arg=1"]
    done = run(["launch/mpirun.sh", "-np", "2", *slow, "--", "python", "tests/small_training.py", "2"])
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert re.search(rf"worker {rank} of 2 on \S+ trained, error small", done.stdout), done.stdout


@pytest.mark.wide
@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_run(line):
    command = shlex.split(line)
    for program in {"horovodrun", "mpirun"} & {pathlib.Path(command[0]).stem}:
        needs.program(program)
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert re.search(r"replicas: 2\b", done.stdout), done.stdout
    assert "distpad launch: done in" in done.stderr


def test_its_file_of_flags_is_understood(tmp_path):
    (tmp_path / "wandb").write_text("s3cret")
    file = tmp_path / "job.yaml"
    file.write_text(block("yaml").replace("/run/secrets/wandb", str(tmp_path / "wandb")))
    done = run(["distpad", "launch", "--config", str(file), "--dry-run"])
    assert done.returncode == 0, done.stderr
    assert "horovodrun --gloo -np 8" in done.stdout and "-H node1:4,node2:4" in done.stdout
    assert "\npython train.py --resume\n" in done.stdout and "WANDB_API_KEY='***'" in done.stdout


def test_its_table_names_every_script():
    scripts = {path.name for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch")}
    inner = {"environment.sh", "install_horovod.sh", "lock.sh", "packages.sh", "python.sh"}  # for installation
    table = TEXT.partition("\n## ")[0]
    assert set(re.findall(r"[\w/]+/(\w+\.(?:sh|sbatch))", table)) == scripts - inner


def test_without_a_python_that_has_distpad_it_says_how_to_get_one(tmp_path):
    scripts = tmp_path / "launch"
    shutil.copytree(ROOT / "launch", scripts)
    done = subprocess.run(
        ["bash", scripts / "multiworker.sh", "-np", "2", "--", "true"],
        env={"PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 10
    assert "no Python with distpad found" in done.stderr and "environment.sh current" in done.stderr
