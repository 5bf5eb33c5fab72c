"""The images: hadolint, and that the project's own scripts build them, which other tests run."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest

import needs
from k8s import manifests
from scripts import script

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMAGE = ROOT / "k8s" / "image"
STACKS = ("current", "classic", "current-gpu", "classic-gpu")
SYSTEM = IMAGE / "system.sh"


def instructions(stack: str) -> list[tuple[str, str]]:
    """The (instruction, arguments) pairs of the Dockerfile for a stack."""
    lines = (IMAGE / "Dockerfile").read_text().replace("\\\n", " ").replace("$STACK", stack).splitlines()
    return [
        (words[0], words[2]) for line in lines if line.strip() and line[0] != "#" for words in [line.partition(" ")]
    ]


def hadolint(file: pathlib.Path) -> subprocess.CompletedProcess[str]:
    argv = [needs.program("hadolint"), "--no-color", file]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


# -- the Dockerfiles --------------------------------------------------------------------------------------------------


def test_hadolint_is_clean():
    done = hadolint(IMAGE / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("python:3.11-slim-bookworm AS build", "python AS build", "DL3006"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ('ENTRYPOINT ["distpad", "pod"]', "ENTRYPOINT distpad pod", "DL3025"),
        ("RUN k8s/image/system.sh run", "RUN apt-get install openssh-server", "DL3008"),
    ],
)
def test_hadolint_sees_faults(tmp_path, old, new, rule):
    text = (IMAGE / "Dockerfile").read_text()
    assert old in text
    (tmp_path / "Dockerfile").write_text(text.replace(old, new))
    done = hadolint(tmp_path / "Dockerfile")
    assert done.returncode != 0 and rule in done.stdout


@pytest.mark.parametrize("stack", STACKS)
def test_each_stack_has_the_compiler_that_horovod_needs(stack):
    """Stages follow one another by name, until an image."""
    stages = {
        name: base
        for base, name in (
            rest.split(" AS ") for word, rest in instructions(stack)[:-1] if word == "FROM" and " AS " in rest
        )
    }
    base = stages["cuda"]
    while base in stages:
        base = stages[base]
    assert base == ("nvidia/cuda:12.9.1-devel-ubuntu22.04" if stack.endswith("-gpu") else "python:3.11-slim-bookworm")
    assert ("COPY", "--from=cuda /usr/local/cuda-12.9 /usr/local/cuda") in instructions(stack)


@pytest.mark.parametrize("stack", STACKS)
def test_each_step_is_a_script_of_the_project(stack):
    """Dockerfiles run only scripts that other tests cover."""
    steps = [rest.split() for word, rest in instructions(stack) if word == "RUN" and not rest.startswith("mkdir ")]
    scripts = {"k8s/image/system.sh": ["build", "run"], "launch/environment.sh": [f"{stack} --horovod"]}
    for name, *arguments in steps:
        assert " ".join(arguments) in scripts[name]
        assert os.access(ROOT / name, os.X_OK)
    assert len(steps) == 4


@pytest.mark.parametrize("stack", STACKS)
def test_pods_run_as_an_ordinary_user_of_known_number(stack):
    last = dict(instructions(stack))  # the last instruction of each kind counts
    assert last["USER"] == "10001:10001"  # a number, since runAsNonRoot cannot check a name
    assert json.loads(last["ENTRYPOINT"]) == ["distpad", "pod"]
    assert f"PATH=/opt/envs/{stack}/bin:" in last["ENV"] and "HOME=/tmp " in last["ENV"]
    assert instructions(stack)[-2:] == [("USER", last["USER"]), ("ENTRYPOINT", last["ENTRYPOINT"])]


@pytest.mark.parametrize("stack", STACKS)
def test_what_is_copied_is_in_the_context(stack):
    """The context holds the files that .dockerignore admits, and the Dockerfiles copy all of them."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    copied = set()
    for word, rest in instructions(stack):
        if word == "COPY" and not rest.startswith("--from"):
            copied |= {source.rstrip("/") for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied | let_in)
    assert {next(each for each in let_in if f"{source}/".startswith(f"{each}/")) for source in copied} == let_in


def test_the_environment_stays_where_it_was_made():
    """Environments and an editable distpad break when they are moved."""
    made, run = (IMAGE / "Dockerfile").read_text().split("\nFROM ")[-2:]
    assert "ENV DISTPAD_ENVS=/opt/envs" in made and "WORKDIR /opt/distpad" in made
    assert "COPY --from=build /opt/envs /opt/envs" in run and "COPY --from=build /opt/distpad /opt/distpad" in run


def test_ssh_is_configured_for_the_keys_of_the_manifests():
    """The configured port and folder are those of the pods. test_pod.py runs ssh and sshd with these files."""
    copied = ("COPY", "k8s/image/ssh_config k8s/image/sshd_config /etc/ssh/")
    assert copied in instructions("current")
    mpijob = manifests.find(manifests.overlay("mpijob"), "MPIJob/train")
    for name in ("ssh_config", "sshd_config"):
        text = (IMAGE / name).read_text()
        assert set(re.findall(r"\S*/(?=id_rsa|authorized_keys)", text)) == {f"{mpijob['spec']['sshAuthMountPath']}/"}
        assert set(re.findall(r"Port (\d+)", text)) == {"2222"}


# -- system.sh --------------------------------------------------------------------------------------------------------


def run_system(tmp_path: pathlib.Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run the script on a temporary root, with an apt-get and a useradd that only record their arguments."""
    stubs, root = tmp_path / "bin", tmp_path / "root"
    stubs.mkdir()
    (root / "etc" / "ssh").mkdir(parents=True)
    (root / "var" / "lib" / "apt" / "lists").mkdir(parents=True)
    (root / "var" / "lib" / "apt" / "lists" / "list").touch()
    for name in ("ssh_host_rsa_key", "sshd_config"):
        (root / "etc" / "ssh" / name).touch()
    for name in ("apt-get", "useradd"):
        script(stubs / name, f'echo {name} "$@" >>{tmp_path}/calls')
    env = {"PATH": f"{stubs}:/usr/bin:/bin", "ROOT": str(root)}
    done = subprocess.run([SYSTEM, *arguments], env=env, capture_output=True, text=True, timeout=30)
    calls = tmp_path / "calls"
    return done, [line.split() for line in calls.read_text().splitlines()] if calls.exists() else []


def packages(calls: list[list[str]]) -> set[str]:
    (install,) = [call for call in calls if "install" in call]
    assert "--no-install-recommends" in install
    return {word for word in install[install.index("install") + 1 :] if word[0] != "-"}


def test_what_builds_horovod_is_installed(tmp_path):
    done, calls = run_system(tmp_path, "build")
    assert done.returncode == 0, done.stderr
    named = set()  # packages in the script's own messages
    text = (ROOT / "launch" / "install_horovod.sh").read_text()
    for each in re.findall(r"need 1\d \S+ ('[^']+'|\S+)", text):
        named |= set(each.strip("'").split())
    assert named and named <= packages(calls)


def test_the_stage_that_runs(tmp_path):
    done, calls = run_system(tmp_path, "run")
    assert done.returncode == 0, done.stderr
    assert packages(calls) == {"openmpi-bin", "openssh-client", "openssh-server"}
    assert {path.name for path in (tmp_path / "root" / "etc" / "ssh").iterdir()} == {"sshd_config"}  # no host key
    assert not list((tmp_path / "root" / "var" / "lib" / "apt" / "lists").iterdir())
    (user,) = [call for call in calls if call[0] == "useradd"]
    assert user[1:3] == ["--uid", "10001"] and user[user.index("--home-dir") + 1] == "/tmp"


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="Debian's packages are looked up on Debian")
def test_debian_has_the_packages(tmp_path):
    names = set()
    for stage in ("build", "run"):
        (tmp_path / stage).mkdir()
        names |= packages(run_system(tmp_path / stage, stage)[1])
    done = subprocess.run(["apt-get", "--simulate", "install", *sorted(names)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [(), ("all",)])
def test_wrong_use(tmp_path, arguments):
    done, calls = run_system(tmp_path, *arguments)
    assert done.returncode == 2 and calls == [] and "expected build or run" in done.stderr
