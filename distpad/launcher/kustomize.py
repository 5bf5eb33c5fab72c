"""Manifests of a training job: kustomize builds one of the kinds of jobs in k8s/ with the job's values.

This module writes a kustomization around the folder: the base, a component with the job's name, numbers and pod, and
the kind, which copies these to their places. Patches set the few fields that only the built job has.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import Any

import yaml

from distpad.launcher import kubernetes, pod

JOBS = "Job|JobSet|MPIJob|TrainJob"
CHECKPOINTS = "/checkpoints"
# Without GPUs, and for each GPU: a small part of the nodes that clouds sell with GPUs.
CPU, MEMORY = 4, "8Gi"
CPU_PER_GPU, GIB_PER_GPU = 8, 32
SHM_MIB = 1024  # for each GPU, at most a quarter of the memory
GPU = "nvidia.com/gpu"
PROGRAMS = (("kubectl", "kustomize"), ("kustomize", "build"))  # the first one on PATH builds a folder
NEEDS = "Needs kubectl 1.27 or kustomize 5.0 or newer. Install: https://kubernetes.io/docs/tasks/tools/"
LIMIT_S = 60.0


def _given(**fields: Any) -> dict[str, Any]:
    """The fields of an object that are given. Zero is a value."""
    return {key: value for key, value in fields.items() if value or value == 0}


def values(job: kubernetes.Job) -> dict[str, str]:
    """The values that differ from those in k8s/base/values.yaml."""
    slots = job.slots or job.gpus or None
    given = _given(name=job.name, workers=job.workers, slots=slots, restarts=job.max_restarts)
    return {key: str(value) for key, value in given.items()}


def pod_patch(job: kubernetes.Job) -> dict[str, Any]:
    """The patch of the pod in k8s/base/pod.yaml."""
    mounts = {path: (claim, bool(ro)) for claim, path, *ro in (each.split(":") for each in job.mount)}
    mounts.setdefault(CHECKPOINTS, ("checkpoints", False))
    claims = dict.fromkeys(claim for claim, _ in mounts.values())  # a volume for each, however often it is mounted
    names = {claim: f"claim-{number}" for number, claim in enumerate(claims)}
    names[mounts[CHECKPOINTS][0]] = "checkpoints"
    amounts = resources(job)
    shm_mib = min(_mebibytes(amounts["memory"]) // 4, SHM_MIB * max(1, job.gpus))
    shm = f"{shm_mib}Mi" if shm_mib % 1024 else f"{shm_mib // 1024}Gi"
    volumes: list[dict[str, Any]] = [
        *({"name": name, "persistentVolumeClaim": {"claimName": claim}} for claim, name in names.items()),
        {"name": "shm", "emptyDir": {"sizeLimit": shm}},
    ]
    mounted = [_given(name=names[claim], mountPath=path, readOnly=ro or None) for path, (claim, ro) in mounts.items()]
    if job.secret:
        parts = [re.split("[=:]", each) for each in job.secret]
        sources = [{"secret": {"name": secret, "items": [{"key": key, "path": name}]}} for name, secret, key in parts]
        volumes.append({"name": "secrets", "projected": {"sources": sources}})
        mounted.append({"name": "secrets", "mountPath": pod.SECRETS, "readOnly": True})
    env = [each.partition("=") for each in job.env]
    env += [("NCCL_SOCKET_IFNAME", "=", job.network_interface)] if job.network_interface else []
    env += [("DISTPAD_GPUS", "=", str(job.gpus))] if job.gpus else []  # a worker that does not see them ends the job
    container = _given(
        name="node",
        image=job.image,
        imagePullPolicy="IfNotPresent" if "@" in job.image else "Always",
        args=[*job.command],
        env=[{"name": name, "value": value} for name, _, value in env],
        resources={"requests": amounts, "limits": amounts},
        securityContext=job.rdma and {"capabilities": {"add": ["IPC_LOCK"]}},
        volumeMounts=mounted,
    )
    tolerated = [*([f"{GPU}:NoSchedule"] if job.gpus else []), *job.toleration]
    chosen = _given(
        containers=[container],
        volumes=volumes,
        tolerations=[_toleration(each) for each in tolerated],
        nodeSelector=dict(each.split("=") for each in job.node_selector),
        priorityClassName=job.priority_class,
        serviceAccountName=job.service_account,
        imagePullSecrets=[{"name": name} for name in job.image_pull_secret],
    )
    topology = job.topology and {"annotations": {"kueue.x-k8s.io/podset-required-topology": job.topology}}
    return _given(metadata=topology, spec=chosen)


def resources(job: kubernetes.Job) -> dict[str, str]:
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
    return _given(key=key, **how, effect=effect)


def job_patches(job: kubernetes.Job) -> list[dict[str, Any]]:
    """The patches of the built job: its time limits, its topology and its queue."""
    kind, found = kubernetes.KINDS[job.kind], []

    def add(manifest: str, path: str, value: object) -> None:
        found.append(_patch(manifest, [{"op": "add", "path": path, "value": value}]))

    if job.timeout_s is not None:
        add(kind.manifest, f"{kind.timeout}/activeDeadlineSeconds", int(job.timeout_s))
    if job.ttl_s is not None:
        add(kind.manifest, f"{kind.ttl}/ttlSecondsAfterFinished", job.ttl_s)
    if job.exclusive_topology:
        annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": job.exclusive_topology}
        if kind.topology == "JobSet":
            add("JobSet", "/metadata/annotations", annotations)
        else:
            add(kind.topology, "/spec/template/metadata", {"annotations": annotations})
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


def write(job: kubernetes.Job, place: pathlib.Path) -> None:
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


def build(job: kubernetes.Job) -> str:
    """Return the manifests, ready for ``kubectl apply -f -``.

    Raises:
      ValueError: kubectl is missing or too old, or the folder k8s/ was changed.
    """
    program = next((argv for argv in PROGRAMS if shutil.which(argv[0])), None)
    if program is None:
        raise ValueError(f"launch: --k8s found no kubectl on PATH, expected kubectl or kustomize. {NEEDS}")
    with tempfile.TemporaryDirectory(prefix="distpad-k8s-") as name:
        write(job, pathlib.Path(name))
        try:
            done = subprocess.run([*program, name], capture_output=True, text=True, encoding="utf-8", timeout=LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ValueError(f"launch: {program[0]} cannot be used: {error}.") from error
    if done.returncode:
        raise ValueError(f"launch: {' '.join(program)} failed: {done.stderr.strip()}. {NEEDS}")
    return done.stdout
