"""``distpad launch --k8s`` without a kubectl: lines that are set, jobs that are refused. tests/k8s builds real ones."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from distpad.cli import app
from distpad.launcher import kubernetes

KINDS = ("indexed-job", "jobset", "mpijob", "mpijob-elastic", "trainjob", "trainjob-mpi")
OF_MPI = ("mpijob", "mpijob-elastic", "trainjob-mpi")
DIGEST = "sha256:" + "0123456789abcdef" * 4


def launch(*arguments: str):
    return CliRunner().invoke(app.app, ["launch", *arguments])


def job(**fields) -> kubernetes.Job:
    return kubernetes.Job(**{"kind": "jobset", "image": "me/it:7", **fields})


# -- marked lines -----------------------------------------------------------------------------------------------------


def test_kinds_are_the_folders():
    assert kubernetes.kinds() == KINDS
    assert {kind for kind in KINDS if kubernetes.find(kubernetes.FOLDER / "overlays" / kind, "--slots")} == {*OF_MPI}


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_has_one_line(kind):
    overlay, components = kubernetes.FOLDER / "overlays" / kind, kubernetes.FOLDER / "components"
    places = dict.fromkeys(("--image", "--workers", "--max-restarts"), overlay)
    places |= {"--gpus": components / "gpu", "--queue": components / "kueue"}
    if kind in OF_MPI:
        places["--slots"] = overlay
    assert places.keys() == kubernetes.MARKS.keys() - ({"--slots"} if kind not in OF_MPI else set())
    for flag, folder in places.items():
        assert list(kubernetes.find(folder, flag).values()) == [1], flag


@pytest.mark.parametrize(
    ("flag", "value", "line", "after"),
    [
        ("--workers", 7, "  completions: 2 # how many workers: the only place", "  completions: 7 # how"),
        ("--workers", 7, "  replicas: 4 # pods that train at most: the only place", "  replicas: 7 # pods"),
        ("--gpus", 8, '  each: "1" # GPUs of each pod that trains: the only place', '  each: "8" # GPUs'),
        ("--queue", "q", 'a.b-c/d: "x" # a LocalQueue of the namespace: the only place', 'a.b-c/d: "q" # a'),
        ("--image", "h:5/a@b", '  image: "c/d:e" # of all pods: the only place', '  image: "h:5/a@b" # of'),
        ("--workers", 7, "  completions: 2 # how many workers", "  completions: 2 # how many"),
        ("--workers", 7, "  slotsPerWorker: 2 # processes in each pod: the only place", "  slotsPerWorker: 2"),
        ("--workers", 7, "# how many workers: the only place", "# how"),
    ],
)
def test_a_line_is_set(tmp_path, flag, value, line, after):
    """Or is another's, and is left."""
    (tmp_path / "kustomization.yaml").write_text("resources: []\n")
    (tmp_path / "it.yaml").write_text(f"a: 1\n{line}\nb: 2\n")
    if str(value) in after:
        kubernetes.put(tmp_path, flag, value)
    else:
        with pytest.raises(ValueError, match="There are 0"):
            kubernetes.put(tmp_path, flag, value)
    first, second, third = (tmp_path / "it.yaml").read_text().splitlines()
    assert (first, third) == ("a: 1", "b: 2") and second.startswith(after) and second.endswith(line.split(" # ")[-1])


def test_a_line_that_is_missing_or_there_twice(tmp_path):
    shutil.copytree(kubernetes.FOLDER, tmp_path / "k8s")
    overlay = tmp_path / "k8s" / "overlays" / "mpijob"
    file = overlay / "mpijob.yaml"
    text = file.read_text()
    (line,) = [line for line in text.splitlines() if "pods that train" in line]
    for changed, evidence in (
        (text.replace(line, ""), r"0 \(in no file"),
        (f"{text}{line}\n", r"2 \(in mpijob/mpijob.y"),
    ):
        file.write_text(changed)
        with pytest.raises(ValueError, match=rf"--workers is 7, expected one line .*There are {evidence}.* Restore"):
            kubernetes.put(overlay, "--workers", 7)
        assert file.read_text() == changed
    file.write_text(text)
    (overlay / "more.yaml").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"There are 2 \(in mpijob/more.yaml, mpijob/mpijob.yaml\)"):
        kubernetes.put(overlay, "--workers", 7)


def test_an_overlays_own_line_hides_those_of_what_it_is_built_on():
    for flag, file in (("--workers", "elastic.yaml"), ("--slots", "elastic.yaml"), ("--max-restarts", "launcher.yaml")):
        (found,) = kubernetes.find(kubernetes.FOLDER / "overlays" / "mpijob-elastic", flag)
        assert found.name == file


# -- the command ------------------------------------------------------------------------------------------------------


def resources(*arguments: list[str] | None) -> list[dict]:
    containers = [{"name": "node", **({} if words is None else {"args": words})} for words in arguments]
    return [{"kind": "Service", "metadata": {"name": "s"}}] + [
        {"kind": "Job", "metadata": {"name": f"j{i}"}, "spec": {"template": {"spec": {"containers": [each]}}}}
        for i, each in enumerate(containers)
    ]


@given(st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",))), min_size=1))
def test_a_command_replaces_the_arguments_word_for_word(words):
    job(command=tuple(words))
    patch = kubernetes.command_patch(words, resources(None, ["old", "words"]))
    assert patch["target"] == {"kind": "Job", "name": "j1"}
    path = "/spec/template/spec/containers/0/args"
    assert yaml.safe_load(patch["patch"]) == [{"op": "replace", "path": path, "value": words}]


@pytest.mark.parametrize("arguments", [(), (None,), (["a"], ["b"])])
def test_arguments_in_no_or_in_several_containers(arguments):
    with pytest.raises(ValueError, match=r"launch: [02] containers have args, expected only the training"):
        kubernetes.command_patch(["x"], resources(*arguments))


# -- jobs -------------------------------------------------------------------------------------------------------------

WRONG = {
    "kind": ({"kind": "pods"}, r"--k8s is 'pods', expected one of 'indexed-job', 'jobset', 'mpijob', "),
    "a path": ({"kind": "../overlays/jobset"}, r"--k8s is '../overlays/jobset', expected one of"),
    "no image": ({"image": ""}, r"--image is '', expected NAME\[:TAG\]\[@DIGEST\] of an image .*Build and push"),
    "no workers": ({"workers": 0}, r"--workers is 0, expected 1 to 100000\."),
    "too many workers": ({"workers": 100_001}, r"--workers is 100001, expected 1 to 100000\."),
    "slots": ({"kind": "mpijob", "slots": 0}, r"--slots is 0, expected 1 to 4096\."),
    "gpus": ({"gpus": -1}, r"--gpus is -1, expected 0 to 4096\."),
    "restarts": ({"max_restarts": -1}, r"--max-restarts is -1, expected 0 to 2147483647\."),
    "no slots": (
        {"slots": 2},
        r"--slots is 2, expected no --slots for jobset, .* one of mpijob, mpijob-elastic, trainjob-mpi",
    ),
    "slots and gpus": (
        {"kind": "mpijob", "slots": 2, "gpus": 4},
        r"--slots is 2, expected 4, as --gpus: Horovod runs one process per GPU. Omit --slots.",
    ),
    "queue": ({"queue": "My_Queue"}, r"--queue is 'My_Queue', expected at most 63 lower-case letters, digits and"),
    "no queue": ({"queue": ""}, r"--queue is '', expected"),
    "namespace": ({"namespace": "a-"}, r"--namespace is 'a-', expected"),
    "long": ({"namespace": "a" * 64}, r"--namespace is 'a+', expected at most 63"),
    "line": ({"namespace": "a\n"}, r"--namespace is 'a\\n', expected"),
    "NUL": ({"command": ("a\0",)}, r"holds a NUL byte"),
    "bytes": ({"command": (os.fsdecode(b"\xff"),)}, r"invalid UTF-8"),
    "no folder": ({"folder": pathlib.Path("/none")}, r"--k8s needs the folder k8s/, but /none has no overlays\. "),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_jobs_are_refused(name):
    fields, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        job(**fields)
    assert str(caught.value).startswith("launch: ")


@pytest.mark.parametrize(
    "image",
    [
        *(
            "a",
            "me/it:7",
            "registry.example.com/a/b_c/d--e:v1.0-x",
            "localhost:5000/a",
            f"a:7@{DIGEST}",
            f"me/a@{DIGEST}",
        ),
        "a@sha512:" + "0" * 128,
    ],
)
def test_images(image):
    assert job(image=image).values["--image"] == image


@pytest.mark.parametrize(
    "image",
    [
        *(
            "A",
            "a b",
            "a:",
            "a:b:c",
            "a@sha256:12",
            "https://a/b",
            "a//b",
            "/a",
            "a/",
            "-a",
            "a:-b",
            'a"',
            "a#b",
            "a\n",
        ),
        *("$(a)", "a__.b", f"a@{DIGEST.upper()}"),
    ],
)
def test_what_is_no_image(image):
    with pytest.raises(ValueError, match=r"--image is .* expected NAME"):
        job(image=image)


def test_what_is_left_out_stays_as_it_is():
    assert job().values == {"--image": "me/it:7"}
    own = kubernetes.kustomization(job())
    assert own["components"] == [] and "namespace" not in own
    assert job(max_restarts=0).values["--max-restarts"] == 0
    assert job(kind="mpijob", slots=4, gpus=4, queue="q").values == {
        **{"--image": "me/it:7", "--slots": 4, "--gpus": 4, "--queue": "q"}
    }


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--k8s jobset", r"launch: --image is '', expected NAME"),
        ("--k8s nothing --image a", r"--k8s is 'nothing', expected one of 'indexed-job', "),
        (
            "--k8s jobset --image a -np 2 -H a,b --mpi",
            r"launch: -np, -H, --mpi with --k8s, expected only --k8s, --image, ",
        ),
        ("--k8s jobset --image a --grace-s 10", r"launch: --grace-s with --k8s"),  # though it is the default
        ("--k8s jobset --image a --workers 0 -- x", r"--workers is 0, expected 1 to"),
        ("--k8s jobset --image a --workers many", r"'many' is not a valid int|unable to parse"),
        ("--workers 2 --slots 4 -- true", r"launch: --workers, --slots without --k8s, expected --k8s KIND"),
        ("--image a -np 2 -- true", r"launch: --image without --k8s"),
        ("--config {file}", r"launch: --backend, -np with --k8s"),
    ],
)
def test_wrong_use(tmp_path, arguments, message):
    (tmp_path / "job.yaml").write_text("{k8s: jobset, image: a, np: 3, backend: horovod}\n")
    done = launch(*arguments.format(file=tmp_path / "job.yaml").split())
    assert done.exit_code == 2 and done.stdout == ""
    assert re.search(message, " ".join(done.stderr.replace("│", " ").split()))


def program(folder: pathlib.Path, name: str, version: str, then: str) -> None:
    text = f'#!/bin/sh\nif [ "$1" = version ]; then echo {shlex.quote(version)}; else {then}; fi\n'
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


FAILS = "echo no such thing >&2; exit 1"


@pytest.mark.parametrize(
    ("programs", "message"),
    [
        (
            {},
            r"--k8s found no kubectl on PATH, expected kubectl 1\.27 or kustomize 5\.0 or newer\.",
        ),
        (
            {"kubectl": ("Client Version: v1.26.9", "echo built")},
            r"--k8s found kubectl v1\.26 on PATH, expected kubectl 1",
        ),
        ({"kubectl": ("what?", "echo built")}, r"--k8s found kubectl of unknown version on PATH"),
        ({"kustomize": ("{Version:kustomize/v4.5.7}", "echo built")}, r"--k8s found kustomize v4\.5 on PATH"),
        ({"kubectl": ("Client Version: v1.27.0", FAILS)}, r"launch: kubectl kustomize failed: no such thing$"),
    ],
)
def test_programs_that_do_not_do(tmp_path, monkeypatch, programs, message):
    for name, (version, then) in programs.items():
        program(tmp_path, name, version, then)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    done = launch("--k8s", "jobset", "--image", "a")
    assert done.exit_code == 2 and done.stdout == ""
    assert re.search(message, done.stderr.strip())


@pytest.mark.parametrize(
    "programs",
    [{"kubectl": "v1.27.3"}, {"kustomize": "v5.0.1"}, {"kubectl": "v1.20.0", "kustomize": "v5.7.0"}],
)
def test_programs_that_do(tmp_path, monkeypatch, programs):
    """What the last of them prints is what is printed."""
    for name, version in programs.items():
        program(tmp_path, name, version, f"echo '# by {name}' \"$1\"")
    monkeypatch.setenv("PATH", f"{tmp_path}")
    done = launch("--k8s", "jobset", "--image", "a", "--dry-run")
    argument = {"kubectl": "kustomize", "kustomize": "build"}
    assert (done.exit_code, done.stdout) == (0, f"# by {name} {argument[name]}\n")


def test_the_folder_is_not_written_to_and_nothing_is_left(tmp_path, monkeypatch):
    """Also where the folder belongs to somebody else."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = {path: path.read_bytes() for path in kubernetes.FOLDER.rglob("*.yaml")}
    folder = tmp_path / "k8s"
    shutil.copytree(kubernetes.FOLDER, folder)
    for path in folder.rglob("*.yaml"):
        path.chmod(0o444)
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "kubectl", "v1.30.0", 'PATH=/usr/bin:/bin; cat "$2/../k8s/overlays/jobset/jobset.yaml"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    built = kubernetes.build(job(workers=7, folder=folder))
    assert "completions: 7 #" in built and "completions: 2 #" in (folder / "overlays/jobset/jobset.yaml").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"k8s", "bin"}
    assert before == {path: path.read_bytes() for path in kubernetes.FOLDER.rglob("*.yaml")}
