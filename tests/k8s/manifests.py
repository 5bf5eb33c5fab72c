"""The manifests of k8s/ as kubectl builds them, alone and with components, and the pods in them."""

from __future__ import annotations

import copy
import functools
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

import needs

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "k8s"
OVERLAYS = ("indexed-job", "jobset", "mpijob", "mpijob-elastic", "trainjob", "trainjob-mpi")
COMPONENTS = ("gpu", "kueue", "network-policy", "openshift", "rdma")
AFTER_KIND = ("kueue",)  # the others patch the pod, before a kind copies it
COMBINATIONS = ((), *((each,) for each in COMPONENTS), COMPONENTS)
TOOLS = pathlib.Path(os.environ.get("DISTPAD_ENVS") or ROOT / ".envs") / "k8s-tools" / "bin"
OLDEST_KUBECTL = (1, 27)

Resource = dict[str, Any]


# -- programs ---------------------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """A program that tests/k8s/tools.sh installs."""
    found = shutil.which(str(TOOLS / name)) or shutil.which(name)
    if found is None:
        needs.missing(f"{name} is missing. Run tests/k8s/tools.sh, which puts it into {TOOLS}.")
    return str(found)


@functools.cache
def kubectl() -> str:
    """The kubectl on PATH if it is new enough, else the one that tools.sh installs."""
    found = shutil.which("kubectl")
    return found if found and version(found) >= OLDEST_KUBECTL else tool(str(TOOLS / "kubectl"))


def version(program: str) -> tuple[int, int]:
    """The version of a kubectl; (0, 0) if it cannot be run."""
    done = subprocess.run([program, "version", "--client"], capture_output=True, text=True, timeout=60)
    found = re.search(r"v(\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


# -- building ---------------------------------------------------------------------------------------------------------


def build(folder: pathlib.Path | str) -> list[Resource]:
    """Build the manifests that ``kubectl apply -k`` would apply.

    Raises:
      ValueError: kustomize fails or warns.
    """
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    if done.returncode or done.stderr:
        raise ValueError(done.stderr)
    return list(yaml.load_all(done.stdout, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def build_own(place: pathlib.Path, overlay: str, components: Sequence[str] = (), **more: Any) -> list[Resource]:
    """Build a user's kustomization of a kind of job, next to a copy of k8s/ at ``place``."""
    if not (place / "k8s").exists():
        shutil.copytree(FOLDER, place / "k8s")
    own = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../k8s/base"],
        "components": [
            *(f"../k8s/components/{name}" for name in components if name not in AFTER_KIND),
            f"../k8s/kinds/{overlay}",
            *(f"../k8s/components/{name}" for name in components if name in AFTER_KIND),
        ],
        "sortOptions": {"order": "fifo"},
        **more,
    }
    (place / "mine").mkdir(exist_ok=True)
    (place / "mine" / "kustomization.yaml").write_text(yaml.safe_dump(own))
    return build(place / "mine")


@functools.cache
def _place() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="distpad-manifests-")


@functools.cache
def _built(overlay: str, components: tuple[str, ...]) -> list[Resource]:
    return build_own(pathlib.Path(_place().name), overlay, components)


def with_components(overlay: str, components: Sequence[str]) -> list[Resource]:
    """A copy of a kind with some of COMPONENTS, built by ``build_own``, which callers may change."""
    return copy.deepcopy(_built(overlay, tuple(components)))


@functools.cache
def _built_alone(overlay: str) -> list[Resource]:
    return build(FOLDER / "overlays" / overlay)


def overlay(name: str) -> list[Resource]:
    """A copy of one of OVERLAYS, which callers may change."""
    return copy.deepcopy(_built_alone(name))


# -- looking into them ------------------------------------------------------------------------------------------------


def called(resource: Resource) -> str:
    return f"{resource['kind']}/{resource['metadata']['name']}"


def of_kind(resources: Sequence[Resource], *kinds: str) -> list[Resource]:
    return [resource for resource in resources if resource["kind"] in kinds]


def find(resources: Sequence[Resource], name: str) -> Resource:
    """The resource with a kind and name, such as Job/train."""
    (found,) = [resource for resource in resources if called(resource) == name]
    return found


def nested(resource: Resource) -> Iterator[tuple[str, str, Resource]]:
    """The templates in a resource at any depth, as the objects made from them: ``(path, "Job" or "Pod", object)``."""
    for path, value in walk(resource):
        spec = value.get("spec") if isinstance(value, dict) else None
        if not path.endswith("template") or not isinstance(spec, dict):
            continue
        metadata = {"name": "template", **value.get("metadata", {})}
        if "containers" in spec:
            yield path, "Pod", {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        elif "template" in spec:
            yield path, "Job", {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def pods(resources: Sequence[Resource]) -> dict[str, Resource]:
    """All pods by path. A change of a pod changes the manifest."""
    return {
        f"{called(resource)} {path}": found
        for resource in resources
        for path, kind, found in nested(resource)
        if kind == "Pod"
    }


def jobs(resources: Sequence[Resource]) -> dict[str, Resource]:
    """All Jobs: in the manifests, and in the templates of operators."""
    own = {called(resource): resource for resource in of_kind(resources, "Job")}
    made = {
        f"{called(resource)} {path}": found
        for resource in resources
        for path, kind, found in nested(resource)
        if kind == "Job"
    }
    return {**own, **made}


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All values in a manifest, with their dotted paths."""
    yield path, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from walk(each, f"{path}.{key}" if path else str(key))


def scalars(resources: Sequence[Resource]) -> dict[str, Any]:
    """All scalars by their paths, to compare two builds."""
    return {
        f"{called(resource)} {path}": value
        for resource in resources
        for path, value in walk(resource)
        if not isinstance(value, (dict, list)) or not value
    }


def at(value: Any, path: str) -> Any:
    """The value at a dotted path."""
    for key in filter(None, path.split(".")):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def put(value: Any, path: str, new: Any) -> None:
    """Set the value at a dotted path. None removes it; ``-`` appends to a list."""
    above, _, key = path.rpartition(".")
    place = at(value, above)
    if key == "-":
        place.append(new)
    elif new is None:
        del place[int(key) if isinstance(place, list) else key]
    else:
        place[int(key) if isinstance(place, list) else key] = new


def changed(name: str, resource: str, path: str, new: Any) -> list[Resource]:
    """A kind with a network policy, and with one value changed."""
    resources = with_components(name, ("network-policy",))
    put(find(resources, resource), path, new)
    return resources
