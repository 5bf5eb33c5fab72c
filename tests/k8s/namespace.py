"""A namespace of Kubernetes with one job in it: a double of the cluster that manifests are applied to.

    with namespace.of(manifests.overlay("jobset")) as applied:
        assert applied.finish(limit_s=120) == "Complete"

The job's controller (jobs.py, mpi_jobs.py) makes pods, which kubelet.py runs, each on a host of its own. Nothing of it
knows of distpad.
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
    """It, with what was applied.

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
def of(resources: Sequence[Resource]) -> Iterator[Namespace]:
    """Apply manifests to a cluster of their own, which is gone afterwards with all that runs in it."""
    (job,) = _jobs(resources)
    names = CONTROLLERS[job["kind"]].host_names(job, resources)
    state = pathlib.Path(tempfile.mkdtemp(prefix="distpad-k8s-"))
    state.chmod(0o755)
    try:
        with pods.nodes(names, service=job["metadata"]["name"]) as found:
            yield Namespace(resources, {host.name: host for host in found}, state)
    finally:
        shutil.rmtree(state, ignore_errors=True)
