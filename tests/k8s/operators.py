"""What makes pods of a manifest, and decides what becomes of them: a double of Kubernetes's controllers.

    with operators.cluster(manifests.overlay("jobset")) as cluster:
        assert cluster.finish(limit_s=120) == "Complete"

Job (Indexed, podFailurePolicy, backoffLimit, podReplacementPolicy), JobSet (dependsOn, failurePolicy, successPolicy),
MPIJob (workers, launcher, the files that it makes for them, resizing) and TrainJob (of which a JobSet is made). Written
after the sources of Kubernetes 1.34 (pkg/controller/job), JobSet 0.12 (pkg/controllers), MPI operator 0.8
(pkg/controller/mpi_job_controller.go) and Kubeflow Trainer 2.3 (pkg/runtime/framework/plugins/jobset and mpi), as far
as the manifests of k8s/ use them; what they do not use is refused or left out. Nothing here knows of distpad.
"""

from __future__ import annotations

import contextlib
import copy
import pathlib
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cluster import hosts, pods
from k8s import manifests
from k8s.kubelet import BACKOFF_S, Running
from k8s.manifests import Resource

LOOK_S = 0.05
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


class Cluster:
    """A namespace with one job.

    Attributes:
        pods: all that ever were, in the order of their starts.
        unschedulable: host names of pods for which there is no room.
        state: a folder; ``claims/NAME`` in it is what a PersistentVolumeClaim got.
    """

    def __init__(self, resources: Sequence[Resource], nodes: Mapping[str, hosts.Host], state: pathlib.Path) -> None:
        self.nodes, self.state = nodes, state
        self.files: dict[str, dict[str, bytes]] = {}
        self.pods: list[Running] = []
        self.unschedulable: set[str] = set()
        for claim in manifests.of_kind(resources, "PersistentVolumeClaim"):
            volume = state / "claims" / claim["metadata"]["name"]
            volume.mkdir(parents=True)
            volume.chmod(0o777)
        (self.job,) = [CONTROLLERS[resource["kind"]](self, resource, resources) for resource in _jobs(resources)]

    def create(self, pod: Resource) -> Running | None:
        """Start a pod, where there is room for it.

        Raises:
            AssertionError: one of that name is still there.
        """
        name = pod["spec"]["hostname"]
        if name in self.unschedulable:
            return None
        assert not [each for each in self.pods if each.host.name == name and not each.ended], f"two pods {name}"
        # Jobs give their pods names that are new each time
        pod["metadata"]["name"] = f"{name}.{sum(each.host.name == name for each in self.pods)}"
        self.pods.append(Running(pod, self.nodes[name], self.files, self.state))
        return self.pods[-1]

    def named(self, name: str) -> Running:
        """The pod that has this host name, or had it last."""
        return [pod for pod in self.pods if pod.host.name == name][-1]

    def step(self) -> None:
        for pod in self.pods:
            pod.step()
        self.job.step()

    def until(self, happened: Callable[[], Any], limit_s: float) -> None:
        """Let all run until something has happened.

        Raises:
            TimeoutError: with what all pods wrote.
        """
        end = time.monotonic() + limit_s
        while not happened():
            if time.monotonic() > end:
                raise TimeoutError(f"nothing within {limit_s} s\n{self.told()}")
            self.step()
            time.sleep(LOOK_S)

    def finish(self, limit_s: float) -> str:
        """Let all run until the job has ended, and its pods too: Complete, or Failed."""
        self.until(lambda: self.job.outcome and all(pod.ended for pod in self.pods), limit_s)
        return self.job.outcome

    def told(self) -> str:
        """All that pods wrote."""
        return "\n".join(f"== {pod.name}: {pod.phase} {pod.exit_code}\n{pod.log}" for pod in self.pods)


def _jobs(resources: Sequence[Resource]) -> list[Resource]:
    return manifests.of_kind(resources, *CONTROLLERS)


@contextlib.contextmanager
def cluster(resources: Sequence[Resource]) -> Iterator[Cluster]:
    """Apply manifests to a cluster of their own, which is gone afterwards with all that runs in it."""
    (job,) = _jobs(resources)
    names = CONTROLLERS[job["kind"]].host_names(job, resources)
    state = pathlib.Path(tempfile.mkdtemp(prefix="distpad-k8s-"))
    state.chmod(0o755)
    try:
        with pods.nodes(names, service=job["metadata"]["name"]) as found:
            yield Cluster(resources, {host.name: host for host in found}, state)
    finally:
        shutil.rmtree(state, ignore_errors=True)


def make_pod(template: Resource, hostname: str, subdomain: str, **more: Mapping[str, str]) -> Resource:
    """A pod of a template.

    Args:
        template: with metadata and spec.
        hostname: its host name.
        subdomain: the Service behind it.
        more: ``labels``, ``annotations`` and ``env`` that are added.
    """
    pod = copy.deepcopy({"metadata": template.get("metadata", {}), "spec": template["spec"]})
    for kind in ("labels", "annotations"):
        pod["metadata"][kind] = {**pod["metadata"].get(kind, {}), **more.get(kind, {})}
    pod["spec"].update(hostname=hostname, subdomain=pod["spec"].get("subdomain", subdomain))
    env = [{"name": name, "value": value} for name, value in more.get("env", {}).items()]
    pod["spec"]["containers"][0].setdefault("env", []).extend(env)
    return pod


def add_volume(pod: Resource, path: str, volume: Resource) -> None:
    pod["spec"]["volumes"].append(volume)
    pod["spec"]["containers"][0]["volumeMounts"].append({"name": volume["name"], "mountPath": path})


def make_keys() -> dict[str, bytes]:
    """The Secret of an MPI job: ECDSA of 521 bits, whatever its file is called."""
    with tempfile.TemporaryDirectory() as folder:
        key = pathlib.Path(folder) / "key"
        make = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", "", "-C", "", "-f", key]
        subprocess.run(make, check=True)
        return {"ssh-privatekey": key.read_bytes(), "ssh-publickey": key.with_suffix(".pub").read_bytes()}


# -- Job --------------------------------------------------------------------------------------------------------------


class Job:
    """batch/v1 Job, Indexed.

    Attributes:
        outcome: Complete, Failed, or nothing yet.
        reason: why it failed, such as BackoffLimitExceeded.
        message: the same in words.
        failures: how many were counted.
    """

    def __init__(
        self,
        cluster: Cluster,
        resource: Resource,
        resources: Sequence[Resource] = (),
        labels: Mapping[str, str] | None = None,
        subdomain: str = "",
    ) -> None:
        self.cluster, self.spec, self.name = cluster, resource["spec"], resource["metadata"]["name"]
        self.labels, self.subdomain = dict(labels or {}), subdomain
        self.count = self.spec.get("completions", 1)
        assert self.count == self.spec.get("parallelism", 1)
        self.outcome = self.reason = self.message = ""
        self.failures = 0
        self.current: dict[int, Running | None] = dict.fromkeys(range(self.count))
        self.done: set[int] = set()
        self.again_at = 0.0

    @staticmethod
    def host_names(resource: Resource, resources: Sequence[Resource] = ()) -> list[str]:
        return [f"{resource['metadata']['name']}-{index}" for index in range(resource["spec"].get("completions", 1))]

    @property
    def active(self) -> list[Running]:
        return [pod for pod in self.current.values() if pod is not None and not pod.ended]

    @property
    def ready(self) -> bool:
        return sum(pod.ready for pod in self.active) + len(self.done) == self.count

    def delete(self) -> None:
        """With all its pods."""
        self.outcome = self.outcome or "Deleted"
        for pod in self.active:
            pod.delete()

    def step(self) -> None:
        for index, pod in self.current.items():
            if pod is not None and pod.ended and index not in self.done:
                self.current[index] = None
                if not self.outcome:
                    self._account(index, pod)
        if self.outcome:
            return
        if len(self.done) == self.count:
            self.outcome = "Complete"
            return
        if time.monotonic() < self.again_at:
            return
        for index, pod in self.current.items():
            if pod is None and index not in self.done:
                self.current[index] = self.cluster.create(self._pod(index))

    def _pod(self, index: int) -> Resource:
        number = "batch.kubernetes.io/job-completion-index"
        labels = {"batch.kubernetes.io/job-name": self.name, number: str(index), **self.labels}
        hostname = self.spec["template"]["spec"].get("hostname", f"{self.name}-{index}")
        pod = make_pod(self.spec["template"], hostname, self.subdomain, labels=labels, annotations={number: str(index)})
        reference = {"fieldRef": {"fieldPath": f"metadata.annotations['{number}']"}}
        if self.spec.get("completionMode") == "Indexed":
            pod["spec"]["containers"][0]["env"].append({"name": "JOB_COMPLETION_INDEX", "valueFrom": reference})
        return pod

    def _account(self, index: int, pod: Running) -> None:
        if pod.phase == "Succeeded":
            self.done.add(index)
            self.current[index] = pod
            return
        number, action = self._rule(pod)
        if action == "FailJob":
            which = f"pod {pods.NAMESPACE}/{pod.name}"
            if "onPodConditions" in self.spec["podFailurePolicy"]["rules"][number]:
                self.message = f"Pod {pods.NAMESPACE}/{pod.name} has condition DisruptionTarget"
            else:
                self.message = f"Container {pod.container['name']} for {which} failed with exit code {pod.exit_code}"
            self._fail("PodFailurePolicy", f"{self.message} matching FailJob rule at index {number}")
            return
        self.failures += action != "Ignore"
        if self.failures > self.spec.get("backoffLimit", 6):
            self._fail("BackoffLimitExceeded", "Job has reached the specified backoff limit")
        else:
            self.again_at = time.monotonic() + BACKOFF_S

    def _rule(self, pod: Running) -> tuple[int, str]:
        """The first that fits."""
        for number, rule in enumerate(self.spec.get("podFailurePolicy", {}).get("rules", ())):
            codes = rule.get("onExitCodes")
            if codes:
                assert codes["operator"] == "In"
                if pod.exit_code in codes["values"]:
                    return number, rule["action"]
            elif pod.disrupted and rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]:
                return number, rule["action"]
        return -1, "Count"

    def _fail(self, reason: str, message: str) -> None:
        self.outcome, self.reason, self.message = "Failed", reason, message
        for pod in self.active:
            pod.delete()


# -- JobSet -----------------------------------------------------------------------------------------------------------


class JobSet:
    """jobset.x-k8s.io/v1alpha2. ``restarts`` counts all, ``counted`` those that the limit is for."""

    def __init__(self, cluster: Cluster, resource: Resource, resources: Sequence[Resource] = ()) -> None:
        self.cluster, self.spec, self.name = cluster, resource["spec"], resource["metadata"]["name"]
        self.outcome = self.reason = ""
        self.restarts = self.counted = 0
        self.jobs: dict[str, Job] = {}
        self.policy = self.spec["failurePolicy"]
        assert self.policy["restartStrategy"] == "BlockingRecreate"
        assert all(each.get("replicas", 1) == 1 for each in self.spec["replicatedJobs"])

    @staticmethod
    def host_names(resource: Resource, resources: Sequence[Resource] = ()) -> list[str]:
        names = []
        for each in resource["spec"]["replicatedJobs"]:
            job = {"metadata": {"name": f"{resource['metadata']['name']}-{each['name']}-0"}, **each["template"]}
            names += Job.host_names(job)
        return names

    def step(self) -> None:
        for job in self.jobs.values():
            job.step()
        if self.outcome:
            return
        ended = [name for name, job in self.jobs.items() if job.outcome == "Failed"]
        if ended:
            self._fail_or_restart(self.jobs[ended[0]])
        elif any(job.outcome == "Deleted" for job in self.jobs.values()):
            if not any(job.active for job in self.jobs.values()):  # BlockingRecreate
                self.jobs.clear()
        elif self._succeeded():
            self._end("Complete")
        else:
            self._create()

    def _create(self) -> None:
        for each in self.spec["replicatedJobs"]:
            name = each["name"]
            if name in self.jobs or not all(self._fulfilled(other) for other in each.get("dependsOn", ())):
                continue
            labels = {"jobset-name": self.name, "replicatedjob-name": name, "job-index": "0", "restart-attempt": ""}
            labels = {f"jobset.sigs.k8s.io/{key}": value for key, value in labels.items()}
            labels["jobset.sigs.k8s.io/restart-attempt"] = str(self.restarts)
            resource = {"metadata": {"name": f"{self.name}-{name}-0"}, "spec": each["template"]["spec"]}
            self.jobs[name] = Job(self.cluster, resource, labels=labels, subdomain=self.name)

    def _fulfilled(self, dependency: Mapping[str, str]) -> bool:
        job = self.jobs.get(dependency["name"])
        if job is None:
            return False
        return job.ready if dependency["status"] == "Ready" else job.outcome == "Complete"

    def _succeeded(self) -> bool:
        policy = self.spec.get("successPolicy", {"operator": "All"})
        assert policy["operator"] == "All"
        wanted = policy.get("targetReplicatedJobs") or [each["name"] for each in self.spec["replicatedJobs"]]
        return all(name in self.jobs and self.jobs[name].outcome == "Complete" for name in wanted)

    def _fail_or_restart(self, job: Job) -> None:
        action = self._action(job)
        if action == "RestartJobSet":
            if self.counted >= self.policy.get("maxRestarts", 0):
                self._end("Failed", "ReachedMaxRestarts")
                return
            self.counted += 1
        elif action == "FailJobSet":
            self._end("Failed", "FailJobSetAction")
            return
        else:
            assert action == "RestartJobSetAndIgnoreMaxRestarts"
        self.restarts += 1
        for each in self.jobs.values():
            each.delete()
            each.outcome = "Deleted"

    def _action(self, job: Job) -> str:
        for rule in self.policy.get("rules", ()):
            reasons, patterns = rule.get("onJobFailureReasons"), rule.get("onJobFailureMessagePatterns")
            if reasons and job.reason not in reasons:
                continue
            if patterns and not any(re.search(pattern, job.message) for pattern in patterns):
                continue
            return rule["action"]
        return "RestartJobSet"

    def _end(self, outcome: str, reason: str = "") -> None:
        self.outcome, self.reason = outcome, reason
        for job in self.jobs.values():
            job.delete()


# -- MPIJob -----------------------------------------------------------------------------------------------------------


class MpiJob:
    """kubeflow.org/v2beta1."""

    ROOM = 1  # hosts beside those that it asks for, for a job that grows

    def __init__(self, cluster: Cluster, resource: Resource, resources: Sequence[Resource] = ()) -> None:
        self.cluster, self.spec, self.name = cluster, resource["spec"], resource["metadata"]["name"]
        assert self.spec["mpiImplementation"] == "OpenMPI"
        self.roles = self.spec["mpiReplicaSpecs"]
        self.workers: dict[int, Running | None] = {}
        self.launcher: Job | None = None
        self.outcome = ""
        cluster.files[f"Secret/{self.name}-ssh"] = make_keys()

    @staticmethod
    def host_names(resource: Resource, resources: Sequence[Resource] = ()) -> list[str]:
        name, count = resource["metadata"]["name"], resource["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"]
        return [f"{name}-launcher", *(f"{name}-worker-{index}" for index in range(count + MpiJob.ROOM))]

    @property
    def replicas(self) -> int:
        return self.roles["Worker"]["replicas"]

    def resize(self, replicas: int) -> None:
        """What a patch of the Worker replicas does."""
        self.roles["Worker"]["replicas"] = replicas

    def step(self) -> None:
        if self.outcome:
            return
        self._write_config()
        for index in range(max([self.replicas, *(index + 1 for index in self.workers)])):
            pod = self.workers.get(index)
            if pod is not None and pod.ended and pod.kill_at is not None:
                pod = self.workers[index] = None  # it is deleted, not just failed
            if index >= self.replicas:
                if pod is not None:
                    pod.delete()
            elif pod is None:
                self.workers[index] = self.cluster.create(self._pod("Worker", f"{self.name}-worker-{index}", index))
        if self.launcher is None:
            asked = [self.workers.get(index) for index in range(self.replicas)]
            ready = all(pod is not None and pod.ready for pod in asked)
            if ready or self.spec.get("launcherCreationPolicy", "AtStartup") == "AtStartup":
                pod = self._pod("Launcher", f"{self.name}-launcher")
                job = {"template": pod, "backoffLimit": self.spec["runPolicy"].get("backoffLimit", 6)}
                self.launcher = Job(self.cluster, {"metadata": {"name": f"{self.name}-launcher"}, "spec": job})
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
        self.cluster.files[f"ConfigMap/{self.name}-config"] = {
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


# -- TrainJob ---------------------------------------------------------------------------------------------------------


def train_job(cluster: Cluster, resource: Resource, resources: Sequence[Resource]) -> JobSet:
    """trainer.kubeflow.org/v1alpha1: the JobSet that Trainer makes of it, and what MPI needs."""
    name = resource["metadata"]["name"]
    jobset, policy = _jobset_of(resource, resources)
    if mpi := policy.get("mpi"):
        assert mpi["mpiImplementation"] == "OpenMPI" and not mpi["runLauncherAsNode"]
        slots = resource["spec"]["trainer"].get("numProcPerNode", mpi["numProcPerNode"])
        hosts_of_nodes = [host for host in JobSet.host_names(jobset) if "-node-" in host]
        listed = "".join(f"{host}.{name} slots={slots}\n" for host in hosts_of_nodes)
        cluster.files[f"ConfigMap/{name}-mpi-hostfile"] = {"hostfile": listed.encode()}
        cluster.files[f"Secret/{name}-mpi-ssh-auth"] = make_keys()
        for each in jobset["spec"]["replicatedJobs"]:
            pod = each["template"]["spec"]["template"]
            secret = {"secretName": f"{name}-mpi-ssh-auth", "defaultMode": 0o640, "items": KEY_ITEMS}
            add_volume(pod, mpi["sshAuthMountPath"], {"name": "mpi-ssh-auth", "secret": secret})
            if each["name"] == "launcher":
                config = {
                    "name": f"{name}-mpi-hostfile",
                    "items": [{"key": "hostfile", "path": "hostfile", "mode": 0o444}],
                }
                add_volume(pod, "/etc/mpi", {"name": "mpi-hostfile", "configMap": config})
                told = {**OPEN_MPI, "OMPI_MCA_orte_set_default_slots": str(slots)}
                pod["spec"]["containers"][0]["env"] += [{"name": key, "value": value} for key, value in told.items()]
    return JobSet(cluster, jobset)


def _jobset_of(resource: Resource, resources: Sequence[Resource]) -> tuple[Resource, dict[str, Any]]:
    """With the numbers of the TrainJob; and the runtime's policy."""
    runtime = manifests.find(resources, f"TrainingRuntime/{resource['spec']['runtimeRef']['name']}")
    spec = copy.deepcopy(runtime["spec"]["template"]["spec"])
    for each in spec["replicatedJobs"]:
        step = each["template"].get("metadata", {}).get("labels", {})
        if step.get("trainer.kubeflow.org/trainjob-ancestor-step") == "trainer":
            nodes = resource["spec"]["trainer"]["numNodes"]
            each["template"]["spec"].update(completions=nodes, parallelism=nodes)
    return {"metadata": {"name": resource["metadata"]["name"]}, "spec": spec}, runtime["spec"].get("mlPolicy", {})


def _train_job_hosts(resource: Resource, resources: Sequence[Resource]) -> list[str]:
    return JobSet.host_names(_jobset_of(resource, resources)[0])


train_job.host_names = _train_job_hosts  # as the classes have it

CONTROLLERS: dict[str, Any] = {"Job": Job, "JobSet": JobSet, "MPIJob": MpiJob, "TrainJob": train_job}
