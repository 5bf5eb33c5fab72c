"""A training job as Kubernetes manifests: kustomize builds one of the kinds of jobs in k8s/ with the job's values.

This module writes a kustomization around the folder: the base, a component with the job's name, numbers and pod, and
the kind, which copies these to their places. PLACES names the few fields that only the built job has.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import yaml

from distpad import errors
from distpad.launcher import pod, spec

HERE = pathlib.Path(__file__).resolve()
FOLDERS = (HERE.parents[1] / "k8s", HERE.parents[2] / "k8s")  # in an installed package, in a checkout
FOLDER = next((folder for folder in FOLDERS if (folder / "kinds").is_dir()), FOLDERS[-1])
JOBS = "Job|JobSet|MPIJob|TrainJob"
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
CHECKPOINTS = "/checkpoints"
# Without GPUs, and for each GPU: a small part of the nodes that clouds sell with GPUs.
CPU, MEMORY = 4, "8Gi"
CPU_PER_GPU, GIB_PER_GPU = 8, 32
SHM_MIB = 1024  # for each GPU, at most a quarter of the memory
GPU = "nvidia.com/gpu"
# command that prints a program's version | minimum version | command that builds a folder
PROGRAMS = (
    (("kubectl", "version", "--client"), (1, 27), ("kubectl", "kustomize")),
    (("kustomize", "version"), (5, 0), ("kustomize", "build")),
)
LIMIT_S = 60.0

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


# -- the kustomization ------------------------------------------------------------------------------------------------


def values(job: Job) -> dict[str, str]:
    """The values that differ from those in k8s/base/values.yaml."""
    slots = job.slots or job.gpus or None
    numbers = {"workers": job.workers, "slots": slots, "restarts": job.max_restarts}
    return {"name": job.name, **{key: str(value) for key, value in numbers.items() if value is not None}}


def pod_patch(job: Job) -> dict[str, Any]:
    """The patch of the pod in k8s/base/pod.yaml."""
    mounts = {path: (claim, bool(ro)) for claim, path, *ro in (each.split(":") for each in job.mount)}
    mounts.setdefault(CHECKPOINTS, ("checkpoints", False))
    claims = list(
        dict.fromkeys(claim for claim, _ in mounts.values())
    )  # a volume for each, however often it is mounted
    names = {claim: f"claim-{number}" for number, claim in enumerate(claims)}
    names[mounts[CHECKPOINTS][0]] = "checkpoints"
    amounts = resources(job)
    shm_mib = min(_mebibytes(amounts["memory"]) // 4, SHM_MIB * max(1, job.gpus))
    shm = f"{shm_mib}Mi" if shm_mib % 1024 else f"{shm_mib // 1024}Gi"
    volumes: list[dict[str, Any]] = [
        *({"name": name, "persistentVolumeClaim": {"claimName": claim}} for claim, name in names.items()),
        {"name": "shm", "emptyDir": {"sizeLimit": shm}},
    ]
    mounted = [
        {"name": names[claim], "mountPath": path, **({"readOnly": True} if ro else {})}
        for path, (claim, ro) in mounts.items()
    ]
    if job.secret:
        parts = [re.split("[=:]", each) for each in job.secret]
        sources = [{"secret": {"name": secret, "items": [{"key": key, "path": name}]}} for name, secret, key in parts]
        volumes.append({"name": "secrets", "projected": {"sources": sources}})
        mounted.append({"name": "secrets", "mountPath": pod.SECRETS, "readOnly": True})
    env = [each.partition("=") for each in job.env]
    env += [("NCCL_SOCKET_IFNAME", "=", job.network_interface)] if job.network_interface else []
    env += [("DISTPAD_GPUS", "=", str(job.gpus))] if job.gpus else []  # a worker that does not see them ends the job
    container = {
        "name": "node",
        "image": job.image,
        "imagePullPolicy": "IfNotPresent" if "@" in job.image else "Always",
        **({"args": list(job.command)} if job.command else {}),
        "env": [{"name": name, "value": value} for name, _, value in env],
        "resources": {"requests": amounts, "limits": amounts},
        **({"securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}} if job.rdma else {}),
        "volumeMounts": mounted,
    }
    tolerated = [*([f"{GPU}:NoSchedule"] if job.gpus else []), *job.toleration]
    optional = {
        "tolerations": [_toleration(each) for each in tolerated],
        "nodeSelector": dict(each.split("=") for each in job.node_selector),
        "priorityClassName": job.priority_class,
        "serviceAccountName": job.service_account,
        "imagePullSecrets": [{"name": name} for name in job.image_pull_secret],
    }
    chosen = {"containers": [container], "volumes": volumes, **{key: each for key, each in optional.items() if each}}
    topology = {"annotations": {"kueue.x-k8s.io/podset-required-topology": job.topology}}
    return {**({"metadata": topology} if job.topology else {}), "spec": chosen}


def resources(job: Job) -> dict[str, str]:
    """The resources of a pod that trains. CPUs and memory follow the number of GPUs."""
    memory = f"{GIB_PER_GPU * job.gpus}Gi" if job.gpus else MEMORY
    device, _, count = (job.rdma or "").partition("=")
    return {
        "cpu": str(job.cpu or CPU_PER_GPU * job.gpus or CPU),
        "memory": job.memory or memory,
        **({GPU: str(job.gpus)} if job.gpus else {}),
        **({device: count or "1"} if device else {}),
    }


def _mebibytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024, "Ti": 1024**2}[quantity[-2:]]


def _toleration(text: str) -> dict[str, str]:
    """Parse a toleration.

    >>> _toleration("team=vision:NoSchedule")
    {'key': 'team', 'operator': 'Equal', 'value': 'vision', 'effect': 'NoSchedule'}
    """
    taint, _, effect = text.partition(":")
    key, equals, value = taint.partition("=")
    how = {"operator": "Equal", "value": value} if equals else {"operator": "Exists"}
    return {"key": key, **how, **({"effect": effect} if effect else {})}


def job_patches(job: Job) -> list[dict[str, Any]]:
    """The patches of the built job: its queue, and the fields of PLACES."""
    topology = {"alpha.jobset.sigs.k8s.io/exclusive-topology": job.exclusive_topology}
    fields = {
        "--timeout-s": None if job.timeout_s is None else int(job.timeout_s),
        "--ttl-s": job.ttl_s,
        "--exclusive-topology": topology if job.kind == "jobset" else {"annotations": topology},
    }
    found = []
    for flag, value in fields.items():
        if job.given(flag) is not None:
            kind, path = PLACES[flag][job.kind]
            found.append(_patch(kind, [{"op": "add", "path": path, "value": value}]))
    if job.queue:
        label = {"kueue.x-k8s.io/queue-name": job.queue}
        found.append(_patch(JOBS, {"apiVersion": "any", "kind": "any", "metadata": {"name": "any", "labels": label}}))
    return found


def _patch(kind: str, patch: object) -> dict[str, Any]:
    return {"target": {"kind": kind}, "patch": _as_yaml(patch)}


class _Quoted(yaml.SafeDumper):
    """Quotes all strings, since YAML 1.1 and 1.2 parse some plain words differently."""


_Quoted.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))
_Quoted.ignore_aliases = lambda *_: True


def _as_yaml(value: object) -> str:
    return yaml.dump(value, Dumper=_Quoted, sort_keys=False)


def write(job: Job, place: pathlib.Path) -> None:
    """Write the kustomization of a job to an empty folder."""
    k8s = os.path.relpath(os.path.realpath(job.folder), os.path.realpath(place))  # kustomize takes no absolute paths
    components = ["job", *(f"{k8s}/components/{name}" for name in job.component), f"{k8s}/kinds/{job.kind}"]
    own = {
        "kind": "Kustomization",
        **({"namespace": job.namespace} if job.namespace else {}),
        "resources": [f"{k8s}/base"],
        "components": components,
        "patches": job_patches(job),
        "sortOptions": {"order": "fifo"},  # the runtime of a TrainJob must precede it
    }
    given = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "values"}, "data": values(job)}
    patched = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "train"}, "template": pod_patch(job)}
    component = {"kind": "Component", "patches": [{"patch": _as_yaml(each)} for each in (given, patched)]}
    (place / "job").mkdir()
    for folder, content in ((place, own), (place / "job", component)):
        version = "v1alpha1" if folder.name == "job" else "v1beta1"
        text = _as_yaml({"apiVersion": f"kustomize.config.k8s.io/{version}", **content})
        (folder / "kustomization.yaml").write_text(text, encoding="utf-8")


# -- building ---------------------------------------------------------------------------------------------------------


def build(job: Job) -> str:
    """Return the manifests, ready for ``kubectl apply -f -``.

    Raises:
      ValueError: kubectl is missing or too old, or the folder k8s/ was changed.
    """
    program = _builder()
    with tempfile.TemporaryDirectory(prefix="distpad-k8s-") as name:
        write(job, pathlib.Path(name))
        return _run([*program, name])


def _builder() -> Sequence[str]:
    """The command that builds a folder: kubectl, or else kustomize."""
    found = []
    for asked, oldest, builds in PROGRAMS:
        if shutil.which(asked[0]) is None:
            continue
        try:
            version = re.search(r"v(\d+)\.(\d+)", _run(asked))
        except ValueError:  # such as a broken link on PATH
            version = None
        if version and (int(version[1]), int(version[2])) >= oldest:
            return builds
        found.append(f"{asked[0]} {version[0] if version else 'of unknown version'}")
    wanted = " or ".join(f"{asked[0]} {oldest[0]}.{oldest[1]}" for asked, oldest, _ in PROGRAMS)
    remedy = "To install kubectl, see https://kubernetes.io/docs/tasks/tools/."
    raise ValueError(
        f"launch: --k8s found {' and '.join(found) or 'no kubectl'} on PATH, expected {wanted} or newer. {remedy}"
    )


def _run(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, encoding="utf-8", timeout=LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"launch: {argv[0]} cannot be used: {error}.") from error
    if done.returncode:
        raise ValueError(f"launch: {argv[0]} {argv[1]} failed: {done.stderr.strip()}")
    return done.stdout
