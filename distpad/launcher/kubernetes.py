"""A training job in Kubernetes, and the rules for its values. kustomize.py makes manifests of it."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any, NamedTuple, Optional

from distpad import errors
from distpad.launcher import options, spec

HERE = pathlib.Path(__file__).resolve()
FOLDERS = (HERE.parents[1] / "k8s", HERE.parents[2] / "k8s")  # in an installed package, in a checkout
FOLDER = next((folder for folder in FOLDERS if (folder / "kinds").is_dir()), FOLDERS[-1])
option: Any = functools.partial(options.option, panel="Kubernetes")
COMPONENTS = ("network-policy", "openshift")  # those without a value


class Kind(NamedTuple):
    """A kind of jobs.

    Attributes:
      manifest: the kind of its manifest.
      suffix: the longest text that the operator appends to the job's name, in a name of at most 63 characters; 12345
        is a random part.
      timeout, ttl: the paths of the fields with its time limits, below which it has them.
      topology: the kind of the manifest that has the annotation of an exclusive topology.
      slots: whether its pods run several processes: Horovod's.
    """

    manifest: str
    suffix: str
    timeout: str
    ttl: str = ""
    topology: str = ""
    slots: bool = False


KINDS = {
    "indexed-job": Kind("Job", "-{last}", "/spec", "/spec"),
    "jobset": Kind("JobSet", "-node-0-{last}-12345", "/spec/replicatedJobs/0/template/spec", "/spec", "JobSet"),
    "mpijob": Kind("MPIJob", "-launcher-{last}", "/spec/runPolicy", "/spec/runPolicy", slots=True),
    "mpijob-elastic": Kind("MPIJob", "-launcher-{last}", "/spec/runPolicy", "/spec/runPolicy", slots=True),
    "trainjob": Kind("TrainJob", "-node-0-{last}-12345", "/spec", topology="TrainingRuntime"),
    "trainjob-mpi": Kind("TrainJob", "-launcher-0-{last}-12345", "/spec", topology="TrainingRuntime", slots=True),
}
LONGEST_NAME = 63
MOST_PODS = 100_000  # Kubernetes's limit for an Indexed Job
MOST_INT32 = 2**31 - 1

_IMAGE = (
    r"([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]+)?/)?"  # the registry
    r"[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*(/[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64}|@sha512:[0-9a-f]{128})?"
)
_OBJECT = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"  # the name of an object
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # a name that is part of a host's name
_KEY = rf"({_OBJECT}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{{0,61}}[A-Za-z0-9])?"  # of a label, a taint or a resource
_OF_NODES = {"pattern": _KEY, "rule": "a label of nodes"}
_TEXT = r"[^\0\ud800-\udfff]"  # a lone surrogate is Python's representation of an invalid byte
_VALUE = r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?"


def kinds(folder: pathlib.Path = FOLDER) -> tuple[str, ...]:
    """The kinds of jobs. Empty if the folder does not exist, as in images."""
    return tuple(KINDS) if (folder / "kinds").is_dir() else ()


def unique_name() -> str:
    """A name for a job. The characters are those of Kubernetes's own random names, which form no words."""
    return "train-" + "".join("bcdfghjklmnpqrstvwxz2456789"[byte % 27] for byte in os.urandom(5))


@dataclasses.dataclass(frozen=True)
class Job:
    """One training job in Kubernetes. ``distpad launch --help`` documents each field; None keeps the folder's value.

    Raises:
      ValueError: a field is out of range, or fields contradict each other.
    """

    # fmt: off
    kind: str = option("", f"Print the manifests of a Kubernetes job and exit: {', '.join(kinds()) or 'none is installed here'}.", flag="--k8s", metavar="KIND")
    image: str = option("", "The image of all pods.", metavar="NAME[:TAG][@DIGEST]", pattern=_IMAGE, rule="NAME[:TAG][@DIGEST] of an image that the cluster's nodes can pull", remedy="Build and push one: docker build -f k8s/image/Dockerfile .")
    command: tuple[str, ...] = option((), flag="COMMAND", pattern=f"{_TEXT}*", rule="words that YAML can represent: no NUL byte, no invalid UTF-8")  # empty: the example in the folder
    workers: Optional[int] = option(None, "Number of pods that train; for mpijob-elastic the maximum. Default: the value in k8s/.", low=1, high=MOST_PODS)
    slots: Optional[int] = option(None, "Horovod: processes in each pod. Default: one per GPU, or one.", low=1, high=spec.MOST_SLOTS)
    gpus: int = option(0, low=0, high=spec.MOST_SLOTS)
    name: str = option(None, "The job's name. Default: a new one, such as train-x7k2p.", factory=unique_name, pattern="[a-z]([a-z0-9-]*[a-z0-9])?", rule="letters, digits and hyphens, with a letter first and no hyphen last")
    cpu: Optional[int] = option(None, "CPUs of each pod that trains. Default: 8 per GPU, or 4.", low=1, high=MOST_INT32)
    memory: Optional[str] = option(None, "Memory of each pod that trains, /dev/shm included. Default: 32Gi per GPU, or 8Gi.", metavar="QUANTITY", pattern="[1-9][0-9]{0,8}[MGT]i", rule="a number of Mi, Gi or Ti, such as 64Gi")
    env: tuple[str, ...] = option((), pattern=f"{spec.NAME}={_TEXT}*", rule="NAME=VALUE")
    secret: tuple[str, ...] = option((), pattern=f"{spec.NAME}={_OBJECT}:[A-Za-z0-9_.-]+", rule="NAME=SECRET:KEY, of a Secret of the namespace")
    mount: tuple[str, ...] = option((), "An existing PersistentVolumeClaim to mount. Default: checkpoints:/checkpoints. Repeatable.", metavar="CLAIM:PATH[:ro]", pattern=f"{_OBJECT}:/(?:(?!:){_TEXT})+(:ro)?", rule="CLAIM:PATH or CLAIM:PATH:ro, of a claim of the namespace")
    rdma: Optional[str] = option(None, "RDMA devices of each pod that trains, such as rdma/hca=8. See k8s/components/rdma.", metavar="RESOURCE[=NUMBER]", pattern=f"{_KEY}(=[1-9][0-9]{{0,2}})?", rule="RESOURCE or RESOURCE=NUMBER, such as rdma/hca=8")
    network_interface: Optional[str] = option(None, pattern=r"[^\s/,:]{1,15}", rule="the name of an interface")
    queue: Optional[str] = option(None, "The Kueue LocalQueue in which the job waits.", metavar="NAME", pattern=_LABEL, rule="the name of a LocalQueue")
    topology: Optional[str] = option(None, "Kueue: place all pods that train on nodes with the same value of this label, such as a rack.", metavar="LABEL", **_OF_NODES)
    exclusive_topology: Optional[str] = option(None, "JobSet: likewise, and no other JobSet there.", metavar="LABEL", **_OF_NODES)
    priority_class: Optional[str] = option(None, "The PriorityClass of all pods.", metavar="NAME", pattern=_OBJECT, rule="the name of a PriorityClass")
    service_account: Optional[str] = option(None, "The ServiceAccount of all pods, such as for the cloud's storage. They get no token of Kubernetes's API.", metavar="NAME", pattern=_OBJECT, rule="the name of a ServiceAccount")
    node_selector: tuple[str, ...] = option((), "A label of the nodes of pods that train. Repeatable.", metavar="LABEL=VALUE", pattern=f"{_KEY}={_VALUE}", rule="LABEL=VALUE")
    toleration: tuple[str, ...] = option((), "A taint of nodes that pods that train tolerate. Repeatable.", metavar="KEY[=VALUE][:EFFECT]", pattern=f"{_KEY}(={_VALUE})?(:(NoSchedule|NoExecute))?", rule="KEY, KEY=VALUE or KEY=VALUE:EFFECT")
    image_pull_secret: tuple[str, ...] = option((), "A Secret of the image's registry. Repeatable.", metavar="NAME", pattern=_OBJECT, rule="the name of a Secret")
    max_restarts: Optional[int] = option(None, low=0, high=MOST_INT32)
    timeout_s: Optional[float] = option(None, low=1, high=MOST_INT32)
    ttl_s: Optional[int] = option(None, "Seconds after which Kubernetes deletes the job when it has ended. Default: a week.", low=0, high=MOST_INT32)
    component: tuple[str, ...] = option((), f"{' or '.join(COMPONENTS)}: see k8s/components. Repeatable.", metavar="NAME", pattern="|".join(COMPONENTS), rule=" or ".join(COMPONENTS))
    namespace: Optional[str] = option(None, "Default: the namespace that kubectl applies to.", metavar="NAME", pattern=_LABEL, rule="at most 63 small letters, digits and hyphens")
    # fmt: on
    folder: pathlib.Path = FOLDER

    def __post_init__(self) -> None:
        if not kinds(self.folder):
            remedy = "Container images do not contain it. Use an installation from a wheel or a checkout."
            raise ValueError(f"launch: --k8s needs the folder k8s/, but {self.folder} has no kinds. {remedy}")
        errors.choice("launch", "--k8s", self.kind, kinds(self.folder))
        options.check(self)
        self._check_together()

    def _check_together(self) -> None:
        for name in ("ttl_s", "exclusive_topology", "slots"):
            value, column = getattr(self, name), name.removesuffix("_s").removeprefix("exclusive_")
            having = [kind for kind in KINDS if getattr(KINDS[kind], column)]
            if value is not None and self.kind not in having:
                flag = f"--{name.replace('_', '-')}"
                remedy = f"Use one of {', '.join(having)}, or omit {flag}."
                raise ValueError(errors.sentence("launch", flag, value, f"none for {self.kind}", remedy))
        if self.gpus and self.slots not in (None, self.gpus):
            rule = f"{self.gpus}, as --gpus: Horovod runs one process per GPU"
            raise ValueError(errors.sentence("launch", "--slots", self.slots, rule, "Omit --slots."))
        if self.topology and not self.queue:
            raise ValueError(errors.sentence("launch", "--topology", self.topology, "a --queue, since it is Kueue's"))
        if "openshift" in self.component and KINDS[self.kind].slots:
            remedy = "See k8s/components/openshift/README.md."
            raise ValueError(errors.sentence("launch", "--component", "openshift", f"none for {self.kind}", remedy))
        suffix = KINDS[self.kind].suffix.format(last=(self.workers or 2) - 1)
        if len(self.name + suffix) > LONGEST_NAME:
            rule = f"at most {LONGEST_NAME - len(suffix)} characters"
            evidence = f"Host names such as {self.name + suffix} have at most {LONGEST_NAME}."
            raise ValueError(errors.sentence("launch", "--name", self.name, rule, evidence))
