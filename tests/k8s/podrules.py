"""Rules for every pod of a job of any kind: references, memory, termination, security, network.

The claims and the namespace's default service account exist before the job.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from k8s import manifests
from k8s.manifests import Resource

CONTEXT = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
CONTAINERS_CONTEXT = {
    **{"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True},
    "capabilities": {"drop": ["ALL"]},
}
IDS = ("runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy")
VOLUMES = {"emptyDir", "persistentVolumeClaim", "projected", "configMap", "secret"}

Check = Callable[[Sequence[Resource]], Iterator[str]]


def container(pod: Resource) -> dict[str, Any]:
    (only,) = pod["spec"]["containers"]
    return only


def variables(pod: Resource) -> dict[str, Any]:
    """Variables by name; None if the value comes from a reference."""
    return {each["name"]: each.get("value") for each in container(pod).get("env", ())}


def references(resources: Sequence[Resource]) -> Iterator[str]:
    """References of a pod resolve: volumes, and the variables in its arguments."""
    for path, pod in manifests.pods(resources).items():
        spec, only = pod["spec"], container(pod)
        volumes = [volume["name"] for volume in spec.get("volumes", ())]
        mounts = only.get("volumeMounts", ())
        yield from (f"{path}: no volume {each['name']}" for each in mounts if each["name"] not in volumes)
        paths = [each["mountPath"] for each in mounts]
        yield from (f"{path}: {each} is mounted twice" for each in sorted(set(paths)) if paths.count(each) > 1)
        names = [each["name"] for each in only.get("env", ())]
        yield from (f"{path}: {name} is set twice" for name in sorted(set(names)) if names.count(name) > 1)
        yield from (f"{path}: {name} is empty" for name, value in variables(pod).items() if value == "")
        for word in (*only.get("command", ()), *only.get("args", ())):
            yield from (f"{path}: no variable {name}" for name in re.findall(r"\$\((\w+)\)", word) if name not in names)
        yield from (
            f"{path}: {where} is {value}" for where, value in manifests.walk(pod) if value == "from values.yaml"
        )


def shared_memory(resources: Sequence[Resource]) -> Iterator[str]:
    """/dev/shm is memory with a limit within the container's limit."""
    for path, pod in manifests.pods(resources).items():
        mounted = {each["mountPath"]: each["name"] for each in container(pod).get("volumeMounts", ())}
        volumes = {volume["name"]: volume.get("emptyDir", {}) for volume in pod["spec"].get("volumes", ())}
        found = volumes.get(mounted.get("/dev/shm"), {})
        if found.get("medium") != "Memory" or "sizeLimit" not in found:
            yield f"{path}: /dev/shm is {found}"
        elif gibibytes(found["sizeLimit"]) >= gibibytes(
            container(pod)["resources"].get("limits", {}).get("memory", "0Gi")
        ):
            yield f"{path}: /dev/shm may take all of the memory"


def gibibytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()
    return int(number) / {"Mi": 1024, "Gi": 1}[unit]


def resources_are_limits(resources: Sequence[Resource]) -> Iterator[str]:
    """Requests equal limits. Kubernetes requires it for GPUs; for other resources, it protects pods from eviction."""
    for path, pod in manifests.pods(resources).items():
        found = container(pod)["resources"]
        if found.get("requests") != found.get("limits") or not {"cpu", "memory"} <= set(found.get("limits", {})):
            yield f"{path}: {found}"


def time_to_end(resources: Sequence[Resource]) -> Iterator[str]:
    """The entry point kills the training before Kubernetes kills the pod."""
    for path, pod in manifests.pods(resources).items():
        words = container(pod)["command"]
        grace = float(words[words.index("--grace-s") + 1]) if "--grace-s" in words else 0
        if grace >= pod["spec"].get("terminationGracePeriodSeconds", 30):
            yield f"{path}: --grace-s {grace:g} is more than the pod has"


def security(resources: Sequence[Resource]) -> Iterator[str]:
    """Beyond the standard *restricted*: no token, no sidecar, no secret in a variable."""
    for path, pod in manifests.pods(resources).items():
        spec, only = pod["spec"], container(pod)
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{path}: gets a token"
        if pod["metadata"]["labels"].get("sidecar.istio.io/inject") != "false":
            yield f"{path}: gets a sidecar, which never ends"
        if variables(pod).get("HOME") not in [each["mountPath"] for each in only["volumeMounts"]]:
            yield f"{path}: HOME cannot be written"
        taken = [*only.get("envFrom", ()), *(each.get("valueFrom", {}) for each in only.get("env", ()))]
        yield from (f"{path}: a secret in a variable" for each in taken if set(each) & {"secretRef", "secretKeyRef"})
        shown = " ".join([*only.get("command", ()), *only.get("args", ()), *map(str, variables(pod).values())])
        yield from (f"{path}: {word}" for word in re.findall(r"(?i)\S*(?:password|api[_-]?key)\S*", shown))


def restricted(resources: Sequence[Resource]) -> Iterator[str]:
    """More than Kubernetes's standard *restricted* asks: these contexts and no others, and nothing of the host."""
    for path, pod in manifests.pods(resources).items():
        spec, context = pod["spec"], pod["spec"].get("securityContext", {})
        if {name: value for name, value in context.items() if name not in IDS} != CONTEXT or context.get(IDS[0]) == 0:
            yield f"{path}: the context is {context}"
        if container(pod).get("securityContext") != CONTAINERS_CONTEXT:
            yield f"{path}: the container's context is {container(pod).get('securityContext')}"
        yield from (f"{path}: {name}" for name in ("initContainers", "ephemeralContainers") if name in spec)
        kinds = {kind for volume in spec["volumes"] for kind in volume} - {"name"}
        yield from (f"{path}: a volume of {kind}" for kind in sorted(kinds - VOLUMES))
        yield from (f"{path}: {where}" for where, _ in manifests.walk(pod) if re.search(r"\.host\w*$", where))


def network(resources: Sequence[Resource]) -> Iterator[str]:
    """A policy selects all pods of the job, and allows TCP between them at all ports, and DNS."""
    policies = manifests.of_kind(resources, "NetworkPolicy")
    if not policies:
        return
    spec = policies[0]["spec"]
    chosen = spec["podSelector"].get("matchLabels", {})
    for path, pod in manifests.pods(resources).items():
        if not chosen or not chosen.items() <= pod["metadata"].get("labels", {}).items():
            yield f"{path}: is not chosen by {chosen}"
    own = [{"podSelector": {"matchLabels": chosen}}]
    if spec.get("policyTypes") != ["Ingress", "Egress"]:
        yield f"policyTypes are {spec.get('policyTypes')}"
    if spec.get("ingress") != [{"from": own, "ports": [{"protocol": "TCP"}]}]:
        yield f"ingress is {spec.get('ingress')}"
    inside, *others = spec.get("egress") or [None]
    if inside != {"to": own, "ports": [{"protocol": "TCP"}]}:
        yield f"egress begins with {inside}"
    dns = [{"protocol": protocol, "port": port} for port in (53, 5353) for protocol in ("UDP", "TCP")]
    if others != [{"ports": dns}]:
        yield f"egress beyond the job is {others}"


RULES: tuple[Check, ...] = (references, shared_memory, resources_are_limits, time_to_end, security, restricted, network)
