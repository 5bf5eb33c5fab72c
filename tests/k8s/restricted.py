"""Kubernetes's Pod Security Standard "restricted", rule by rule: https://kubernetes.io/docs/concepts/security/pod-security-standards/."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from k8s import manifests

Spec = dict[str, Any]
Check = Callable[[Spec], Iterator[str]]

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SYSCTLS = {
    *{"kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start"},
    *{"net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports"},
    *{"net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl"},
    *{"net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"},
}
SECCOMP = ("RuntimeDefault", "Localhost")
SELINUX = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
KINDS = ("initContainers", "containers", "ephemeralContainers")


def findings(spec: Spec) -> list[str]:
    """The errors for a pod in a namespace that enforces the standard."""
    return [f"{rule.__name__}: {each}" for rule in RULES for each in rule(spec)]


def findings_of(resources: Sequence[manifests.Resource]) -> list[str]:
    """The errors of all pods in the resources."""
    return [each for pod in manifests.pods(resources).values() for each in findings(pod["spec"])]


def containers(spec: Spec) -> list[Spec]:
    return [each for kind in KINDS for each in spec.get(kind, ())]


def contexts(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """The security contexts of the pod and its containers, by owner."""
    yield "pod", spec.get("securityContext", {})
    yield from ((each["name"], each.get("securityContext", {})) for each in containers(spec))


def host_namespaces(spec: Spec) -> Iterator[str]:
    yield from (key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key))


def host_processes(spec: Spec) -> Iterator[str]:
    yield from (name for name, context in contexts(spec) if context.get("windowsOptions", {}).get("hostProcess"))


def privileged(spec: Spec) -> Iterator[str]:
    yield from (name for name, context in contexts(spec) if context.get("privileged"))


def volume_types(spec: Spec) -> Iterator[str]:
    for volume in spec.get("volumes", ()):
        yield from (f"{volume['name']} is a {kind}" for kind in sorted(set(volume) - VOLUMES - {"name"}))


def host_ports(spec: Spec) -> Iterator[str]:
    for each in containers(spec):
        yield from (f"{each['name']}: {port['hostPort']}" for port in each.get("ports", ()) if port.get("hostPort"))


def host_probes(spec: Spec) -> Iterator[str]:
    """Probes and hooks that name another host than the pod."""
    for each in containers(spec):
        lifecycle = each.get("lifecycle", {})
        probes = [each.get(key, {}) for key in ("livenessProbe", "readinessProbe", "startupProbe")]
        for probe in [*probes, *(lifecycle.get(key, {}) for key in ("postStart", "preStop"))]:
            yield from (each["name"] for kind in ("httpGet", "tcpSocket") if probe.get(kind, {}).get("host"))


def app_armor(spec: Spec) -> Iterator[str]:
    for name, context in contexts(spec):
        if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in SECCOMP:
            yield name


def se_linux(spec: Spec) -> Iterator[str]:
    for name, context in contexts(spec):
        options = context.get("seLinuxOptions", {})
        if options.get("type", "") not in SELINUX or options.get("user") or options.get("role"):
            yield name


def proc_mount(spec: Spec) -> Iterator[str]:
    yield from (name for name, context in contexts(spec) if context.get("procMount", "Default") != "Default")


def sysctls(spec: Spec) -> Iterator[str]:
    named = [each["name"] for each in spec.get("securityContext", {}).get("sysctls", ())]
    yield from (name for name in named if name not in SYSCTLS)


def privilege_escalation(spec: Spec) -> Iterator[str]:
    for each in containers(spec):
        if each.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
            yield f"{each['name']}: allowPrivilegeEscalation is not false"


def non_root(spec: Spec) -> Iterator[str]:
    """runAsNonRoot is set by the pod and overridden by no container, or set by every container."""
    of_pod = spec.get("securityContext", {}).get("runAsNonRoot")
    for each in containers(spec):
        if each.get("securityContext", {}).get("runAsNonRoot", of_pod) is not True:
            yield f"{each['name']}: runAsNonRoot is not true"


def root_user(spec: Spec) -> Iterator[str]:
    yield from (f"{name}: runAsUser is 0" for name, context in contexts(spec) if context.get("runAsUser") == 0)


def seccomp(spec: Spec) -> Iterator[str]:
    of_pod = spec.get("securityContext", {}).get("seccompProfile", {}).get("type")
    if of_pod not in (None, *SECCOMP):
        yield f"pod: {of_pod}"
    for each in containers(spec):
        kind = each.get("securityContext", {}).get("seccompProfile", {}).get("type", of_pod)
        if kind not in SECCOMP:
            yield f"{each['name']}: {kind}"


def capabilities(spec: Spec) -> Iterator[str]:
    for each in containers(spec):
        chosen = each.get("securityContext", {}).get("capabilities", {})
        if "ALL" not in chosen.get("drop", ()):
            yield f"{each['name']} does not drop ALL"
        yield from (f"{each['name']} adds {name}" for name in chosen.get("add", ()) if name != "NET_BIND_SERVICE")


RULES: tuple[Check, ...] = (
    *(host_namespaces, host_processes, privileged, volume_types, host_ports, host_probes, app_armor, se_linux),
    *(proc_mount, sysctls, privilege_escalation, non_root, root_user, seccomp, capabilities),
)
