"""k8s/: each overlay builds, alone and with components, passes all checks, and contains each number once."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest
import yaml

from k8s import controllers, manifests, podrules, schemas

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("manifests")]  # builds are cached


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
    assert sorted(kinds) == sorted([*wanted, *(["NetworkPolicy"] if "network-policy" in components else [])])
    assert {resource["metadata"]["name"] for resource in resources} == {"train"}
    assert len(manifests.pods(resources)) == (2 if "mpi" in overlay else 1)
    assert not schemas.findings_of(resources)
    assert not [each for each in controllers.findings(resources) if not expected(each, components)]


def expected(finding: str, components: Sequence[str]) -> bool:
    """RDMA needs a capability that the standard forbids, and OpenShift assigns the group that can read ssh's keys."""
    is_rdma = "rdma" in components and "IPC_LOCK" in finding
    return is_rdma or ("openshift" in components and "no fsGroup: keys cannot be read" in finding)


def test_the_overlays_are_the_kinds():
    for overlay in manifests.OVERLAYS:
        assert manifests.overlay(overlay) == manifests.with_components(overlay, ())


def test_folders_are_those_that_are_tested():
    for folder, names in (("overlays", manifests.OVERLAYS), ("components", manifests.COMPONENTS)):
        assert sorted(path.name for path in (manifests.FOLDER / folder).iterdir()) == sorted(names)


def test_checkpoints_and_data_outlive_the_job():
    """No job contains a claim, which ``kubectl delete -k`` would delete with it."""
    claim = yaml.safe_load((manifests.FOLDER / "checkpoints.yaml").read_text())
    assert not schemas.findings(claim)
    for overlay in manifests.OVERLAYS:
        volumes = [
            each for pod in manifests.pods(manifests.overlay(overlay)).values() for each in pod["spec"]["volumes"]
        ]
        claims = {each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each}
        assert claims == {claim["metadata"]["name"]}


@pytest.mark.parametrize("overlay", manifests.OVERLAYS)
def test_users_set_the_image_once(overlay, place):
    name = "registry.example.com/distpad"
    resources = manifests.build_own(place, overlay, images=[{"name": name, "newName": "mine/it", "newTag": "7"}])
    assert {podrules.container(pod)["image"] for pod in manifests.pods(resources).values()} == {"mine/it:7"}


@pytest.mark.parametrize(
    "dockerfile", sorted((manifests.FOLDER / "image").glob("Dockerfile")), ids=lambda path: path.name
)
def test_images_have_the_pods_user(dockerfile):
    """sshd and Python look up the user's name, which an image defines for one user only."""
    for overlay in manifests.OVERLAYS:
        for pod in manifests.pods(manifests.overlay(overlay)).values():
            context = pod["spec"]["securityContext"]
            assert f"USER {context['runAsUser']}:{context['runAsGroup']}" in dockerfile.read_text().splitlines()


# component | the paths that it changes, after the pod's own
CHANGES = {
    "kueue": {r"metadata\.labels\.kueue\.x-k8s\.io/queue-name"},
    "openshift": {r"securityContext\.(runAsUser|runAsGroup|fsGroup|fsGroupChangePolicy)"},
    "gpu": {r"env\.\d+\.(name|value.*)", r"resources\.\w+\.(cpu|memory|nvidia\.com/gpu)", r"spec\.tolerations\.0\.\w+"},
    "rdma": {r"resources\.\w+\.rdma/hca", r"capabilities\.add\.0", r"env\.\d+\.(name|value.*)"},
}


@pytest.mark.parametrize("component", CHANGES)
def test_a_component_changes_the_pods_that_train(component):
    """Launchers of MPI jobs get no devices."""
    for overlay in manifests.OVERLAYS:
        before, after = (manifests.scalars(manifests.with_components(overlay, each)) for each in ((), (component,)))
        changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
        assert changed and not [p for p in changed if not any(re.search(f"{rule}$", p) for rule in CHANGES[component])]
        if component in ("gpu", "rdma"):
            launcher = {"mpijob": ".Launcher.", "mpijob-elastic": ".Launcher.", "trainjob-mpi": "replicatedJobs.1."}
            alike = launcher.get(overlay, "no launcher")
            assert not [path for path in changed if alike in path and ".env." not in path]


# -- values are written once ------------------------------------------------------------------------------------------

# overlay | value | the number of places that depend on it
VALUES = {
    "indexed-job": {"name": 6, "workers": 3, "restarts": 1},
    "jobset": {"name": 2, "workers": 3, "restarts": 1},
    "mpijob": {"name": 3, "workers": 2, "slots": 2, "restarts": 1},
    "mpijob-elastic": {"name": 3, "workers": 2, "slots": 2, "restarts": 1},
    "trainjob": {"name": 4, "workers": 3, "restarts": 1},
    "trainjob-mpi": {"name": 5, "workers": 3, "slots": 3, "restarts": 1},
}


@pytest.mark.parametrize("overlay", VALUES)
def test_a_value_is_written_once(overlay, tmp_path):
    """A change of base/values.yaml changes all dependent values, and no others."""
    shutil.copytree(manifests.FOLDER, tmp_path / "k8s")
    chosen = tmp_path / "k8s" / "base" / "values.yaml"
    given = yaml.safe_load(chosen.read_text())
    given["data"] = {"name": "mine", "workers": "7", "slots": "5", "restarts": "9"}
    chosen.write_text(yaml.safe_dump(given))
    resources = manifests.build(tmp_path / "k8s" / "overlays" / overlay)
    before, after = (list(manifests.scalars(each).values()) for each in (manifests.overlay(overlay), resources))
    assert len(before) == len(after)
    changed = [str(new) for old, new in zip(before, after) if old != new]
    assert {key: changed.count(value) for key, value in given["data"].items() if value in changed} == VALUES[overlay]
    assert len(changed) == sum(VALUES[overlay].values())
    assert not controllers.findings(resources) and not schemas.findings_of(resources)


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
    "folder",
    [f"overlays/{name}" for name in manifests.OVERLAYS] + [f"components/{name}" for name in manifests.COMPONENTS],
)
def test_a_readme_says_what_to_do(folder):
    text = (manifests.FOLDER / folder / "README.md").read_text()
    if folder.startswith("overlays"):
        for word in ("Needs", "Apply", "Watch", "Logs", "Resize", "Delete"):
            assert f"**{word}**" in text, word
        assert f"k8s/{folder}" in text
    assert f"({folder}/)" in (manifests.FOLDER / "README.md").read_text()


def test_the_kustomization_of_the_readme_builds(place):
    (block,) = re.findall(r"```yaml\n(.*?)```", (manifests.FOLDER / "README.md").read_text(), re.DOTALL)
    given = yaml.safe_load(block)
    components = [pathlib.Path(each).name for each in given.pop("components")]
    (kind,) = [name for name in components if name in manifests.OVERLAYS]
    assert given.pop("resources") == ["../k8s/base"]
    resources = manifests.build_own(place, kind, [name for name in components if name != kind], **given)
    assert {resource["metadata"]["namespace"] for resource in resources} == {"training"}
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
