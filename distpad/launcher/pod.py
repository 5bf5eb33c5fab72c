"""The configuration of a pod of a training job: pure functions of its environment variables.

Kubernetes and its operators give a pod its index and host name; the manifests in k8s/ add further variables. This
module derives the names of all pods and the configuration of the engine from these variables.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence

from distpad import errors
from distpad.launcher import spec, tfconfig

WORKERS = ("indexed-job", "jobset", "trainjob")  # each pod is a worker of MultiWorkerMirroredStrategy
LAUNCHERS = ("mpi-launcher", "mpi-elastic-launcher")
KINDS = (*WORKERS, *LAUNCHERS, "mpi-worker")
INTERFACE = "eth0"  # the pods' network, by the usual plug-ins
SECRETS = "/run/secrets/distpad"  # the mount path of secrets, one file for each variable
HOSTFILE, DISCOVERY = "/etc/mpi/hostfile", "/etc/mpi/discover_hosts.sh"  # written by the MPI operator
# variable | its origin
SET_BY = {
    "JOB_COMPLETION_INDEX": "Kubernetes sets it in the pods of a Job with completionMode: Indexed",
    "DISTPAD_JOB_NAME": "the manifest sets it to the Job's name",
    "DISTPAD_SERVICE": "the manifest sets it to the headless Service, which is the pods' subdomain",
    "DISTPAD_WORKERS": "the manifest sets it to the number of pods that train",
    "DISTPAD_JOBSET_NAME": "the manifest takes it from the label jobset.sigs.k8s.io/jobset-name",
    "DISTPAD_REPLICATED_JOB": "the manifest takes it from the label jobset.sigs.k8s.io/replicatedjob-name",
    "DISTPAD_JOB_INDEX": "the manifest takes it from the label jobset.sigs.k8s.io/job-index",
    "DISTPAD_SLOTS": "the manifest sets it to the number of workers in each pod, which the discovery script leaves out",
}


@dataclasses.dataclass(frozen=True)
class Member:
    """One pod of a job of MultiWorkerMirroredStrategy.

    Attributes:
      index: the worker's index.
      names: the host names of all pods, in the order of their indices.
      tf_config: the value of TF_CONFIG.
    """

    index: int
    names: tuple[str, ...]
    tf_config: str

    @property
    def name(self) -> str:
        return self.names[self.index]

    def env(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The training's environment: TF_CONFIG, and the expected topology, which the library checks."""
        count = str(len(self.names))
        topology = {"BACKEND": "multiworker", "WORKERS": count, "HOSTS": count, "RANK": str(self.index)}
        expected = {f"DISTPAD_{name}": value for name, value in topology.items()}
        return {**environ, **expected, "TF_CONFIG": self.tf_config, "PYTHONUNBUFFERED": "1"}


def member(kind: str, environ: Mapping[str, str], port: int) -> Member:
    """Derive a pod's place among the pods of its job from its environment.

    Args:
      kind: one of WORKERS.
      environ: the pod's variables.
      port: the port of TensorFlow in each pod.

    Raises:
      ValueError: a variable is missing or wrong. The message names the variable's origin.

    >>> environ = {"DISTPAD_JOB_NAME": "train", "DISTPAD_SERVICE": "w", "DISTPAD_WORKERS": "2"}
    >>> member("indexed-job", {**environ, "JOB_COMPLETION_INDEX": "1"}, 2222).names
    ('train-0.w', 'train-1.w')
    """
    config = _of_indexed_job(environ, port) if kind == "indexed-job" else _of_jobset(environ, port)
    parsed = json.loads(config)
    names = tuple(address.rpartition(":")[0] for address in parsed["cluster"]["worker"])
    return Member(parsed["task"]["index"], names, config)


def _of_indexed_job(environ: Mapping[str, str], port: int) -> str:
    return tfconfig.from_indexed_job(
        _given(environ, "DISTPAD_JOB_NAME"),
        _number(environ, "DISTPAD_WORKERS"),
        _given(environ, "JOB_COMPLETION_INDEX"),
        service=_given(environ, "DISTPAD_SERVICE"),
        port=port,
        namespace=environ.get("POD_NAMESPACE") or None,
    )


def _of_jobset(environ: Mapping[str, str], port: int) -> str:
    """TF_CONFIG of a JobSet's pod, or of a TrainJob's, since Kubeflow Trainer turns a TrainJob into a JobSet."""
    workers, jobs = _number(environ, "DISTPAD_WORKERS"), 1
    if environ.get("DISTPAD_JOBS"):  # the label jobset.sigs.k8s.io/replicatedjob-replicas
        jobs = _number(environ, "DISTPAD_JOBS")
    if workers % jobs:
        raise ValueError(errors.sentence("pod", "DISTPAD_WORKERS", workers, f"a multiple of DISTPAD_JOBS, {jobs}"))
    name = _given(environ, "DISTPAD_REPLICATED_JOB")
    return tfconfig.from_jobset(
        _given(environ, "DISTPAD_JOBSET_NAME"),
        [(name, jobs, workers // jobs)],
        name,
        _given(environ, "DISTPAD_JOB_INDEX"),
        _given(environ, "JOB_COMPLETION_INDEX"),
        port=port,
        subdomain=environ.get("DISTPAD_SERVICE") or None,
    )


@dataclasses.dataclass(frozen=True)
class Mpi:
    """The options of an MPI job's launcher pod. The defaults are the paths of the MPI operator's files."""

    command: tuple[str, ...]
    hostfile: str = ""
    discovery: str = DISCOVERY
    network_interface: str = ""
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    min_np: int | None = None
    max_np: int | None = None
    grace_s: float = 10.0
    cwd: str = "."
    python: str = sys.executable

    def job(self, environ: Mapping[str, str]) -> spec.Job:
        """The job on the hosts of the operator's host file.

        Raises:
          ValueError: the file cannot be read, or the number of its pods differs from DISTPAD_WORKERS.
        """
        file = self.hostfile or environ.get("OMPI_MCA_orte_default_hostfile") or HOSTFILE
        hosts = spec.read_hostfile(file)
        if environ.get("DISTPAD_WORKERS") and _number(environ, "DISTPAD_WORKERS") != len(hosts):
            evidence = f"{file} names {len(hosts)}: {', '.join(host.name for host in hosts)}."
            remedy = "Set it to the number of Worker replicas."
            raise ValueError(
                errors.sentence(
                    "pod", "DISTPAD_WORKERS", environ["DISTPAD_WORKERS"], "the number of pods", evidence, remedy
                )
            )
        return self._job(environ, hosts=hosts, controller="mpi")

    def elastic_job(self, environ: Mapping[str, str]) -> spec.Job:
        """The job on the hosts that the operator's script prints. DISTPAD_SLOTS gives the slots of each host.

        Raises:
          ValueError: a variable is missing or wrong, or the limits contradict each other.
        """
        slots = _number(environ, "DISTPAD_SLOTS")
        most = self.max_np or _number(environ, "DISTPAD_WORKERS") * slots
        return self._job(
            environ,
            controller="gloo",
            host_discovery_script=self.discovery,
            slots_per_host=slots,
            min_np=self.min_np or slots,
            max_np=most,
        )

    def _job(self, environ: Mapping[str, str], **more: object) -> spec.Job:
        return spec.Job(
            command=self.command,
            backend="horovod",
            network_interface=self.network_interface or environ.get("NCCL_SOCKET_IFNAME") or INTERFACE,
            secrets=dict(self.secrets),
            gpus=_number(environ, "DISTPAD_GPUS") if environ.get("DISTPAD_GPUS") else 0,
            grace_s=self.grace_s,
            cwd=self.cwd,
            python=self.python,
            **more,  # type: ignore[arg-type]
        )


def secret_files(folder: str = SECRETS) -> dict[str, str]:
    """The files of a folder of secrets, by the variable that each is for. Empty if the folder does not exist.

    Raises:
      ValueError: the folder cannot be read.
    """
    try:
        return {name: f"{folder}/{name}" for name in os.listdir(folder) if name[0] != "."}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"pod: {folder} cannot be read: {error.strerror}.") from error


def enough(job: spec.Job, hosts: Sequence[spec.Host]) -> bool:
    """Whether an elastic job can start on these hosts."""
    return sum(host.slots for host in hosts) >= (job.min_np or 1)


def _given(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise ValueError(f"pod: {name} is not set: {SET_BY[name]}.")
    return value


def _number(environ: Mapping[str, str], name: str) -> int:
    value = _given(environ, name)
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(errors.sentence("pod", name, repr(value), "an integer from 1"))
    return int(value)
