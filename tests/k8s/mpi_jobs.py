"""Test doubles of the operators of MPIJobs and TrainJobs.

They follow the sources of MPI operator 0.8 (pkg/controller/mpi_job_controller.go) and Kubeflow Trainer 2.3
(pkg/runtime/framework/plugins/jobset and mpi), as far as k8s/ uses them.
"""

from __future__ import annotations

import copy
import pathlib
import subprocess
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster import pods
from k8s import manifests
from k8s.jobs import Job, JobSet, make_pod
from k8s.kubelet import Running
from k8s.manifests import Resource

if TYPE_CHECKING:
    from k8s.namespace import Namespace

OPEN_MPI = {  # both operators set them on the launcher
    "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
    "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
    "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
}
NO_GPUS = {"NVIDIA_VISIBLE_DEVICES": "", "NVIDIA_DRIVER_CAPABILITIES": ""}
KEY_ITEMS = [
    {"key": "ssh-privatekey", "path": "id_rsa"},
    {"key": "ssh-publickey", "path": "id_rsa.pub"},
    {"key": "ssh-publickey", "path": "authorized_keys"},
]


def add_volume(pod: Resource, path: str, volume: Resource) -> None:
    pod["spec"]["volumes"].append(volume)
    pod["spec"]["containers"][0]["volumeMounts"].append({"name": volume["name"], "mountPath": path})


def make_keys() -> dict[str, bytes]:
    """The Secret of an MPI job: an ECDSA key of 521 bits, although its file is called id_rsa."""
    with tempfile.TemporaryDirectory() as folder:
        key = pathlib.Path(folder) / "key"
        make = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", "", "-C", "", "-f", key]
        subprocess.run(make, check=True)
        return {"ssh-privatekey": key.read_bytes(), "ssh-publickey": key.with_suffix(".pub").read_bytes()}


class MpiJob:
    """kubeflow.org/v2beta1."""

    def __init__(self, namespace: Namespace, resource: Resource, resources: Sequence[Resource] = ()) -> None:
        self.namespace, self.spec, self.name = namespace, resource["spec"], resource["metadata"]["name"]
        assert self.spec["mpiImplementation"] == "OpenMPI"
        self.roles = self.spec["mpiReplicaSpecs"]
        self.workers: dict[int, Running | None] = {}
        self.launcher: Job | None = None
        self.outcome = ""
        namespace.files[f"Secret/{self.name}-ssh"] = make_keys()

    @staticmethod
    def host_names(resource: Resource, resources: Sequence[Resource] = ()) -> list[str]:
        name, count = resource["metadata"]["name"], resource["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"]
        return [f"{name}-launcher", *(f"{name}-worker-{index}" for index in range(count))]

    @property
    def replicas(self) -> int:
        return self.roles["Worker"]["replicas"]

    def step(self) -> None:
        if self.outcome:
            return
        self._write_config()
        for index in range(self.replicas):
            pod = self.workers.get(index)
            if pod is None or (pod.ended and pod.kill_at is not None):  # it was deleted, and did not just fail
                self.workers[index] = self.namespace.create(self._pod("Worker", f"{self.name}-worker-{index}", index))
        if self.launcher is None:
            asked = [self.workers.get(index) for index in range(self.replicas)]
            ready = all(pod is not None and pod.ready for pod in asked)
            if ready or self.spec.get("launcherCreationPolicy", "AtStartup") == "AtStartup":
                pod = self._pod("Launcher", f"{self.name}-launcher")
                job = {"template": pod, "backoffLimit": self.spec["runPolicy"].get("backoffLimit", 6)}
                self.launcher = Job(self.namespace, {"metadata": {"name": f"{self.name}-launcher"}, "spec": job})
            return
        self.launcher.step()
        if self.launcher.outcome:
            self.outcome = self.launcher.outcome
            if self.spec["runPolicy"].get("cleanPodPolicy", "None") != "None":
                for pod in filter(None, self.workers.values()):
                    pod.delete()

    def _write_config(self) -> None:
        behind, slots = f"{self.name}.{pods.NAMESPACE}.svc", self.spec.get("slotsPerWorker", 1)
        names = [f"{self.name}-worker-{index}.{behind}" for index in range(self.replicas)]
        there = [f"{pod.host.name}.{behind}" for pod in self.workers.values() if pod is not None and not pod.ended]
        self.namespace.files[f"ConfigMap/{self.name}-config"] = {
            "hostfile": "".join(f"{name} slots={slots}\n" for name in names).encode(),
            "discover_hosts.sh": "".join(["#!/bin/sh\n", *(f"echo {name}\n" for name in sorted(there))]).encode(),
        }

    def _pod(self, role: str, hostname: str, index: int = 0) -> Resource:
        env = {"K_MPI_JOB_ROLE": role.lower()}
        if role == "Launcher":
            slots = str(self.spec.get("slotsPerWorker", 1))
            env.update({**OPEN_MPI, "OMPI_MCA_orte_set_default_slots": slots, **NO_GPUS})
        labels = {"job-name": self.name, "job-role": role.lower(), "operator-name": "mpi-operator"}
        labels = {f"training.kubeflow.org/{key}": value for key, value in labels.items()}
        if role == "Worker":
            labels["training.kubeflow.org/replica-index"] = str(index)
        pod = make_pod(self.roles[role]["template"], hostname, self.name, labels=labels, env=env)
        pod["spec"]["restartPolicy"] = self.roles[role]["restartPolicy"]
        secret = {"secretName": f"{self.name}-ssh", "items": KEY_ITEMS}
        add_volume(pod, self.spec["sshAuthMountPath"], {"name": "ssh-auth", "secret": secret})
        if role == "Launcher":
            items = [{"key": "hostfile", "mode": 0o444}, {"key": "discover_hosts.sh", "mode": 0o555}]
            items = [{**item, "path": item["key"]} for item in items]
            config = {"name": f"{self.name}-config", "items": items}
            add_volume(pod, "/etc/mpi", {"name": "mpi-job-config", "configMap": config})
        pod["metadata"]["name"] = hostname
        return pod


class TrainJob(JobSet):
    """trainer.kubeflow.org/v1alpha1: the JobSet that Trainer creates, and the additions for MPI."""

    def __init__(self, namespace: Namespace, resource: Resource, resources: Sequence[Resource]) -> None:
        jobset, policy = self._made(resource, resources)
        if mpi := policy.get("mpi"):
            self._add_mpi(namespace, jobset, mpi, resource["spec"]["trainer"])
        super().__init__(namespace, jobset)

    @staticmethod
    def host_names(resource: Resource, resources: Sequence[Resource] = ()) -> list[str]:
        return JobSet.host_names(TrainJob._made(resource, resources)[0])

    @staticmethod
    def _made(resource: Resource, resources: Sequence[Resource]) -> tuple[Resource, dict[str, Any]]:
        """The JobSet with the TrainJob's numbers, and the runtime's policy."""
        runtime = manifests.find(resources, f"TrainingRuntime/{resource['spec']['runtimeRef']['name']}")
        spec = copy.deepcopy(runtime["spec"]["template"]["spec"])
        for each in spec["replicatedJobs"]:
            step = each["template"].get("metadata", {}).get("labels", {})
            if step.get("trainer.kubeflow.org/trainjob-ancestor-step") == "trainer":
                nodes = resource["spec"]["trainer"]["numNodes"]
                each["template"]["spec"].update(completions=nodes, parallelism=nodes)
        return {"metadata": {"name": resource["metadata"]["name"]}, "spec": spec}, runtime["spec"].get("mlPolicy", {})

    @staticmethod
    def _add_mpi(namespace: Namespace, jobset: Resource, mpi: Resource, trainer: Resource) -> None:
        assert mpi["mpiImplementation"] == "OpenMPI" and not mpi["runLauncherAsNode"]
        name, slots = jobset["metadata"]["name"], trainer.get("numProcPerNode", mpi["numProcPerNode"])
        nodes = [host for host in JobSet.host_names(jobset) if host.startswith(f"{name}-node-")]
        listed = "".join(f"{host}.{name} slots={slots}\n" for host in nodes)
        namespace.files[f"ConfigMap/{name}-mpi-hostfile"] = {"hostfile": listed.encode()}
        namespace.files[f"Secret/{name}-mpi-ssh-auth"] = make_keys()
        for each in jobset["spec"]["replicatedJobs"]:
            pod = each["template"]["spec"]["template"]
            secret = {"secretName": f"{name}-mpi-ssh-auth", "defaultMode": 0o640, "items": KEY_ITEMS}
            add_volume(pod, mpi["sshAuthMountPath"], {"name": "mpi-ssh-auth", "secret": secret})
            if each["name"] == "launcher":
                items = [{"key": "hostfile", "path": "hostfile", "mode": 0o444}]
                config = {"name": f"{name}-mpi-hostfile", "items": items}
                add_volume(pod, "/etc/mpi", {"name": "mpi-hostfile", "configMap": config})
                variables = {**OPEN_MPI, "OMPI_MCA_orte_set_default_slots": str(slots)}
                pod["spec"]["containers"][0]["env"] += [
                    {"name": key, "value": value} for key, value in variables.items()
                ]
