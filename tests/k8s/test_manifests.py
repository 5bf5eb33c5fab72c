"""k8s/: each overlay builds, alone and with components, passes all checks, and contains each number once."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from k8s import controllers, manifests, podrules, restricted, schemas

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("manifests")]  # builds are cached

JOB, JOBSET, MPIJOB, TRAINJOB = "Job/train", "JobSet/train", "MPIJob/train", "TrainJob/train"
MULTIWORKER, MPI = "TrainingRuntime/distpad-multiworker", "TrainingRuntime/distpad-mpi"
NODE = "spec.replicatedJobs.0.template"
REPLICAS, NODES = "spec.mpiReplicaSpecs.Worker.replicas", "spec.trainer.numNodes"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a copy of k8s/, for kustomizations next to it."""
    return tmp_path_factory.mktemp("users")


# -- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", manifests.OVERLAYS)
@pytest.mark.parametrize(
    "components",
    [
        pytest.param(chosen, id="+".join(chosen) or "alone", marks=[pytest.mark.wide] if len(chosen) == 1 else [])
        for chosen in manifests.COMBINATIONS
    ],
)
def test_it_builds_and_all_checks_pass(overlay, components):
    """The required resources exist, since a check of no resources passes as well."""
    resources = manifests.with_components(overlay, components) if components else manifests.overlay(overlay)
    kinds = [resource["kind"] for resource in resources]
    own = {"indexed-job": ["Job", "Service"], "jobset": ["JobSet"], "trainjob": ["TrainingRuntime", "TrainJob"]}
    wanted = own.get(overlay) or (["MPIJob"] if overlay.startswith("mpijob") else own["trainjob"])
    always = ["NetworkPolicy", "PersistentVolumeClaim", "PersistentVolumeClaim", "ServiceAccount"]
    assert sorted(kinds) == sorted([*always, *wanted])
    assert len(manifests.pods(resources)) == (2 if "mpi" in overlay else 1)
    assert not schemas.findings_of(resources)
    assert not controllers.findings(resources)
    assert not restricted.findings_of(resources)


def test_folders_are_those_that_are_tested():
    for folder, names in (("overlays", manifests.OVERLAYS), ("components", manifests.COMPONENTS)):
        assert sorted(path.name for path in (manifests.FOLDER / folder).iterdir()) == sorted(names)


@pytest.mark.parametrize("overlay", manifests.OVERLAYS)
def test_users_set_the_image_once(overlay, place):
    name = "registry.example.com/distpad"
    resources = manifests.build_own(place, overlay, images=[{"name": name, "newName": "mine/it", "newTag": "7"}])
    images = {
        container["image"] for pod in manifests.pods(resources).values() for container in pod["spec"]["containers"]
    }
    assert images == {"mine/it:7"}


@pytest.mark.parametrize(
    "dockerfile", sorted((manifests.FOLDER / "image").glob("Dockerfile")), ids=lambda path: path.name
)
def test_images_have_the_pods_user(dockerfile):
    """sshd and Python look up the user's name, which an image defines for one user only."""
    for overlay in manifests.OVERLAYS:
        for pod in manifests.pods(manifests.overlay(overlay)).values():
            context = pod["spec"]["securityContext"]
            assert f"USER {context['runAsUser']}:{context['runAsGroup']}" in dockerfile.read_text().splitlines()


def test_kueue_holds_a_job_back_and_changes_nothing_else():
    for overlay in manifests.OVERLAYS:
        before, after = (manifests.scalars(manifests.with_components(overlay, chosen)) for chosen in ((), ("kueue",)))
        added = {path.split()[1]: value for path, value in after.items() - before.items()}
        suspend = "spec.runPolicy.suspend" if "mpijob" in overlay else "spec.suspend"
        assert added == {"metadata.labels.kueue.x-k8s.io/queue-name": "training", suspend: True}
        assert before.items() <= after.items()


@pytest.mark.parametrize("overlay", manifests.OVERLAYS)
def test_gpus_are_for_those_who_train(overlay, place):
    manifests.build_own(place, overlay)  # makes the copy
    chosen = place / "k8s" / "components" / "gpu" / "gpus.yaml"
    text = chosen.read_text()
    try:
        chosen.write_text(text.replace('each: "1"', 'each: "4"'))
        resources = manifests.build_own(place, overlay, ("gpu",))
    finally:
        chosen.write_text(text)
    for path, pod in manifests.pods(resources).items():
        (container,) = pod["spec"]["containers"]
        gpus = {kind: str(container["resources"][kind].get("nvidia.com/gpu")) for kind in ("requests", "limits")}
        trains = "launcher" not in container["command"][2]
        assert gpus == dict.fromkeys(("requests", "limits"), "4" if trains else "None"), path
        assert ("tolerations" in pod["spec"]) == trains
    assert not controllers.findings(resources) and not schemas.findings_of(resources)
    slots = {path: value for path, value in manifests.scalars(resources).items() if "slots" in path.lower()}
    slots |= {
        path: value for path, value in manifests.scalars(resources).items() if path.endswith("mpi.numProcPerNode")
    }
    assert {str(value) for value in slots.values()} <= {"4"} and bool(slots) == ("mpi" in overlay)


# -- numbers are written once -----------------------------------------------------------------------------------------


JOB_OF_NODE = f"{JOBSET} {NODE}.spec"
# overlay | file | the number's key | all values that depend on it
NUMBERS = (
    ("indexed-job", "job.yaml", "completions", {f"{JOB} spec.completions", f"{JOB} spec.parallelism", f"{JOB} WORKERS"}),
    ("jobset", "jobset.yaml", "completions", {f"{JOB_OF_NODE}.completions", f"{JOB_OF_NODE}.parallelism", f"{JOBSET} WORKERS"}),
    ("mpijob", "mpijob.yaml", "replicas", {f"{MPIJOB} {REPLICAS}", f"{MPIJOB} WORKERS"}),
    ("mpijob", "mpijob.yaml", "slotsPerWorker", {f"{MPIJOB} spec.slotsPerWorker", f"{MPIJOB} SLOTS"}),
    ("mpijob-elastic", "elastic.yaml", "replicas", {f"{MPIJOB} {REPLICAS}", f"{MPIJOB} WORKERS"}),
    ("mpijob-elastic", "elastic.yaml", "slotsPerWorker", {f"{MPIJOB} spec.slotsPerWorker", f"{MPIJOB} SLOTS"}),
    ("trainjob", "trainjob.yaml", "numNodes", {f"{TRAINJOB} {NODES}", f"{MULTIWORKER} spec.mlPolicy.numNodes", f"{MULTIWORKER} WORKERS"}),
    ("trainjob-mpi", "trainjob.yaml", "numNodes", {f"{TRAINJOB} {NODES}", f"{MPI} spec.mlPolicy.numNodes", f"{MPI} WORKERS"}),
    ("trainjob-mpi", "trainjob.yaml", "numProcPerNode", {f"{TRAINJOB} spec.trainer.numProcPerNode", f"{MPI} spec.mlPolicy.mpi.numProcPerNode", f"{MPI} SLOTS"}),
)  # fmt: skip


@pytest.mark.parametrize(("overlay", "file", "key", "places"), NUMBERS, ids=lambda value: str(value)[:20])
def test_a_number_is_written_once(overlay, file, key, places, tmp_path):
    """A change of the number in its one place changes all dependent values, and no others."""
    shutil.copytree(manifests.FOLDER, tmp_path / "k8s")
    chosen = tmp_path / "k8s" / "overlays" / overlay / file
    text, count = re.subn(rf"(?m)^( *{key}): \d+ (#.*the only place.*)$", r"\1: 7 \2", chosen.read_text())
    assert count == 1
    chosen.write_text(text)
    resources = manifests.build(tmp_path / "k8s" / "overlays" / overlay)
    before, after = manifests.scalars(manifests.overlay(overlay)), manifests.scalars(resources)
    changed = {path: value for path, value in after.items() if before.get(path) != value}
    assert before.keys() == after.keys() and {str(value) for value in changed.values()} == {"7"}
    named = {re.sub(r" \S*\.env\.\d+\.value$", f" {name_of_variable(resources, path)}", path) for path in changed}
    assert named == places
    assert not controllers.findings(resources)


def name_of_variable(resources, path):
    name, _, inner = path.partition(" ")
    if not inner.endswith(".value"):
        return ""
    return manifests.at(manifests.find(resources, name), inner.removesuffix(".value"))["name"].removeprefix("DISTPAD_")


# -- files ------------------------------------------------------------------------------------------------------------


def yamllint(folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "yamllint", "--strict", "--config-file", str(manifests.FOLDER / ".yamllint"), "."]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_yaml_is_tidy(tmp_path):
    done = yamllint(manifests.FOLDER)
    assert done.returncode == 0, done.stdout
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    assert "duplication of key" in yamllint(tmp_path).stdout


@pytest.mark.parametrize(
    "folder", [f"overlays/{name}" for name in manifests.OVERLAYS] + ["components/gpu", "components/kueue"]
)
def test_a_readme_says_what_to_do(folder):
    text = (manifests.FOLDER / folder / "README.md").read_text()
    if folder.startswith("overlays"):
        for word in ("Needs", "Apply", "Watch", "Logs", "Resize", "Delete"):
            assert f"**{word}**" in text, word
        assert f"k8s/{folder}" in text
    assert f"({folder}/)" in (manifests.FOLDER / "README.md").read_text()


def test_the_kustomization_of_the_readme_builds(place):
    """With all options together: components, image, namespace, a storage class."""
    (block,) = re.findall(r"```yaml\n(.*?)```", (manifests.FOLDER / "README.md").read_text(), re.DOTALL)
    given = yaml.safe_load(block)
    (base,) = given.pop("resources")
    overlay, components = pathlib.Path(base).name, [pathlib.Path(each).name for each in given.pop("components")]
    resources = manifests.build_own(place, overlay, components, **given)
    assert {resource["metadata"]["namespace"] for resource in resources} == {"training"}
    claims = manifests.of_kind(resources, "PersistentVolumeClaim")
    assert {claim["spec"]["storageClassName"] for claim in claims} == {"shared-files"}
    (pod,) = manifests.pods(resources).values()
    assert "@sha256:" in podrules.container(pod)["image"]
    assert not schemas.findings_of(resources) and not controllers.findings(resources)


@pytest.mark.parametrize(
    "readme", sorted(str(path.relative_to(manifests.FOLDER)) for path in manifests.FOLDER.rglob("*.md"))
)
def test_links_lead_somewhere(readme):
    path = manifests.FOLDER / readme
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        file, _, heading = link.partition("#")
        if file.startswith("https:"):
            continue
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), link
        headings = re.findall(r"(?m)^#+ (.*)$", found.read_text()) if heading else []
        assert not heading or heading in [each.lower().replace(" ", "-") for each in headings], link
