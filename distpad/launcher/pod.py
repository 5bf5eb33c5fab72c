"""What a pod of a training job knows of itself and of the others: pure functions of its environment.

Kubernetes and its operators tell a pod its number, its host name and little else; the manifests in k8s/ add the rest as
variables. From these follow the names of all pods, and what the training's engine has to be told.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence

from distpad import errors
from distpad.launcher import spec, tfconfig

GANGS = ("indexed-job", "jobset", "trainjob")  # each pod is a worker of MultiWorkerMirroredStrategy
LAUNCHERS = ("mpi-launcher", "mpi-elastic-launcher")
KINDS = (*GANGS, *LAUNCHERS, "mpi-worker")
HOSTFILE, DISCOVERY = "/etc/mpi/hostfile", "/etc/mpi/discover_hosts.sh"  # where the MPI operator puts them
# a variable | who sets it
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
    """One pod of a gang: pods that start together, and of which none can go on without the others.

    Attributes:
      index: which worker it is.
      names: the host names of all, in the order of their indices.
      tf_config: what TensorFlow is told.
    """

    index: int
    names: tuple[str, ...]
    tf_config: str

    @property
    def name(self) -> str:
        return self.names[self.index]

    def env(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The training's environment: with TF_CONFIG, and what the library holds the engine to."""
        count = str(len(self.names))
        promises = {"BACKEND": "multiworker", "WORKERS": count, "HOSTS": count, "RANK": str(self.index)}
        told = {f"DISTPAD_{name}": value for name, value in promises.items()}
        return {**environ, **told, "TF_CONFIG": self.tf_config, "PYTHONUNBUFFERED": "1"}


def member(kind: str, environ: Mapping[str, str], port: int) -> Member:
    """Which one of its gang a pod is.

    Args:
      kind: one of GANGS.
      environ: the pod's variables.
      port: where each worker's TensorFlow listens.

    Raises:
      ValueError: a variable is missing or wrong; the message says who has to set it.

    >>> told = {"DISTPAD_JOB_NAME": "train", "DISTPAD_SERVICE": "w", "DISTPAD_WORKERS": "2"}
    >>> member("indexed-job", {**told, "JOB_COMPLETION_INDEX": "1"}, 2222).names
    ('train-0.w', 'train-1.w')
    """
    config = _of_indexed_job(environ, port) if kind == "indexed-job" else _of_jobset(environ, port)
    told = json.loads(config)
    names = tuple(address.rpartition(":")[0] for address in told["cluster"]["worker"])
    return Member(told["task"]["index"], names, config)


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
    """A TrainJob is one, too: Kubeflow Trainer makes a JobSet of it."""
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
    """What the launcher's pod of an MPI job is told on its command line, in place of what operators put there."""

    command: tuple[str, ...]
    port: int = 2222
    ssh_config: str = ""
    identity: str = ""  # the private key's file
    hostfile: str = ""
    discovery: str = DISCOVERY
    network_interface: str = "eth0"
    min_np: int | None = None
    max_np: int | None = None
    grace_s: float = 10.0
    cwd: str = "."
    python: str = sys.executable

    def job(self, environ: Mapping[str, str]) -> spec.Job:
        """The job on the hosts of the operator's host file.

        Raises:
          ValueError: the file cannot be read, or names more or fewer pods than the manifest promises.
        """
        file = self.hostfile or environ.get("OMPI_MCA_orte_default_hostfile") or HOSTFILE
        hosts = spec.read_hostfile(file)
        if environ.get("DISTPAD_WORKERS") and _number(environ, "DISTPAD_WORKERS") != len(hosts):
            evidence = f"{file} names {len(hosts)}: {', '.join(host.name for host in hosts)}."
            remedy = "Set it to the Worker replicas."
            raise ValueError(
                errors.sentence("pod", "DISTPAD_WORKERS", environ["DISTPAD_WORKERS"], "the pods", evidence, remedy)
            )
        return self._job(environ, hosts=hosts, controller="mpi", ssh_args=("-F", self.ssh_config))

    def elastic_job(self, environ: Mapping[str, str]) -> spec.Job:
        """The job on the hosts that the operator's script prints, which leaves out how many workers each has.

        Raises:
          ValueError: a variable is missing or wrong, or limits do not go together.
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
            # horovodrun passes no more on to ssh; the rest stands in the image's /etc/ssh
            ssh_args=("-p", str(self.port), "-i", self.identity),
        )

    def _job(self, environ: Mapping[str, str], **more: object) -> spec.Job:
        return spec.Job(
            command=self.command,
            backend="horovod",
            network_interface=self.network_interface,
            max_restarts=_number(environ, "DISTPAD_MAX_RESTARTS", 0) if environ.get("DISTPAD_MAX_RESTARTS") else 0,
            grace_s=self.grace_s,
            cwd=self.cwd,
            python=self.python,
            **more,  # type: ignore[arg-type]
        )


def enough(job: spec.Job, hosts: Sequence[spec.Host]) -> bool:
    """Whether an elastic job can start on these hosts."""
    return sum(host.slots for host in hosts) >= (job.min_np or 1)


def _given(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise ValueError(f"pod: {name} is not set: {SET_BY[name]}.")
    return value


def _number(environ: Mapping[str, str], name: str, least: int = 1) -> int:
    value = _given(environ, name)
    if not value.isdecimal() or int(value) < least:
        raise ValueError(errors.sentence("pod", name, repr(value), f"an integer from {least}"))
    return int(value)
