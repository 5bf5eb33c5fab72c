"""A training job in Kubernetes, and the rules for its values. kustomize.py makes manifests of it."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import secrets
from typing import Any

from distpad import errors
from distpad.launcher import spec

HERE = pathlib.Path(__file__).resolve()
FOLDERS = (HERE.parents[1] / "k8s", HERE.parents[2] / "k8s")  # in an installed package, in a checkout
FOLDER = next((folder for folder in FOLDERS if (folder / "kinds").is_dir()), FOLDERS[-1])
OF_HOROVOD = ("mpijob", "mpijob-elastic", "trainjob-mpi")
COMPONENTS = ("network-policy", "openshift")  # those without a value
# flag | kind of job | kind of the manifest, and the field's path
PLACES: dict[str, dict[str, tuple[str, str]]] = {
    "--timeout-s": {
        "indexed-job": ("Job", "/spec/activeDeadlineSeconds"),
        "jobset": ("JobSet", "/spec/replicatedJobs/0/template/spec/activeDeadlineSeconds"),
        "mpijob": ("MPIJob", "/spec/runPolicy/activeDeadlineSeconds"),
        "mpijob-elastic": ("MPIJob", "/spec/runPolicy/activeDeadlineSeconds"),
        "trainjob": ("TrainJob", "/spec/activeDeadlineSeconds"),
        "trainjob-mpi": ("TrainJob", "/spec/activeDeadlineSeconds"),
    },
    "--ttl-s": {
        "indexed-job": ("Job", "/spec/ttlSecondsAfterFinished"),
        "jobset": ("JobSet", "/spec/ttlSecondsAfterFinished"),
        "mpijob": ("MPIJob", "/spec/runPolicy/ttlSecondsAfterFinished"),
        "mpijob-elastic": ("MPIJob", "/spec/runPolicy/ttlSecondsAfterFinished"),
    },
    "--exclusive-topology": {
        "jobset": ("JobSet", "/metadata/annotations"),
        "trainjob": ("TrainingRuntime", "/spec/template/metadata"),
        "trainjob-mpi": ("TrainingRuntime", "/spec/template/metadata"),
    },
    "--slots": dict.fromkeys(OF_HOROVOD, ("ConfigMap", "/data/slots")),
}
# What the operators append to a job's name, at most, in a name of at most 63 characters; 12345 is a random suffix.
SUFFIXES = {
    "indexed-job": "-{last}",
    "jobset": "-node-0-{last}-12345",
    "mpijob": "-launcher-{last}",
    "mpijob-elastic": "-launcher-{last}",
    "trainjob": "-node-0-{last}-12345",
    "trainjob-mpi": "-launcher-0-{last}-12345",
}
LONGEST_NAME = 63
MOST_PODS = 100_000  # Kubernetes's limit for an Indexed Job
MOST_INT32 = 2**31 - 1

_IMAGE = re.compile(
    r"([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]+)?/)?"  # the registry
    r"[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*(/[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64}|@sha512:[0-9a-f]{128})?"
)
_OBJECT = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"  # the name of an object
_KEY = rf"({_OBJECT}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{{0,61}}[A-Za-z0-9])?"  # of a label, a taint or a resource
_VALUE = r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?"
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
# flag | its form | the pattern of each value
FORMS = {
    "--name": ("letters, digits and hyphens, with a letter first and no hyphen last", r"[a-z]([a-z0-9-]*[a-z0-9])?"),
    "--queue": ("the name of a LocalQueue", r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"),
    "--namespace": ("at most 63 small letters, digits and hyphens", r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"),
    "--memory": ("a number of Mi, Gi or Ti, such as 64Gi", r"[1-9][0-9]{0,8}[MGT]i"),
    "--env": ("NAME=VALUE", rf"(?s){_VARIABLE}=[^\0]*"),
    "--secret": ("NAME=SECRET:KEY, of a Secret of the namespace", rf"{_VARIABLE}={_OBJECT}:[A-Za-z0-9_.-]+"),
    "--mount": ("CLAIM:PATH or CLAIM:PATH:ro, of a claim of the namespace", rf"{_OBJECT}:/[^:\0]+(:ro)?"),
    "--rdma": ("RESOURCE or RESOURCE=NUMBER, such as rdma/hca=8", rf"{_KEY}(=[1-9][0-9]{{0,2}})?"),
    "--network-interface": ("the name of an interface", r"[^\s/,:]{1,15}"),
    "--topology": ("a label of nodes", _KEY),
    "--exclusive-topology": ("a label of nodes", _KEY),
    "--priority-class": ("the name of a PriorityClass", _OBJECT),
    "--service-account": ("the name of a ServiceAccount", _OBJECT),
    "--node-selector": ("LABEL=VALUE", f"{_KEY}={_VALUE}"),
    "--toleration": ("KEY, KEY=VALUE or KEY=VALUE:EFFECT", f"{_KEY}(={_VALUE})?(:(NoSchedule|NoExecute))?"),
    "--image-pull-secret": ("the name of a Secret", _OBJECT),
}


def kinds(folder: pathlib.Path = FOLDER) -> tuple[str, ...]:
    """The kinds of jobs. Empty if the folder does not exist, as in images."""
    return tuple(SUFFIXES) if (folder / "kinds").is_dir() else ()


def unique_name() -> str:
    """A name for a job. The characters are those of Kubernetes's own random names, which form no words."""
    return "train-" + "".join(secrets.choice("bcdfghjklmnpqrstvwxz2456789") for _ in range(5))


@dataclasses.dataclass(frozen=True)
class Job:
    """One training job in Kubernetes. ``distpad launch --help`` documents each field; None keeps the folder's value.

    Raises:
      ValueError: a field is out of range, or fields contradict each other.
    """

    kind: str
    image: str = ""
    command: tuple[str, ...] = ()  # empty: the example in the folder
    name: str = dataclasses.field(default_factory=unique_name)
    workers: int | None = None
    slots: int | None = None
    gpus: int = 0
    cpu: int | None = None
    memory: str | None = None
    env: tuple[str, ...] = ()
    secret: tuple[str, ...] = ()
    mount: tuple[str, ...] = ()
    rdma: str | None = None
    network_interface: str | None = None
    queue: str | None = None
    topology: str | None = None
    exclusive_topology: str | None = None
    priority_class: str | None = None
    service_account: str | None = None
    node_selector: tuple[str, ...] = ()
    toleration: tuple[str, ...] = ()
    image_pull_secret: tuple[str, ...] = ()
    component: tuple[str, ...] = ()
    namespace: str | None = None
    max_restarts: int | None = None
    timeout_s: float | None = None
    ttl_s: int | None = None
    folder: pathlib.Path = FOLDER

    def __post_init__(self) -> None:
        if not kinds(self.folder):
            remedy = "Container images do not contain it. Use an installation from a wheel or a checkout."
            raise ValueError(f"launch: --k8s needs the folder k8s/, but {self.folder} has no kinds. {remedy}")
        errors.choice("launch", "--k8s", self.kind, kinds(self.folder))
        if not _IMAGE.fullmatch(self.image):
            remedy = "Build and push one: docker build -f k8s/image/Dockerfile ."
            rule = "NAME[:TAG][@DIGEST] of an image that the cluster's nodes can pull"
            raise ValueError(errors.sentence("launch", "--image", repr(self.image), rule, remedy))
        for flag, low, high in (
            ("--workers", 1, MOST_PODS),
            ("--slots", 1, spec.MOST_SLOTS),
            ("--gpus", 0, spec.MOST_SLOTS),
            ("--cpu", 1, MOST_INT32),
            ("--max-restarts", 0, MOST_INT32),
            ("--timeout-s", 1, MOST_INT32),
            ("--ttl-s", 0, MOST_INT32),
        ):
            value = self.given(flag)
            if value is not None and not low <= value <= high:
                raise ValueError(errors.sentence("launch", flag, value, f"{low} to {high}"))
        for flag, (rule, pattern) in FORMS.items():
            value = self.given(flag)
            for each in value if isinstance(value, tuple) else () if value is None else (value,):
                if not re.fullmatch(pattern, each):
                    raise ValueError(errors.sentence("launch", flag, repr(each), rule))
        for component in self.component:
            errors.choice("launch", "--component", component, COMPONENTS)
        if not all(map(_is_text, (*self.command, *self.env, *self.mount))):
            raise ValueError("launch: the command holds a NUL byte or invalid UTF-8, which YAML cannot represent.")
        self._check_together()

    def _check_together(self) -> None:
        for flag, places in PLACES.items():
            if self.given(flag) is not None and self.kind not in places:
                remedy = f"Use one of {', '.join(places)}, or omit {flag}."
                raise ValueError(errors.sentence("launch", flag, self.given(flag), f"none for {self.kind}", remedy))
        if self.gpus and self.slots not in (None, self.gpus):
            rule = f"{self.gpus}, as --gpus: Horovod runs one process per GPU"
            raise ValueError(errors.sentence("launch", "--slots", self.slots, rule, "Omit --slots."))
        if self.topology and not self.queue:
            raise ValueError(errors.sentence("launch", "--topology", self.topology, "a --queue, since it is Kueue's"))
        if "openshift" in self.component and self.kind in OF_HOROVOD:
            remedy = "See k8s/components/openshift/README.md."
            raise ValueError(errors.sentence("launch", "--component", "openshift", f"none for {self.kind}", remedy))
        suffix = SUFFIXES[self.kind].format(last=(self.workers or 2) - 1)
        if len(self.name + suffix) > LONGEST_NAME:
            rule = f"at most {LONGEST_NAME - len(suffix)} characters"
            evidence = f"Host names such as {self.name + suffix} have at most {LONGEST_NAME}."
            raise ValueError(errors.sentence("launch", "--name", self.name, rule, evidence))

    def given(self, flag: str) -> Any:
        """The value of a flag."""
        return getattr(self, flag[2:].replace("-", "_"))


def _is_text(word: str) -> bool:
    try:
        return b"\0" not in word.encode()
    except UnicodeEncodeError:  # a lone surrogate, Python's representation of an invalid byte
        return False
