"""What keeps hosts from running a job, before anything of it is started: pure functions of what their agents found."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

from distpad.launcher import spec

SAME_EVERYWHERE = ("Python", "tensorflow", "tensorflow-cpu", "tensorflow-gpu", "keras", "numpy", "horovod", "distpad")

# what ssh, srun or the shell wrote | what that means, and what to do
NO_PYTHON = "this Python is not there: {python}. Install it at the same path, or name another with --python"
NO_DISTPAD = "distpad is not installed there in this Python: {python}"
CHANGED = (
    "its host key is not the one that is known here. If it was set up again: ssh-keygen -R {host}, then: ssh {host}"
)
MEANINGS = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", CHANGED),
    ("Host key verification failed", "its host key is not known here. Look at it and accept it: ssh {host}"),
    ("Permission denied", "it does not let this user in without a password. Try: ssh-copy-id {host}"),
    ("Could not resolve hostname", "nothing knows its name. Is it spelt right, and in the DNS or /etc/hosts?"),
    ("Connection refused", "no ssh server listens there. Try on it: systemctl status ssh"),
    ("Connection timed out", "it does not answer. Is it up, and is port 22 open?"),
    ("No route to host", "no way leads there. Is it up?"),
    ("No module named 'distpad", NO_DISTPAD),
    ("No module named distpad", NO_DISTPAD),
    ("No such file or directory", NO_PYTHON),
    ("not found", NO_PYTHON),
)


def why_no_agent(host: str, python: str, wrote: Sequence[str], code: int | None) -> str:
    """Why a host's agent did not come, from what the program that should have brought it wrote."""
    text = "\n".join(wrote)
    for mark, meaning in MEANINGS:
        if mark in text:
            return f"{host} cannot be used: {meaning.format(host=host, python=python)}"
    said = f": {wrote[-1].strip()}" if wrote else ""
    ended = "did not answer" if code is None else f"ended with exit code {code}"
    return f"{host} cannot be used: what should start its agent {ended}{said}"


def problems(job: spec.Job, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong, a sentence each; nothing where the job can start.

    Args:
      job: the job.
      facts: by host, what ``agent.facts`` found there.
    """
    return [*_different_versions(facts), *_wrong_names(job, facts)]


def _different_versions(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    found = []
    for package in SAME_EVERYWHERE:
        versions = {host: each["versions"].get(package, "none") for host, each in facts.items()}
        if len(set(versions.values())) > 1:
            listed = ", ".join(f"{host} has {version}" for host, version in versions.items())
            found.append(f"{package} differs: {listed}. Install the same everywhere.")
    return found


def _wrong_names(job: spec.Job, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names that lead nowhere, or back to the host itself, so that others would be told to connect to themselves."""
    if len(facts) < 2 or job.controller == "mpi":  # Open MPI tells addresses of its own choice
        return []
    found = []
    for here, each in facts.items():
        for name, addresses in each["resolves"].items():
            is_own = name in (here, each["host"])
            if is_own and job.controller != "gloo":
                continue  # only Gloo asks for its own name
            trouble = trouble_with(name, addresses, is_own=is_own)
            if trouble:
                found.append(f"on {here}, {trouble[0]}. {trouble[1]}")
    return found


def trouble_with(name: str, addresses: Sequence[str], *, is_own: bool) -> tuple[str, str] | None:
    """What is wrong with a host's name as one of the hosts sees it, and the remedy there; None where nothing is.

    Args:
      name: of a host.
      addresses: where it leads.
      is_own: whether it is that of the host which sees it so.
    """
    which = f"its own name {name}" if is_own else f"the name {name}"
    if not addresses:
        return f"it does not know {which}", "Add it to the DNS, or to /etc/hosts there."
    if any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        leads = f"{which} leads to {', '.join(addresses)}, the loopback, where no other host can connect"
        return leads, f"Give {name} its real address in /etc/hosts there."
    return None


def interface(facts: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """The network interface by which hosts reach one another, and what is wrong where there is none: the one that holds
    the address of each host's name, on all of them.

    horovodrun would find one by itself, but it starts servers for that with their key on a command line.
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
        f"no network interface holds the hosts' addresses on all of them ({listed}). Name one: --network-interface.",
    )


def taken(host: str, port: int, why: str) -> str:
    """A port that the job needs and cannot have."""
    return (
        f"port {port} on {host} cannot be used ({why.lower()}). Look who has it: ss -ltnp 'sport = :{port}'; or leave "
        "--port out, so that free ones are taken."
    )
