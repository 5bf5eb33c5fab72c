"""The configuration of a pod of a training job: pure functions of its environment variables.

Kubernetes and its operators give a pod its index and host name; the manifests in k8s/ add further variables. This
module derives the names of all pods and the configuration of the engine from these variables.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from distpad import errors
from distpad.launcher import render, spec

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
      port: the port of TensorFlow in each pod.
    """

    index: int
    names: tuple[str, ...]
    port: int = 2222

    def env(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The training's environment: TF_CONFIG, and the expected topology, which the library checks."""
        count = str(len(self.names))
        topology = {"BACKEND": "multiworker", "WORKERS": count, "HOSTS": count, "RANK": str(self.index)}
        expected = {f"DISTPAD_{name}": value for name, value in topology.items()}
        config = render.tf_config([f"{name}:{self.port}" for name in self.names], self.index)
        return {**environ, **expected, "TF_CONFIG": config, "PYTHONUNBUFFERED": "1"}


def member(kind: str, environ: Mapping[str, str], port: int) -> Member:
    """Derive a pod's place among the pods of its job from its environment.

    A TrainJob's pods are those of a JobSet, since Kubeflow Trainer makes one.

    Args:
      kind: one of WORKERS.
      environ: the pod's variables.
      port: the port of TensorFlow in each pod.

    Raises:
      ValueError: a variable is missing or wrong. The message names the variable's origin.

    >>> environ = {"DISTPAD_JOB_NAME": "train", "DISTPAD_SERVICE": "w", "DISTPAD_WORKERS": "2"}
    >>> member("indexed-job", {**environ, "JOB_COMPLETION_INDEX": "1"}, 2222)
    Member(index=1, names=('train-0.w', 'train-1.w'), port=2222)
    """
    workers, index = _number(environ, "DISTPAD_WORKERS"), _given(environ, "JOB_COMPLETION_INDEX")
    if kind == "indexed-job":
        first = own = _given(environ, "DISTPAD_JOB_NAME")
        domain = _given(environ, "DISTPAD_SERVICE")
        if environ.get("POD_NAMESPACE"):
            domain = f"{domain}.{environ['POD_NAMESPACE']}.svc"
    else:
        domain = _given(environ, "DISTPAD_JOBSET_NAME")
        jobs = f"{domain}-{_given(environ, 'DISTPAD_REPLICATED_JOB')}"
        first, own = f"{jobs}-0", f"{jobs}-{_given(environ, 'DISTPAD_JOB_INDEX')}"  # one job with all pods
    own, names = f"{own}-{index}.{domain}", [f"{first}-{i}.{domain}" for i in range(workers)]
    if own not in names:
        rule = f"one of the {workers} of DISTPAD_WORKERS, {names[0]} to {names[-1]}"
        raise ValueError(errors.sentence("pod", "this pod's name", own, rule))
    return Member(names.index(own), tuple(names), port)


def mpi_job(
    kind: str, environ: Mapping[str, str], discovery: str = DISCOVERY, *, min_np: int | None = None, **fields: Any
) -> spec.Job:
    """The Horovod job of an MPI job's launcher pod: on the hosts of the operator's host file, or of its script.

    Args:
      kind: one of LAUNCHERS.
      environ: the pod's variables. DISTPAD_SLOTS gives the slots of each host to an elastic job, whose maximum is the
        slots of all pods. NCCL_SOCKET_IFNAME names the interface, by default INTERFACE.
      discovery: the script of an elastic job, by default the MPI operator's.
      min_np: the minimum of an elastic job, by default the slots of one pod.
      fields: further fields of the job.

    Raises:
      ValueError: a variable is missing or wrong, the host file cannot be read, or names another number of pods.
    """
    fields["network_interface"] = environ.get("NCCL_SOCKET_IFNAME") or INTERFACE
    fields["gpus"] = _number(environ, "DISTPAD_GPUS") if environ.get("DISTPAD_GPUS") else 0
    if kind == "mpi-elastic-launcher":
        slots = _number(environ, "DISTPAD_SLOTS")
        fields |= {"host_discovery_script": discovery, "slots_per_host": slots, "min_np": min_np or slots}
        fields["max_np"] = _number(environ, "DISTPAD_WORKERS") * slots
        return spec.Job(backend="horovod", controller="gloo", **fields)
    file = environ.get("OMPI_MCA_orte_default_hostfile") or HOSTFILE
    hosts = spec.read_hostfile(file)
    if environ.get("DISTPAD_WORKERS") and _number(environ, "DISTPAD_WORKERS") != len(hosts):
        evidence = f"{file} names {len(hosts)}: {', '.join(host.name for host in hosts)}."
        given, remedy = environ["DISTPAD_WORKERS"], "Set it to the number of Worker replicas."
        raise ValueError(errors.sentence("pod", "DISTPAD_WORKERS", given, "the number of pods", evidence, remedy))
    return spec.Job(backend="horovod", controller="mpi", hosts=hosts, **fields)


def secret_files(folder: str = SECRETS) -> tuple[str, ...]:
    """The files of a folder of secrets as NAME=FILE, the name being the variable's. Empty without the folder.

    Raises:
      ValueError: the folder cannot be read.
    """
    try:
        return tuple(f"{name}={folder}/{name}" for name in os.listdir(folder) if name[0] != ".")
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ValueError(f"pod: {folder} cannot be read: {error.strerror}.") from error


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
