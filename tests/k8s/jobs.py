"""Test doubles of the controllers of Jobs and JobSets.

They follow the sources of Kubernetes 1.34 (pkg/controller/job) and JobSet 0.12 (pkg/controllers), as far as k8s/ uses
them.
"""

from __future__ import annotations

import copy
import re
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
    """jobset.x-k8s.io/v1alpha2. ``restarts`` counts all restarts, ``counted`` those that count against the limit."""

    def __init__(self, namespace: Namespace, resource: Resource, resources: Sequence[Resource] = ()) -> None:
        self.namespace, self.spec, self.name = namespace, resource["spec"], resource["metadata"]["name"]
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
            job = {**each["template"], "metadata": {"name": f"{resource['metadata']['name']}-{each['name']}-0"}}
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
            self.jobs[name] = Job(self.namespace, resource, labels=labels, subdomain=self.name)

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
