"""Run one pod of a manifest: the container's real command, started like by the kubelet and a container runtime.

The command is process 1 of a pod of tests/cluster/pods.py. It gets the manifest's variables with their references
resolved, its volumes, user and groups. When the pod is deleted, it gets SIGTERM, and SIGKILL after
terminationGracePeriodSeconds. With restartPolicy OnFailure, a failed container restarts in its pod.

This double does not limit resources, enforce the network policy or pull images: this machine's programs and this
checkout replace the image. Waits are shorter than in Kubernetes.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from cluster import hosts, pods
from k8s.manifests import Resource

BACKOFF_S = 1.0  # 10 s in Kubernetes, doubled each time

Files = Mapping[str, bytes]


class Running:
    """A pod that was started.

    Args:
        pod: the pod as in the API server.
        host: the host that runs it.
        files: the data of Secrets and ConfigMaps, by "Kind/name". The data may change, as in Kubernetes.
        state: a folder for the pod's volumes and log, and for the claims' volumes, which outlive the pod.

    Attributes:
        phase: Running, Succeeded or Failed.
        exit_code: the container's exit code, once it has ended.
        restarts: the number of restarts of the container.
        disrupted: whether the pod has the condition DisruptionTarget.
        log: the container's output, over all restarts.
    """

    def __init__(self, pod: Resource, host: hosts.Host, files: dict[str, Files], state: pathlib.Path) -> None:
        self.pod, self.host, self.files = pod, host, files
        self.name, self.spec = pod["metadata"]["name"], pod["spec"]
        self.labels = pod["metadata"].get("labels", {})
        (self.container,) = self.spec["containers"]
        self.folder, self.claims = state / "pods" / self.name, state / "claims"
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o755)
        self.phase, self.exit_code, self.restarts, self.disrupted = "Running", None, 0, False
        self.kill_at: float | None = None  # set while the pod is being deleted
        self.start_at: float | None = None  # set while the container waits for a restart
        self.synced: dict[str, Files] = {}
        context = {**self.spec["securityContext"], **self.container["securityContext"]}
        assert context["readOnlyRootFilesystem"] and context["capabilities"]["drop"] == ["ALL"]
        assert not context["allowPrivilegeEscalation"]
        self.group = context["fsGroup"]
        user = (context["runAsUser"], context["runAsGroup"])
        self.place = pods.Pod(host, self._mounts(), user, [self.group])
        self.process = self._start()

    # -- what it is given --

    def _mounts(self) -> list[pods.Mount]:
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        return [self._mount(volumes[mount["name"]], mount) for mount in self.container["volumeMounts"]]

    def _mount(self, volume: Mapping[str, Any], mount: Mapping[str, Any]) -> pods.Mount:
        options = "ro" if mount.get("readOnly") else "rw"
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            size = volume["emptyDir"]["sizeLimit"].replace("Gi", "g").replace("Mi", "m")
            return pods.Mount(mount["mountPath"], None, f"{options},mode=1777,size={size}")
        if claim := volume.get("persistentVolumeClaim"):
            source = self.claims / claim["claimName"]
            assert source.is_dir(), f"no claim {claim['claimName']}"
        elif "emptyDir" in volume:
            source = self._own(self.folder / volume["name"])
        else:
            source, options = self._own(self.folder / volume["name"]), "ro"
        self._sync()
        return pods.Mount(mount["mountPath"], source, options)

    def _own(self, folder: pathlib.Path) -> pathlib.Path:
        """A folder of the pod's group."""
        folder.mkdir(exist_ok=True)
        os.chown(folder, 0, self.group)
        folder.chmod(0o2777)
        return folder

    def _sync(self) -> None:
        """Write the current Secrets and ConfigMaps as files."""
        for volume in self.spec["volumes"]:
            kind = "Secret" if "secret" in volume else "ConfigMap" if "configMap" in volume else None
            if kind is None:
                continue
            source = volume["secret" if kind == "Secret" else "configMap"]
            data = self.files[f"{kind}/{source['secretName' if kind == 'Secret' else 'name']}"]
            if self.synced.get(volume["name"]) == data:
                continue
            self.synced[volume["name"]] = data
            for item in source["items"]:
                file = self._own(self.folder / volume["name"]) / item["path"]
                fresh = file.with_name(f".{file.name}")
                fresh.write_bytes(data[item["key"]])
                mode = item.get("mode", source.get("defaultMode", 0o644))
                fresh.chmod(mode | (0o440 if kind == "Secret" else 0))  # the owning group may read it
                os.chown(fresh, 0, self.group)
                fresh.rename(file)

    def env(self) -> dict[str, str]:
        """The container's variables."""
        found = {"HOSTNAME": self.spec.get("hostname", self.name), "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
        for variable in self.container.get("env", ()):
            if "valueFrom" in variable:
                found[variable["name"]] = self._field(variable["valueFrom"]["fieldRef"]["fieldPath"])
            else:
                found[variable["name"]] = expand(variable.get("value", ""), found)
        return found

    def _field(self, path: str) -> str:
        if match := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
            return self.pod["metadata"].get(match[1], {}).get(match[2], "")
        return {
            "metadata.name": self.name,
            "metadata.namespace": pods.NAMESPACE,
            "status.podIP": self.host.address,
        }[path]

    # -- its life --

    def _start(self) -> subprocess.Popen[str]:
        env = self.env()
        argv = [expand(word, env) for word in (*self.container["command"], *(self.container.get("args") or ()))]
        self.start_at = None
        with self._log.open("a") as log:
            return self.place.popen(argv, env, first=True, stdout=log)

    @property
    def _log(self) -> pathlib.Path:
        return self.folder / "log"

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def ended(self) -> bool:
        return self.phase != "Running"

    @property
    def ready(self) -> bool:
        """Whether the readiness probe would succeed."""
        if self.ended or self.start_at is not None:
            return False
        probe = self.container.get("readinessProbe")
        ports = {port["name"]: port["containerPort"] for port in self.container.get("ports", ())}
        return probe is None or self.host.listens(ports[probe["tcpSocket"]["port"]])

    def step(self) -> None:
        """Update the state after changes of the process."""
        if self.ended:
            return
        self._sync()
        if self.start_at is not None:
            if time.monotonic() > self.start_at:
                self.restarts += 1
                self.process = self._start()
            return
        if self.kill_at is not None and time.monotonic() > self.kill_at:
            self.signal(signal.SIGKILL)
        code = self.process.poll()
        if code is None:
            return
        self.exit_code = code if code >= 0 else 128 - code
        if code and self.kill_at is None and self.spec["restartPolicy"] == "OnFailure":
            self.start_at = time.monotonic() + BACKOFF_S * 2**self.restarts
        else:
            self.phase = "Failed" if code else "Succeeded"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its process 1."""
        parent = self.process.pid
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            # unshare ends with exit code 1 if its child was killed
            for process in [*([parent] if number == signal.SIGKILL else []), *map(int, children)]:
                os.kill(process, number)

    def delete(self) -> None:
        """Delete the pod, like ``kubectl delete pod``. Further calls have no effect."""
        if self.ended or self.kill_at is not None:
            return
        self.kill_at = time.monotonic() + self.spec.get("terminationGracePeriodSeconds", 30)
        if self.start_at is not None:
            self.phase = "Failed"
        self.signal(signal.SIGTERM)

    def evict(self) -> None:
        """Evict the pod, like a drained node or a preemption."""
        self.disrupted = True
        self.delete()


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Expand ``$(NAME)`` like Kubernetes. ``$$`` is a dollar, and unknown names stay."""

    def one(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\((\w+)\)", one, text)
