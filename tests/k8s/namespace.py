"""A namespace of Kubernetes with one job in it: a test double of a cluster.

    with namespace.of(manifests.overlay("jobset")) as applied:
        assert applied.finish(limit_s=120) == "Complete"

The job's controller (jobs.py, mpi_jobs.py) creates pods, which kubelet.py runs, each on its own host. These modules do
not use distpad.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cluster import hosts, pods
from k8s import jobs, manifests, mpi_jobs
from k8s.kubelet import Running
from k8s.manifests import Resource

LOOK_S = 0.05
CONTROLLERS: dict[str, Any] = {
    "Job": jobs.Job,
    "JobSet": jobs.JobSet,
    "MPIJob": mpi_jobs.MpiJob,
    "TrainJob": mpi_jobs.TrainJob,
}


class Namespace:
    """The namespace with the applied manifests.

    Attributes:
        pods: all pods that have existed, in the order of their starts.
        unschedulable: host names of pods that cannot be scheduled.
        state: a folder; ``claims/NAME`` in it is the volume of a PersistentVolumeClaim.
    """

    def __init__(self, resources: Sequence[Resource], nodes: Mapping[str, hosts.Host], state: pathlib.Path) -> None:
        self.nodes, self.state = nodes, state
        self.files: dict[str, dict[str, bytes]] = {}
        self.pods: list[Running] = []
        self.unschedulable: set[str] = set()
        volumes = [volume for pod in manifests.pods(resources).values() for volume in pod["spec"]["volumes"]]
        for claim in {
            each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each
        }:
            (state / "claims" / claim).mkdir(parents=True)
            (state / "claims" / claim).chmod(0o777)
        (self.job,) = [CONTROLLERS[resource["kind"]](self, resource, resources) for resource in _jobs(resources)]

    def create(self, pod: Resource) -> Running | None:
        """Start a pod if it can be scheduled.

        Raises:
            AssertionError: a pod of this name still exists.
        """
        name = pod["spec"]["hostname"]
        if name in self.unschedulable:
            return None
        assert not [each for each in self.pods if each.host.name == name and not each.ended], f"two pods {name}"
        # Jobs give each new pod a new name
        pod["metadata"]["name"] = f"{name}.{sum(each.host.name == name for each in self.pods)}"
        self.pods.append(Running(pod, self.nodes[name], self.files, self.state))
        return self.pods[-1]

    def named(self, name: str) -> Running:
        """The latest pod with this host name."""
        return [pod for pod in self.pods if pod.host.name == name][-1]

    def step(self) -> None:
        for pod in self.pods:
            pod.step()
        self.job.step()

    def until(self, happened: Callable[[], Any], limit_s: float) -> None:
        """Run the pods until a condition holds.

        Raises:
            TimeoutError: the condition did not hold in time. The message has the output of all pods.
        """
        end = time.monotonic() + limit_s
        while not happened():
            if time.monotonic() > end:
                raise TimeoutError(f"nothing within {limit_s} s\n{self.output()}")
            self.step()
            time.sleep(LOOK_S)

    def finish(self, limit_s: float) -> str:
        """Run until the job and its pods have ended, and return Complete or Failed."""
        self.until(lambda: self.job.outcome and all(pod.ended for pod in self.pods), limit_s)
        return self.job.outcome

    def output(self) -> str:
        """The output of all pods."""
        return "\n".join(f"== {pod.name}: {pod.phase} {pod.exit_code}\n{pod.log}" for pod in self.pods)


def _jobs(resources: Sequence[Resource]) -> list[Resource]:
    return manifests.of_kind(resources, *CONTROLLERS)


@contextlib.contextmanager
def of(resources: Sequence[Resource]) -> Iterator[Namespace]:
    """Apply manifests to a new cluster, and remove the cluster with all its processes at the end."""
    (job,) = _jobs(resources)
    names = CONTROLLERS[job["kind"]].host_names(job, resources)
    state = pathlib.Path(tempfile.mkdtemp(prefix="distpad-k8s-"))
    state.chmod(0o755)
    try:
        with pods.nodes(names, service=job["metadata"]["name"]) as found:
            yield Namespace(resources, {host.name: host for host in found}, state)
    finally:
        shutil.rmtree(state, ignore_errors=True)
