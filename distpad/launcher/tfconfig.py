"""TF_CONFIG for tf.distribute.MultiWorkerMirroredStrategy: from addresses, or from Kubernetes. Pure functions.

Each function returns the text of the environment variable. It is equal on all workers of a job, except for the index.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Union

from distpad import errors

Integer = Union[int, str]  # environment variables hold numbers as text


def cluster(addresses: Sequence[str], index: Integer) -> str:
    """TF_CONFIG of worker ``index`` among workers at ``addresses``.

    Args:
        addresses: ``host:port`` of each worker, in the order of their indices. TensorFlow's server listens on the
            worker's own port; the first worker's server also runs the coordination service.
        index: the worker's index, from 0: an int, or its digits.

    Raises:
        ValueError: the index is not an integer, or out of range.

    >>> cluster(["node1:2222", "node2:2222"], 1)
    '{"cluster": {"worker": ["node1:2222", "node2:2222"]}, "task": {"type": "worker", "index": 1}}'
    """
    task = {"type": "worker", "index": _below("index", index, len(addresses))}
    return json.dumps({"cluster": {"worker": list(addresses)}, "task": task})


def from_indexed_job(
    job: str, completions: Integer, index: Integer, *, service: str, port: Integer, namespace: str | None = None
) -> str:
    """TF_CONFIG of one pod of a Kubernetes Indexed Job that runs all its ``completions`` at once.

    Args:
        job: the Job's name; its pods have the host names ``<job>-<index>``.
        completions: the number of pods, equal to the Job's ``parallelism``.
        index: ``JOB_COMPLETION_INDEX``.
        service: the headless Service, equal to the pods' ``subdomain``.
        port: the port of every worker, since each pod has an address of its own.
        namespace: extends the names, so that they resolve in other namespaces too.

    >>> json.loads(from_indexed_job("train", 2, "0", service="workers", port=2222))["cluster"]["worker"]
    ['train-0.workers:2222', 'train-1.workers:2222']
    """
    domain = service if namespace is None else f"{service}.{namespace}.svc"
    return cluster([f"{job}-{pod}.{domain}:{port}" for pod in range(int(completions))], index)


def from_jobset(
    jobset: str,
    replicated_jobs: Iterable[tuple[str, int, int]],
    replicated_job: str,
    job_index: Integer,
    pod_index: Integer,
    *,
    port: Integer,
    subdomain: str | None = None,
) -> str:
    """TF_CONFIG of one pod of a JobSet. Indices count the replicated jobs, then their jobs, then the jobs' pods.

    Args:
        jobset: the JobSet's name.
        replicated_jobs: ``(name, replicas, pods)`` of each replicated job whose pods are workers; ``pods`` is the
            ``completions`` of its Job template.
        replicated_job: the pod's label ``jobset.sigs.k8s.io/replicatedjob-name``.
        job_index: the pod's label ``jobset.sigs.k8s.io/job-index``.
        pod_index: ``JOB_COMPLETION_INDEX``.
        port: the port of every worker, since each pod has an address of its own.
        subdomain: the JobSet's ``network.subdomain``; by default its name.

    Raises:
        ValueError: the job's name is not in the list, or an index is out of range.

    >>> config = from_jobset("train", [("node", 2, 2)], "node", "1", "0", port=2222)
    >>> json.loads(config)["cluster"]["worker"][2], json.loads(config)["task"]["index"]
    ('train-node-1-0.train:2222', 2)
    """
    sizes = {name: (jobs, pods) for name, jobs, pods in replicated_jobs}
    errors.choice("TF_CONFIG", "replicated_job", replicated_job, tuple(sizes))
    jobs, pods = sizes[replicated_job]
    mine = replicated_job, _below("job_index", job_index, jobs), _below("pod_index", pod_index, pods)
    all_ = [(name, job, pod) for name, (jobs, pods) in sizes.items() for job in range(jobs) for pod in range(pods)]
    addresses = [f"{jobset}-{name}-{job}-{pod}.{subdomain or jobset}:{port}" for name, job, pod in all_]
    return cluster(addresses, all_.index(mine))


def _below(argument: str, value: Integer, count: int) -> int:
    if not str(value).isdecimal() or int(value) >= count:
        raise ValueError(errors.sentence("TF_CONFIG", argument, repr(value), f"an integer from 0 to {count - 1}"))
    return int(value)
