"""Checks of the hosts before a job starts: pure functions of the facts that the agents report."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

from distpad.launcher import gpus, spec

SAME_EVERYWHERE = ("Python", "tensorflow", "tensorflow-cpu", "tensorflow-gpu", "keras", "numpy", "horovod", "distpad")

NO_PYTHON = "it has no Python at {python}. Install one there, or choose another with --python"
NO_DISTPAD = "distpad is not installed there for {python}"
CHANGED = "its host key has changed. If the host was reinstalled: ssh-keygen -R {host}, then: ssh {host}"
# output of ssh, srun or the shell | problem. Remedy
MEANINGS = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", CHANGED),
    ("Host key verification failed", "its host key is not known here. Verify and accept it: ssh {host}"),
    ("Permission denied", "it accepts no key of this user. Try: ssh-copy-id {host}"),
    ("Could not resolve hostname", "its name does not resolve. Check the spelling, the DNS and /etc/hosts"),
    ("Connection refused", "no ssh server listens there. Check on the host: systemctl status ssh"),
    ("Connection timed out", "it does not answer. Check that it is up and that port 22 is open"),
    ("No route to host", "there is no route to it. Check that it is up"),
    ("No module named 'distpad", NO_DISTPAD),
    ("No module named distpad", NO_DISTPAD),
    ("No such file or directory", NO_PYTHON),
    ("not found", NO_PYTHON),
)


def why_no_agent(host: str, python: str, wrote: Sequence[str], code: int | None) -> str:
    """Why a host's agent did not start, derived from the output of the command that starts it."""
    text = "\n".join(wrote)
    for mark, meaning in MEANINGS:
        if mark in text:
            return f"{host} cannot be used: {meaning.format(host=host, python=python)}"
    message = f": {wrote[-1].strip()}" if wrote else ""
    ended = "did not answer" if code is None else f"ended with exit code {code}"
    return f"{host} cannot be used: the command that starts its agent {ended}{message}"


def problems(job: spec.Job, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List the problems that keep the job from starting, one sentence each.

    Args:
      job: the job.
      facts: the result of ``agent.facts`` for each host.
    """
    return [*_different_versions(facts), *_wrong_names(job, facts), *_missing_gpus(job, facts)]


def _different_versions(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = []
    for package in SAME_EVERYWHERE:
        versions = {host: each["versions"].get(package, "none") for host, each in facts.items()}
        if len(set(versions.values())) > 1:
            listed = ", ".join(f"{host} has {version}" for host, version in versions.items())
            found.append(f"{package} differs: {listed}. Install the same version everywhere.")
    return found


def _missing_gpus(job: spec.Job, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Hosts that cannot have the expected GPUs; whether TensorFlow sees them is known when a worker starts it."""
    found = []
    for host, each in facts.items() if job.gpus_each else ():
        needed = job.gpus_each * max(1, sum(place.host.name == host for place in job.places))
        is_cpu_build = "tensorflow-cpu" in each["versions"] and "tensorflow" not in each["versions"]
        if is_cpu_build or len(each["gpus"]["names"]) < needed:
            build = {"for_gpus": not is_cpu_build, "cuda": "0", "cudnn": ""}
            why, remedy = gpus.why_unseen(needed, build, each["gpus"], None, {})
            found.append(f"{host} has no {needed} GPUs for its workers: {why}. {remedy}")
    return found


def _wrong_names(job: spec.Job, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names that do not resolve, or that resolve to the loopback: other hosts would then connect to themselves."""
    if len(facts) < 2 or job.controller == "mpi":  # Open MPI chooses the addresses itself
        return []
    found = []
    for here, each in facts.items():
        for name, addresses in each["resolves"].items():
            is_own = name in (here, each["host"])
            if is_own and job.controller != "gloo":
                continue  # only Gloo resolves its own name
            problem = name_problem(name, addresses, is_own=is_own)
            if problem:
                found.append(f"on {here}, {problem[0]}. {problem[1]}")
    return found


def name_problem(name: str, addresses: Sequence[str], *, is_own: bool) -> tuple[str, str] | None:
    """Return the problem with a host's name on one host, and the remedy; None if the name is usable.

    Args:
      name: the name.
      addresses: the addresses to which the host resolves it.
      is_own: whether the name belongs to the resolving host itself.
    """
    which = f"its own name {name}" if is_own else f"the name {name}"
    if not addresses:
        return f"{which} does not resolve", "Add it to the DNS, or to /etc/hosts there."
    if any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        loopback = f"{which} resolves to {', '.join(addresses)}, the loopback, which other hosts cannot reach"
        return loopback, "Set its real address in /etc/hosts there."
    return None


def interface(facts: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Return the network interface that holds the address of each host's name on all hosts, and the error if none does.

    horovodrun can search for an interface, but starts servers for it with their key on a command line.
    """
    on = {}
    for host, each in facts.items():
        own = {*each["resolves"].get(host, []), *each["resolves"].get(each["host"], [])}
        on[host] = sorted(name for name, addresses in each["interfaces"].items() if own & set(addresses))
    common = sorted(set.intersection(*(set(names) for names in on.values())) - {"lo"})
    if common:
        return common[0], ""
    listed = ", ".join(f"{host} has {' and '.join(names) or 'none'}" for host, names in on.items())
    return (
        "",
        f"no network interface holds the addresses on all hosts ({listed}). Choose one with --network-interface.",
    )


def taken(host: str, port: int, why: str) -> str:
    """The error for a port that the job needs and another process holds."""
    return (
        f"port {port} on {host} cannot be used ({why.lower()}). Find its process with ss -ltnp 'sport = :{port}', or "
        "omit --port, so that the job uses free ports."
    )
