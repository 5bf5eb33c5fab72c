"""TF_CONFIG for tf.distribute.MultiWorkerMirroredStrategy: from addresses, or from Kubernetes. Pure functions.

Each builder returns the text of the environment variable. All workers of a job need the same addresses in the same
order, and each its own index. The builders therefore take arguments that are equal on all workers, and one index.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Sequence
from typing import Union

from distpad import errors

Integer = Union[int, str]  # environment variables hold numbers as text

_PART = "[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?"  # the standard forbids underscores, but they occur
_HOST = re.compile(rf"{_PART}(?:\.{_PART})*\.?")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_HIGHEST_PORT = 65535


def cluster(addresses: Sequence[str], index: Integer) -> str:
    """TF_CONFIG of worker ``index`` among workers at ``addresses``.

    Args:
        addresses: ``host:port`` of each worker, in the order of their indices. An IPv6 host needs brackets,
            ``[fd00::1]:2222``. TensorFlow's server listens on the worker's own port; the first worker's server also
            runs the coordination service.
        index: the worker's index, from 0: an int, or its digits.

    Returns:
        JSON, equal on all workers except for the index.

    Raises:
        TypeError: ``addresses`` is a string, or holds an element that is not; or ``index`` is not an integer.
        ValueError: there is no address, an address is malformed or a duplicate, or the index is out of range.

    >>> cluster(["node1:2222", "node2:2222"], 1)
    '{"cluster": {"worker": ["node1:2222", "node2:2222"]}, "task": {"type": "worker", "index": 1}}'
    """
    return _config("cluster", addresses, "index", index)


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

    Returns:
        JSON, equal on all workers except for the index.

    Raises:
        TypeError: a number is not an integer, or a name is not a string.
        ValueError: a name is not a DNS label, or a number is out of range.

    >>> json.loads(from_indexed_job("train", 2, "0", service="workers", port=2222))["cluster"]["worker"]
    ['train-0.workers:2222', 'train-1.workers:2222']
    """
    pods = range(_integer("from_indexed_job", "completions", completions, 1))
    _label("from_indexed_job", "job", job, f"{job}-{pods[-1]}")
    _label("from_indexed_job", "service", service, service)
    domain = service
    if namespace is not None:
        _label("from_indexed_job", "namespace", namespace, namespace)
        domain = f"{service}.{namespace}.svc"
    addresses = _addresses("from_indexed_job", (f"{job}-{pod}.{domain}" for pod in pods), port)
    return _config("from_indexed_job", addresses, "index", index)


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

    Returns:
        JSON, equal on all workers except for the index.

    Raises:
        TypeError: a number is not an integer, or a name is not a string.
        ValueError: a name is not a DNS label, a duplicate, or missing from the list; or a number is out of range.

    >>> config = from_jobset("train", [("node", 2, 2)], "node", "1", "0", port=2222)
    >>> json.loads(config)["cluster"]["worker"][2], json.loads(config)["task"]["index"]
    ('train-node-1-0.train:2222', 2)
    """
    domain = jobset if subdomain is None else subdomain
    _label("from_jobset", "subdomain", domain, domain)
    pods: list[tuple[str, int, int]] = []
    sizes: dict[str, tuple[int, int]] = {}
    for name, replicas, completions in replicated_jobs:
        if name in sizes:
            raise ValueError(errors.sentence("from_jobset", "replicated_jobs", repr(name), "each name once"))
        jobs = _integer("from_jobset", "replicas", replicas, 1)
        each = _integer("from_jobset", "pods", completions, 1)
        sizes[name] = jobs, each
        _label("from_jobset", "replicated_jobs", name, f"{jobset}-{name}-{jobs - 1}-{each - 1}")
        pods += [(name, job, pod) for job in range(jobs) for pod in range(each)]
    errors.choice("from_jobset", "replicated_job", replicated_job, tuple(sizes))
    jobs, each = sizes[replicated_job]
    mine = (
        replicated_job,
        _below("from_jobset", "job_index", job_index, jobs),
        _below("from_jobset", "pod_index", pod_index, each),
    )
    hosts = (f"{jobset}-{name}-{job}-{pod}.{domain}" for name, job, pod in pods)
    addresses = _addresses("from_jobset", hosts, port)
    return _config("from_jobset", addresses, "index", pods.index(mine))


def _config(function: str, addresses: Sequence[str], argument: str, index: Integer) -> str:
    """Check the addresses and the index, and return TF_CONFIG. All builders end here."""
    if isinstance(addresses, str) or not all(isinstance(address, str) for address in addresses):
        raise TypeError(errors.sentence(function, "addresses", repr(addresses), "a list of strings 'host:port'"))
    if not addresses:
        raise ValueError(errors.sentence(function, "addresses", repr(addresses), "at least one"))
    seen: dict[str, int] = {}
    for place, address in enumerate(addresses):
        known = seen.setdefault(_canonical(function, address), place)
        if known != place:
            evidence = f"Workers {known} and {place} would share it."
            raise ValueError(errors.sentence(function, "addresses", repr(address), "each address once", evidence))
    task = {"type": "worker", "index": _below(function, argument, index, len(addresses))}
    return json.dumps({"cluster": {"worker": list(addresses)}, "task": task})


def _canonical(function: str, address: str) -> str:
    """Convert an address to a canonical form, to find duplicates."""
    host, _, port = address.rpartition(":")
    plain = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    bracketed = plain != host
    version = _ip_version(plain)
    well_formed = (version == 6) == bracketed and (version is not None or (len(host) <= 253 and _HOST.fullmatch(host)))
    if not well_formed or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) <= _HIGHEST_PORT:
        rule = f"host:port with a port from 1 to {_HIGHEST_PORT}, an IPv6 host in brackets"
        raise ValueError(errors.sentence(function, "addresses", repr(address), rule))
    name = str(ipaddress.ip_address(plain)) if version else host.lower().rstrip(".")
    return f"{name} {int(port)}"


def _addresses(function: str, hosts: Iterable[str], port: Integer) -> list[str]:
    number = _integer(function, "port", port, 1)
    if number > _HIGHEST_PORT:
        raise ValueError(errors.sentence(function, "port", number, f"at most {_HIGHEST_PORT}"))
    return [f"{host}:{number}" for host in hosts]


def _ip_version(host: str) -> int | None:
    """4 or 6, or None for names. Addresses with zones (``fe80::1%eth0``) count as names: zones are local to a host."""
    try:
        return None if "%" in host else ipaddress.ip_address(host).version
    except ValueError:
        return None


def _label(function: str, argument: str, value: str, label: str) -> None:
    if not isinstance(value, str):
        raise TypeError(errors.sentence(function, argument, repr(value), "a string"))
    if not _LABEL.fullmatch(label):
        rule = "a DNS label: at most 63 lower-case letters, digits and hyphens, without a hyphen at either end"
        evidence = f"The host name is {label!r}, with {len(label)} characters." if label != value else ""
        raise ValueError(errors.sentence(function, argument, repr(value), rule, evidence))


def _integer(function: str, argument: str, value: Integer, least: int) -> int:
    if isinstance(value, str):
        if not re.fullmatch("[0-9]+", value):
            raise ValueError(errors.sentence(function, argument, repr(value), f"an integer from {least}"))
        value = int(value)
    return errors.integer(function, argument, value, least)


def _below(function: str, argument: str, value: Integer, count: int) -> int:
    number = _integer(function, argument, value, 0)
    if number >= count:
        raise ValueError(errors.sentence(function, argument, number, f"from 0 to {count - 1}, of {count}"))
    return number
