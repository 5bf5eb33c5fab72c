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
from distpad.launcher import kubernetes, kustomize
from k8s import controllers, manifests, podrules, schemas

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


def findings(resources: list[manifests.Resource]) -> list[Any]:
    return [*schemas.findings_of(resources), *controllers.findings(resources)]


def trains(pod: manifests.Resource) -> bool:
    """Whether it is not the launcher of an MPI job."""
    return "launcher" not in podrules.container(pod)["command"][2]


def named(values: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [each for each in values if each["name"] == name]
    return found


def test_all_kinds_are_known():
    assert kubernetes.kinds() == manifests.OVERLAYS


@pytest.mark.parametrize("kind", manifests.OVERLAYS)
def test_without_flags_it_is_the_overlay(kind):
    """The defaults of kubernetes.py and of k8s/base are equal."""
    resources = printed(kind, "--image", IMAGE, "--name", "train")
    for pod in manifests.pods(resources).values():
        container = podrules.container(pod)
        assert (container["image"], container["imagePullPolicy"]) == (IMAGE, "IfNotPresent")
        container.update(image="registry.example.com/distpad:current", imagePullPolicy="Always")
    assert by_name(resources) == by_name(manifests.overlay(kind))


def by_name(resources: list[manifests.Resource]) -> dict[str, Any]:
    """Resources without the order of lists of volumes and mounts, which has no meaning."""
    for pod in manifests.pods(resources).values():
        pod["spec"]["volumes"].sort(key=lambda each: each["name"])
        podrules.container(pod)["volumeMounts"].sort(key=lambda each: each["mountPath"])
    return {manifests.called(resource): resource for resource in resources}


@pytest.mark.parametrize("kind", manifests.OVERLAYS)
def test_flags_set_what_they_say(kind):
    flags = {
        **{
            "--image": "me/it:7",
            "--workers": 7,
            "--gpus": 4,
            "--max-restarts": 5,
            "--namespace": "123",
            "--name": "mine",
        },
        **{
            "--env": 'A=$(HOME) "x": y',
            "--secret": "API_KEY=wandb:key",
            "--mount": "corpus:/data:ro",
            "--queue": "1e3",
        },
        **{"--topology": "rack", "--priority-class": "high", "--node-selector": "a.b/c=d", "--timeout-s": 90},
        **{
            "--toleration": "team=vision:NoSchedule",
            "--image-pull-secret": "registry",
            "--service-account": "s3",
            "--component": "network-policy",
        },
    }
    resources = printed(kind, *[word for pair in flags.items() for word in pair], "--", *COMMAND)
    assert not findings(resources)
    assert {each["metadata"]["namespace"] for each in resources} == {"123"}
    assert {each["metadata"]["name"] for each in resources} == {"mine"}
    (job,) = manifests.of_kind(resources, *kustomize.JOBS.split("|"))
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "1e3"}
    found = manifests.scalars(resources)
    numbers = {re.sub(r".*\.", "", path): value for path, value in found.items()}
    assert numbers["activeDeadlineSeconds"] == 90
    assert (numbers.get("maxRestarts") or numbers["backoffLimit"]) == 5
    assert {numbers.get(key, 7) for key in ("completions", "parallelism", "numNodes")} <= {7, 1}  # 1: a launcher
    for pod in manifests.pods(resources).values():
        spec, container = pod["spec"], podrules.container(pod)
        assert container["image"] == "me/it:7" and container["imagePullPolicy"] == "Always"
        assert (spec["priorityClassName"], spec["serviceAccountName"]) == ("high", "s3")
        assert spec["imagePullSecrets"] == [{"name": "registry"}]
        assert named(container["env"], "A")["value"] == 'A=$(HOME) "x": y'[2:]
        assert podrules.variables(pod).get("DISTPAD_WORKERS", "7") == "7"
        assert podrules.variables(pod).get("DISTPAD_SLOTS", "4") == "4" == podrules.variables(pod)["DISTPAD_GPUS"]
        mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
        assert mounts["/data"]["readOnly"] and "readOnly" not in mounts["/checkpoints"]
        assert named(spec["volumes"], mounts["/data"]["name"])["persistentVolumeClaim"] == {"claimName": "corpus"}
        (source,) = named(spec["volumes"], mounts["/run/secrets/distpad"]["name"])["projected"]["sources"]
        assert source == {"secret": {"name": "wandb", "items": [{"key": "key", "path": "API_KEY"}]}}
        amounts = container["resources"]["limits"]
        topology = {"kueue.x-k8s.io/podset-required-topology": "rack"}
        if trains(pod):
            assert amounts == {"cpu": "32", "memory": "128Gi", "nvidia.com/gpu": "4"}
            assert named(spec["volumes"], "shm")["emptyDir"]["sizeLimit"] == "4Gi"
            assert spec["nodeSelector"] == {"a.b/c": "d"} and len(spec["tolerations"]) == 2
            assert topology.items() <= pod["metadata"]["annotations"].items()
        else:
            assert "nvidia.com/gpu" not in amounts and not spec.keys() & {"nodeSelector", "tolerations"}
            assert not topology.keys() & pod["metadata"]["annotations"].keys()
    commands = [podrules.container(pod).get("args") for pod in manifests.pods(resources).values()]
    assert [each for each in commands if each is not None] == [COMMAND]


@pytest.mark.parametrize(
    ("component", "flags"),
    [
        ("gpu", ("--gpus", 1)),
        ("kueue", ("--queue", "training")),
        ("rdma", ("--rdma", "rdma/hca", "--network-interface", "eth0")),
        ("network-policy", ("--component", "network-policy")),
        ("openshift", ("--component", "openshift")),
    ],
)
def test_flags_and_components_do_the_same(component, flags):
    name = ("--image", "registry.example.com/distpad:current", "--name", "train")
    assert by_name(printed("jobset", *name, *flags)) == by_name(manifests.with_components("jobset", (component,)))


@pytest.mark.parametrize("kind", ["jobset", "trainjob", "trainjob-mpi"])
def test_exclusive_topology_and_time_to_live(kind):
    ttl = ("--ttl-s", 60) if kind == "jobset" else ()
    resources = printed(kind, "--image", IMAGE, "--exclusive-topology", "rack", *ttl)
    assert not findings(resources)
    where = {"jobset": "metadata"}.get(kind, "spec.template.metadata")
    found = [path for path, value in manifests.scalars(resources).items() if value == "rack"]
    (path,) = [path.partition(" ")[2] for path in found]
    assert path == f"{where}.annotations.alpha.jobset.sigs.k8s.io/exclusive-topology"
    ends = [value for path, value in manifests.scalars(resources).items() if path.endswith("ttlSecondsAfterFinished")]
    assert ends == ([60] if ttl else [])


@pytest.mark.parametrize("kind", ["indexed-job", "trainjob-mpi"])
def test_each_call_prints_another_name(kind):
    """It is legal with the most pods, whose host names are the longest."""
    names = set()
    for _ in range(2):
        resources = printed(kind, "--image", IMAGE, "--workers", kubernetes.MOST_PODS)
        assert not controllers.findings(resources)
        names |= {resource["metadata"]["name"] for resource in resources}
    assert len(names) == 2


@pytest.mark.parametrize("kind", manifests.OVERLAYS)
def test_the_longest_name_is_legal(kind):
    """A job of this name passes the rules of the operators, and a longer one does not."""
    longest = 63 - len(kubernetes.KINDS[kind].suffix.format(last=1))
    resources = printed(kind, "--image", IMAGE, "--name", "n" * longest)
    assert not findings(resources)
    with pytest.raises(ValueError, match=f"expected at most {longest} characters"):
        kubernetes.Job(kind, IMAGE, name="n" * (longest + 1))


@pytest.mark.parametrize("kind", ["trainjob", "trainjob-mpi"])
def test_the_runtime_comes_before_its_job(kind):
    """kubectl applies resources in the order of the text."""
    kinds = [resource["kind"] for resource in printed(kind, "--image", IMAGE, "--", "true")]
    assert kinds.index("TrainingRuntime") < kinds.index("TrainJob") == len(kinds) - 1


def test_a_file_says_the_same(tmp_path):
    given = {"k8s": "mpijob", "image": IMAGE, "name": "n", "slots": 2, "env": {"A": "b"}, "command": COMMAND}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(given))
    done = CliRunner().invoke(app.app, ["launch", "--config", str(tmp_path / "job.yaml")])
    assert done.stdout == launch(
        "mpijob", "--image", IMAGE, "--name", "n", "--slots", 2, "--env", "A=b", "--", *COMMAND
    )


def test_the_readmes_commands_print_manifests():
    text = (manifests.FOLDER / "README.md").read_text()
    commands = re.findall(
        r"^distpad launch --k8s (.*?) \| kubectl apply .*-f -$", text.replace("\\\n", " "), re.MULTILINE
    )
    assert commands
    for command in commands:
        assert not findings(printed(*shlex.split(command)))
