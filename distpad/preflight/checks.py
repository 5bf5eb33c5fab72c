"""Turn the facts of all hosts into findings with remedies. Pure functions, one per check."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Callable

from distpad.preflight import cluster_checks, host_checks
from distpad.preflight.findings import ERROR, OK, WARNING, Finding, Question

HostCheck = Callable[[str, Mapping[str, Any], Question], Iterator[Finding]]
ClusterCheck = Callable[[Mapping[str, Mapping[str, Any]], Question], Iterator[Finding]]

# name | check of one host
OF_A_HOST: dict[str, HostCheck] = {
    "probes": host_checks.probes,
    "TensorFlow": host_checks.tensorflow,
    "Keras": host_checks.keras,
    "Addons": host_checks.addons,
    "Horovod": host_checks.horovod,
    "Horovod's NCCL": host_checks.nccl,
    "GPUs": host_checks.gpus,
    "slots": host_checks.slots,
    "MPI": host_checks.mpi,
    "operator": host_checks.operator,
    "/dev/shm": host_checks.shared_memory,
    "open files": host_checks.open_files,
    "TF_CONFIG": host_checks.tf_config,
    "ports": host_checks.ports,
}
# name | comparison of all hosts that answered
OF_ALL_HOSTS: dict[str, ClusterCheck] = {
    "names": cluster_checks.names,
    "versions": cluster_checks.versions,
    "builds": cluster_checks.builds,
    "distpad's code": cluster_checks.own_code,
    "code": cluster_checks.code,
}


def check(answers: Mapping[str, Mapping[str, Any]], question: Question) -> list[Finding]:
    """Return all findings, errors first. A check that passes yields a finding of state ``ok``.

    Args:
      answers: the result of ``hosts.ask``, by host.
      question: the hosts, ports and code that the user asked about.
    """
    facts = {host: answer["facts"] for host, answer in answers.items() if "facts" in answer}
    found: list[Finding] = []
    for host, answer in answers.items():
        if "unreachable" in answer:
            found.append(Finding(host, "reach", ERROR, answer["unreachable"], answer["remedy"]))
            continue
        found += _or_ok(host, "reach", [])
        found += _or_ok(host, "clock", [*cluster_checks.clock(host, answer)])
        for what, of_host in OF_A_HOST.items():
            found += _or_ok(host, what, [*of_host(host, facts[host], question)])
    if len(facts) > 1:
        for what, of_all in OF_ALL_HOSTS.items():
            found += _or_ok("all", what, [*of_all(facts, question)])
    order = (ERROR, WARNING, OK)
    return sorted(found, key=lambda finding: order.index(finding.state))


def _or_ok(host: str, what: str, found: list[Finding]) -> list[Finding]:
    named = [dataclasses.replace(finding, what=what) for finding in found]
    return named or [Finding(host, what, OK)]
