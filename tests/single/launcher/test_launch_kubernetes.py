"""``distpad launch --k8s`` without a kubectl: lines that are set, jobs that are refused. tests/k8s builds real ones."""

from __future__ import annotations

import os
import pathlib
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from distpad.cli import app
from distpad.launcher import kubernetes, kustomize
from scripts import script

KINDS = ("indexed-job", "jobset", "mpijob", "mpijob-elastic", "trainjob", "trainjob-mpi")
DIGEST = "sha256:" + "0123456789abcdef" * 4


def launch(*arguments: str):
    return CliRunner().invoke(app.app, ["launch", *arguments])


def job(**fields) -> kubernetes.Job:
    return kubernetes.Job(**{"kind": "jobset", "image": "me/it:7", **fields})


# -- the kustomization ------------------------------------------------------------------------------------------------


def test_kinds_are_the_folders():
    assert kubernetes.kinds() == KINDS
    folders = {path.parent.name for path in kubernetes.FOLDER.glob("kinds/*/kustomization.yaml")}
    assert folders == {*KINDS, "mpi-pods"}
    for components in (kubernetes.COMPONENTS,):
        assert all((kubernetes.FOLDER / "components" / name).is_dir() for name in components)


@given(st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",))), min_size=1))
def test_a_command_is_written_word_for_word(words):
    patch = kustomize.pod_patch(job(command=tuple(words)))
    (container,) = yaml.safe_load(kustomize._as_yaml(patch))["spec"]["containers"]
    assert container["args"] == words


@pytest.mark.parametrize(
    ("fields", "amounts", "shm"),
    [
        ({}, ("4", "8Gi"), "1Gi"),
        ({"gpus": 8}, ("64", "256Gi"), "8Gi"),
        ({"gpus": 8, "cpu": 90, "memory": "1Ti"}, ("90", "1Ti"), "8Gi"),
        ({"memory": "2Gi"}, ("4", "2Gi"), "512Mi"),
        ({"gpus": 1, "memory": "1001Mi"}, ("8", "1001Mi"), "250Mi"),
    ],
)
def test_resources_follow_the_gpus(fields, amounts, shm):
    """/dev/shm takes part of the memory."""
    patch = kustomize.pod_patch(job(**fields))["spec"]
    found = patch["containers"][0]["resources"]
    assert found["requests"] == found["limits"] and (found["limits"]["cpu"], found["limits"]["memory"]) == amounts
    assert {"name": "shm", "emptyDir": {"sizeLimit": shm}} in patch["volumes"]


@pytest.mark.parametrize(
    ("mount", "volumes", "mounts"),
    [
        ((), {"checkpoints": "checkpoints"}, {"/checkpoints": "checkpoints"}),
        (("mine:/checkpoints",), {"checkpoints": "mine"}, {"/checkpoints": "checkpoints"}),
        (
            ("a:/x", "a:/y:ro", "checkpoints:/z"),
            {"claim-0": "a", "checkpoints": "checkpoints"},
            {"/x": "claim-0", "/y": "claim-0", "/z": "checkpoints", "/checkpoints": "checkpoints"},
        ),
    ],
)
def test_each_claim_is_one_volume(mount, volumes, mounts):
    patch = kustomize.pod_patch(job(mount=mount))["spec"]
    claims = [each for each in patch["volumes"] if "persistentVolumeClaim" in each]
    assert {each["name"]: each["persistentVolumeClaim"]["claimName"] for each in claims} == volumes
    assert {each["mountPath"]: each["name"] for each in patch["containers"][0]["volumeMounts"]} == mounts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("spot", {"key": "spot", "operator": "Exists"}),
        ("spot:NoExecute", {"key": "spot", "operator": "Exists", "effect": "NoExecute"}),
        ("a.b/c=d", {"key": "a.b/c", "operator": "Equal", "value": "d"}),
    ],
)
def test_tolerations(text, expected):
    assert kustomize.pod_patch(job(toleration=(text,)))["spec"]["tolerations"] == [expected]


# -- jobs -------------------------------------------------------------------------------------------------------------

WRONG = {
    "kind": ({"kind": "pods"}, r"--k8s is 'pods', expected one of 'indexed-job', 'jobset', 'mpijob', "),
    "a path": ({"kind": "../overlays/jobset"}, r"--k8s is '../overlays/jobset', expected one of"),
    "no image": ({"image": ""}, r"--image is '', expected NAME\[:TAG\]\[@DIGEST\] of an image .*Build and push"),
    "no slots": (
        {"slots": 2},
        r"--slots is 2, expected none for jobset. Use one of mpijob, mpijob-elastic, trainjob-mpi",
    ),
    "slots and gpus": (
        {"kind": "mpijob", "slots": 2, "gpus": 4},
        r"--slots is 2, expected 4, as --gpus: Horovod runs one process per GPU. Omit --slots.",
    ),
    "queue": ({"queue": "My_Queue"}, r"--queue is 'My_Queue', expected the name of a LocalQueue"),
    "namespace": ({"namespace": "a-"}, r"--namespace is 'a-', expected at most 63 small letters"),
    "line": ({"namespace": "a\n"}, r"--namespace is 'a\\n', expected"),
    "name": ({"name": "7b"}, r"--name is '7b', expected letters, digits and hyphens, with a letter first"),
    "long name": (
        {"name": "n" * 60},
        r"--name is n+, expected at most 48 characters. Host names such as n+-node-0-1-12345",
    ),
    "longer with more": ({"name": "n" * 48, "workers": 11}, r"--name is n+, expected at most 47 characters"),
    "memory": ({"memory": "64GB"}, r"--memory is '64GB', expected a number of Mi, Gi or Ti, such as 64Gi"),
    "env": ({"env": ("A",)}, r"--env is 'A', expected NAME=VALUE"),
    "secret": ({"secret": ("A=/run/file",)}, r"--secret is 'A=/run/file', expected NAME=SECRET:KEY"),
    "mount": ({"mount": ("data",)}, r"--mount is 'data', expected CLAIM:PATH"),
    "toleration": ({"toleration": ("a=b:Never",)}, r"--toleration is 'a=b:Never', expected KEY, KEY=VALUE or"),
    "selector": ({"node_selector": ("a",)}, r"--node-selector is 'a', expected LABEL=VALUE"),
    "topology": ({"topology": "rack"}, r"--topology is rack, expected a --queue, since it is Kueue's"),
    "exclusive": (
        {"kind": "mpijob", "exclusive_topology": "rack"},
        r"--exclusive-topology is rack, expected none for mpijob. Use one of jobset, trainjob, trainjob-mpi",
    ),
    "ttl": ({"kind": "trainjob", "ttl_s": 5}, r"--ttl-s is 5, expected none for trainjob. Use one of indexed-job, "),
    "component": ({"component": ("gpu",)}, r"--component is 'gpu', expected network-policy or openshift"),
    "openshift": (
        {"kind": "mpijob", "component": ("openshift",)},
        r"--component is openshift, expected none for mpijob",
    ),
    "NUL": ({"command": ("a\0",)}, r"COMMAND is 'a\\x00', expected words .* no NUL byte"),
    "bytes": ({"command": (os.fsdecode(b"\xff"),)}, r"invalid UTF-8"),
    "no folder": ({"folder": pathlib.Path("/none")}, r"--k8s needs the folder k8s/, but /none has no kinds\. "),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_jobs_are_refused(name):
    fields, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        job(**fields)
    assert str(caught.value).startswith("launch: ")


IMAGES = ["a", "me/it:7", "registry.example.com/a/b_c/d--e:v1.0-x", "localhost:5000/a"]


@pytest.mark.parametrize("image", [*IMAGES, f"a:7@{DIGEST}", f"me/a@{DIGEST}", "a@sha512:" + "0" * 128])
def test_images(image):
    """A tag may move, and a digest cannot."""
    (container,) = kustomize.pod_patch(job(image=image))["spec"]["containers"]
    assert (container["image"], container["imagePullPolicy"]) == (image, "IfNotPresent" if "@" in image else "Always")


NO_IMAGES = [
    "A",
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
    "$(a)",
    "a__.b",
]


@pytest.mark.parametrize("image", [*NO_IMAGES, "a b", "a\n", f"a@{DIGEST.upper()}"])
def test_what_is_no_image(image):
    with pytest.raises(ValueError, match=r"--image is .* expected NAME"):
        job(image=image)


def test_flags_that_are_left_out_change_nothing():
    assert kustomize.values(job(name="n")) == {"name": "n"}
    assert kustomize.job_patches(job()) == []
    chosen = job(kind="mpijob", name="n", workers=3, gpus=4, max_restarts=0)
    assert kustomize.values(chosen) == {"name": "n", "workers": "3", "slots": "4", "restarts": "0"}


def test_names_are_unique():
    names = {job().name for _ in range(50)}
    assert len(names) == 50 and all(name.startswith("train-") and len(name) == 11 for name in names)


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--k8s jobset", r"launch: --image is '', expected NAME"),
        ("--k8s nothing --image a", r"--k8s is 'nothing', expected one of 'indexed-job', "),
        (
            "--k8s jobset --image a -np 2 -H a,b --mpi",
            r"launch: -H, --mpi, -np with --k8s, expected only --k8s, --component, ",
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("helm", r"--k8s found no kubectl on PATH, expected kubectl or kustomize\. Needs kubectl 1\.27"),
        (
            "kubectl",
            r"launch: kubectl kustomize failed: unknown field\. Needs kubectl 1\.27 or kustomize 5\.0 or newer",
        ),
    ],
)
def test_programs_that_do_not_do(tmp_path, monkeypatch, name, message):
    script(tmp_path / name, "echo unknown field >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}")
    done = launch("--k8s", "jobset", "--image", "a")
    assert done.exit_code == 2 and done.stdout == ""
    assert re.search(message, done.stderr.strip())


@pytest.mark.parametrize(("name", "argument"), [("kubectl", "kustomize"), ("kustomize", "build")])
def test_programs_that_do(tmp_path, monkeypatch, name, argument):
    script(tmp_path / name, "echo '# by it' \"$1\"")
    monkeypatch.setenv("PATH", f"{tmp_path}")
    done = launch("--k8s", "jobset", "--image", "a", "--dry-run")
    assert (done.exit_code, done.stdout) == (0, f"# by it {argument}\n")


def test_the_folder_is_not_written_to_and_nothing_is_left(tmp_path, monkeypatch):
    """kubectl gets a folder beside it, which names k8s/ by a relative path."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name in ("tmp", "bin", "k8s/kinds"):
        (tmp_path / name).mkdir(parents=True)
    script(tmp_path / "bin" / "kubectl", 'PATH=/usr/bin:/bin; cat "$2/kustomization.yaml"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    built = yaml.safe_load(kustomize.build(job(workers=7, folder=tmp_path / "k8s")))
    assert built["resources"] == ["../../k8s/base"] and built["components"] == ["job", "../../k8s/kinds/jobset"]
    assert not list((tmp_path / "tmp").iterdir()) and not list((tmp_path / "k8s" / "kinds").iterdir())
