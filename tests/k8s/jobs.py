"""Test doubles of the controllers of Jobs and JobSets.

They follow the sources of Kubernetes 1.34 (pkg/controller/job) and JobSet 0.12 (pkg/controllers), as far as k8s/ uses
them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cluster import pods
from k8s.kubelet import BACKOFF_S, Running
from k8s.manifests import Resource

if TYPE_CHECKING:
    from k8s.namespace import Namespace


def make_pod(template: Resource, hostname: str, subdomain: str, **more: Mapping[str, str]) -> Resource:
    """Create a pod from a template.

    Args:
        template: a template with metadata and spec.
        hostname: the pod's host name.
        subdomain: the headless Service.
        more: additional ``labels``, ``annotations`` and ``env``.
    """
    pod = copy.deepcopy({"metadata": template.get("metadata", {}), "spec": template["spec"]})
    for kind in ("labels", "annotations"):
        pod["metadata"][kind] = {**pod["metadata"].get(kind, {}), **more.get(kind, {})}
    pod["spec"].update(hostname=hostname, subdomain=pod["spec"].get("subdomain", subdomain))
    env = [{"name": name, "value": value} for name, value in more.get("env", {}).items()]
    pod["spec"]["containers"][0].setdefault("env", []).extend(env)
    return pod


class Job:
    """batch/v1 Job, Indexed.

    Attributes:
        outcome: Complete or Failed; empty while the job runs.
        reason: the reason of a failure, such as BackoffLimitExceeded.
        message: the message of a failure.
        failures: the number of counted failures.
    """

    def __init__(
        self,
        namespace: Namespace,
        resource: Resource,
        resources: Sequence[Resource] = (),
        labels: Mapping[str, str] | None = None,
        subdomain: str = "",
    ) -> None:
        self.namespace, self.spec, self.name = namespace, resource["spec"], resource["metadata"]["name"]
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
        """Delete the Job and all its pods."""
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
                self.current[index] = self.namespace.create(self._pod(index))

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
        """The first rule that matches."""
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


class JobSet:
    """jobset.x-k8s.io/v1alpha2, as far as its first failure: restarts are JobSet's own, and TensorFlow's workers end
    by themselves. controllers.py checks the failure policy."""

    def __init__(self, namespace: Namespace, resource: Resource, resources: Sequence[Resource] = ()) -> None:
        self.namespace, self.spec, self.name = namespace, resource["spec"], resource["metadata"]["name"]
        self.outcome = self.reason = ""
        self.jobs: dict[str, Job] = {}

    @staticmethod
    def host_names(resource: Resource, resources: Sequence[Resource] = ()) -> list[str]:
        names = []
        for each in resource["spec"]["replicatedJobs"]:
            job = {**each["template"], "metadata": {"name": f"{resource['metadata']['name']}-{each['name']}-0"}}
            names += Job.host_names(job)
        return names

    def step(self) -> None:
        for job in self.jobs.values():
            job.step()
        failed = [job for job in self.jobs.values() if job.outcome == "Failed"]
        if failed or self._succeeded():
            self.outcome, self.reason = ("Failed", failed[0].reason) if failed else ("Complete", "")
            for job in self.jobs.values():
                job.delete()
            return
        for each in self.spec["replicatedJobs"]:
            name = each["name"]
            if name not in self.jobs and all(self._fulfilled(other) for other in each.get("dependsOn", ())):
                labels = {"jobset-name": self.name, "replicatedjob-name": name, "job-index": "0"}
                labels = {f"jobset.sigs.k8s.io/{key}": value for key, value in labels.items()}
                job = {"metadata": {"name": f"{self.name}-{name}-0"}, "spec": each["template"]["spec"]}
                self.jobs[name] = Job(self.namespace, job, labels=labels, subdomain=self.name)

    def _fulfilled(self, dependency: Mapping[str, str]) -> bool:
        assert dependency["status"] == "Ready"
        return dependency["name"] in self.jobs and self.jobs[dependency["name"]].ready

    def _succeeded(self) -> bool:
        policy = self.spec.get("successPolicy", {"operator": "All"})
        assert policy["operator"] == "All"
        wanted = policy.get("targetReplicatedJobs") or [each["name"] for each in self.spec["replicatedJobs"]]
        return all(name in self.jobs and self.jobs[name].outcome == "Complete" for name in wanted)
