"""``distpad launch --k8s`` prints the manifests that kubectl builds from k8s/, with only the job's values changed."""

from __future__ import annotations

import os
import re
import shlex
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from distpad.cli import app
from distpad.launcher import kubernetes
from k8s import controllers, manifests, podrules, restricted, schemas

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("manifests")]  # builds are cached

IMAGE = "registry.mycompany.com:5000/me/training:7@sha256:" + "0123456789abcdef" * 4
COMMAND = [
    "python",
    "train.py",
    "--backend=$(DISTPAD_BACKEND)",
    "",
    "a b",
    "yes",
    "1e3",
    "é😀\n",
    '"',
    "'",
    "- a: #",
    "--elastic",
]
# path of a changed value | the value, by the flag that sets it
PLACES = {
    r"metadata\.namespace": "--namespace",
    r"metadata\.labels\.kueue\.x-k8s\.io/queue-name": "--queue",
    r"containers\.0\.image": "--image",
    r"completions|parallelism|Worker\.replicas|numNodes|DISTPAD_WORKERS": "--workers",
    r"slotsPerWorker|numProcPerNode|DISTPAD_SLOTS": "--slots",
    r"(limits|requests)\.nvidia\.com/gpu": "--gpus",
    r"backoffLimit|maxRestarts|DISTPAD_MAX_RESTARTS": "--max-restarts",
}


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    """The kubectl of the other tests."""
    monkeypatch.setenv("PATH", f"{os.path.dirname(manifests.kubectl())}{os.pathsep}{os.environ['PATH']}")


def launch(*arguments: object) -> str:
    done = CliRunner().invoke(app.app, ["launch", "--k8s", *map(str, arguments)])
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    return done.stdout


def printed(*arguments: object) -> list[manifests.Resource]:
    return list(yaml.safe_load_all(launch(*arguments)))


def scalars(resources: list[manifests.Resource]) -> dict[str, Any]:
    """All values by path, without arguments; variables by name."""
    found = {path: value for path, value in manifests.scalars(resources).items() if ".args" not in path}
    named = {path.removesuffix("name") + "value": name for path, name in found.items() if ".env." in path}
    return {f"{path} {named[path]}" if path in named else path: value for path, value in found.items()}


def arguments(resources: list[manifests.Resource]) -> list[Any]:
    return [
        args for pod in manifests.pods(resources).values() if (args := podrules.container(pod).get("args")) is not None
    ]


def differences(before: list[manifests.Resource], after: list[manifests.Resource]) -> dict[str, set[str]]:
    """The values that differ, by the flag that may set them."""
    old, new = scalars(before), scalars(after)
    added = {path.partition(" ")[2] for path in new.keys() - old.keys()}
    assert old.keys() <= new.keys() and added <= {"metadata.namespace"}
    found: dict[str, set[str]] = {}
    for path, value in new.items():
        if old.get(path) != value:
            (flag,) = [flag for rule, flag in PLACES.items() if re.search(rf"(\b|_)({rule})$", path)]
            found.setdefault(flag, set()).add(str(value))
    return found


def findings(resources: list[manifests.Resource]) -> list[Any]:
    return [*schemas.findings_of(resources), *controllers.findings(resources), *restricted.findings_of(resources)]


def test_all_kinds_are_known():
    assert kubernetes.kinds() == manifests.OVERLAYS


@pytest.mark.parametrize("kind", manifests.OVERLAYS)
def test_with_nothing_said_it_is_the_overlay(kind):
    before, after = manifests.overlay(kind), printed(kind, "--image", IMAGE)
    assert differences(before, after) == {"--image": {IMAGE}}
    assert arguments(after) == arguments(before)
    assert not findings(after)


@pytest.mark.parametrize("kind", manifests.OVERLAYS)
def test_what_is_said_stands_where_it_belongs(kind):
    before = manifests.with_components(kind, ("gpu", "kueue"))
    flags = {"--image": IMAGE, "--workers": 7, "--gpus": 4, "--queue": "1e3", "--namespace": "123", "--max-restarts": 5}
    after = printed(kind, *[word for pair in flags.items() for word in pair], "--", *COMMAND)
    expected = {flag: {str(value)} for flag, value in flags.items()}
    if "mpi" in kind:
        expected["--slots"] = {"4"}
    assert differences(before, after) == expected
    assert arguments(after) == [COMMAND]
    assert not findings(after)


@pytest.mark.parametrize("kind", [kind for kind in manifests.OVERLAYS if "mpi" in kind])
def test_slots(kind):
    after = printed(kind, "--image", IMAGE, "--slots", 3)
    assert differences(manifests.overlay(kind), after) == {"--image": {IMAGE}, "--slots": {"3"}}
    assert not findings(after)


def test_each_component_alone():
    for component, flags in (("gpu", ("--gpus", 1)), ("kueue", ("--queue", "training"))):
        after = printed("jobset", "--image", IMAGE, *flags)
        assert differences(manifests.with_components("jobset", (component,)), after) == {"--image": {IMAGE}}


@pytest.mark.parametrize("kind", ["trainjob", "trainjob-mpi"])
def test_the_runtime_comes_before_its_job(kind):
    """kubectl applies resources in the order of the text."""
    kinds = [resource["kind"] for resource in printed(kind, "--image", IMAGE, "--", "true")]
    assert kinds.index("TrainingRuntime") < kinds.index("TrainJob") == len(kinds) - 1


def test_a_file_says_the_same(tmp_path):
    (tmp_path / "job.yaml").write_text(
        yaml.safe_dump({"k8s": "mpijob", "image": IMAGE, "slots": 2, "command": COMMAND})
    )
    done = CliRunner().invoke(app.app, ["launch", "--config", str(tmp_path / "job.yaml")])
    assert done.stdout == launch("mpijob", "--image", IMAGE, "--slots", 2, "--", *COMMAND)


def test_the_readmes_commands_print_manifests():
    text = (manifests.FOLDER / "README.md").read_text()
    commands = re.findall(
        r"^distpad launch --k8s (.*?) \| kubectl apply .*-f -$", text.replace("\\\n", " "), re.MULTILINE
    )
    assert commands
    for command in commands:
        assert not findings(printed(*shlex.split(command)))
