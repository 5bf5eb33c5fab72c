"""Checks of hosts, for `distpad launch` before a job starts and for `distpad doctor`: pure functions of facts."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distpad.launcher import gpus, spec

SAME_EVERYWHERE = ("Python", "tensorflow", "tensorflow-cpu", "tensorflow-gpu", "keras", "numpy", "horovod", "distpad")

CHANGED = "If the host was reinstalled: ssh-keygen -R {host}, then: ssh {host}"
NO_PYTHON = ("it has no Python at {python}", "Install one there, or choose another with --python")
NO_DISTPAD = ("distpad is not installed there for {python}", "Install it there: {python} -m pip install distpad")
# output of ssh, srun or the shell | problem, remedy
MEANINGS = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": ("its host key has changed", CHANGED),
    "Host key verification failed": ("its host key is not known here", "Verify and accept it: ssh {host}"),
    "Permission denied": ("it accepts no key of this user", "Try: ssh-copy-id {host}"),
    "Could not resolve hostname": ("its name does not resolve", "Check the spelling, the DNS and /etc/hosts"),
    "Connection refused": ("no ssh server listens there", "Check on the host: systemctl status ssh"),
    "Connection timed out": ("it does not answer", "Check that it is up and that port 22 is open"),
    "No route to host": ("there is no route to it", "Check that it is up"),
    "No module named 'distpad": NO_DISTPAD,
    "No module named distpad": NO_DISTPAD,
    "No such file or directory": NO_PYTHON,
    "not found": NO_PYTHON,
}


def why_silent(host: str, python: str, wrote: Sequence[str], code: int | None, within_s: float) -> tuple[str, str]:
    """Why a program did not answer from a host, derived from the output of the command that starts it.

    Args:
      host, python: the host, and the Python that runs the program there.
      wrote: the lines that the command wrote.
      code: its exit code; None if it has not ended.
      within_s: the time limit.

    Returns:
      The problem and its remedy.
    """
    text = "\n".join(wrote)
    for mark, meaning in MEANINGS.items():
        if mark in text:
            why, remedy = (part.format(host=host, python=python) for part in meaning)
            return why, remedy
    last = wrote[-1].strip() if wrote else "no output"
    if code is None:
        return f"it did not answer within {within_s:g} s: {last}", f"Check that this command ends: ssh {host} hostname"
    return f"the command that starts a program there ended with exit code {code}: {last}", (
        f"Try: ssh {host} {python} -m distpad"
    )


def problems(job: spec.Job, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List the problems that keep the job from starting, one sentence each.

    Args:
      job: the job.
      facts: the result of ``hostfacts.facts`` for each host.
    """
    rows = {name: {host: each["versions"].get(name, "") for host, each in facts.items()} for name in SAME_EVERYWHERE}
    found = [f"{evidence}. Install the same version everywhere." for _, evidence in differing(rows)]
    if len(facts) > 1 and job.controller != "mpi":  # Open MPI chooses the addresses itself
        names = {host: (each["host"], each["resolves"]) for host, each in facts.items()}
        for here, is_own, problem, remedy in wrong_names(names):
            if not is_own or job.controller == "gloo":  # only Gloo resolves its own name
                found.append(f"on {here}, {problem}. {remedy}")
    return [*found, *_missing_gpus(job, facts)]


def _missing_gpus(job: spec.Job, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Hosts that cannot have the expected GPUs; whether TensorFlow sees them is known when a worker starts it."""
    found = []
    for host, each in facts.items() if job.gpus_each else ():
        needed = job.gpus_each * max(1, sum(place.host.name == host for place in job.places))
        is_cpu_build = "tensorflow-cpu" in each["versions"] and "tensorflow" not in each["versions"]
        if is_cpu_build or each["gpus"].get("error") or gpus.count(each["gpus"]) < needed:
            build = {"for_gpus": not is_cpu_build, "cuda": "0", "cudnn": ""}
            why, remedy = gpus.why_unseen(needed, build, each["gpus"], None, {})
            found.append(f"{host} has no {needed} GPUs for its workers: {why}. {remedy}")
    return found


def differing(rows: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the rows whose values differ between hosts.

    Args:
      rows: values by host, by name.

    Returns:
      The hosts whose value is not the most common one (of equally common ones, the first host's), and the evidence.

    >>> [*differing({"numpy": {"a": "1.26.4", "b": "2.4.6", "c": "2.4.6"}, "keras": {"a": "3", "b": "3", "c": "3"}})]
    [('a', 'numpy differs: a has 1.26.4, b c have 2.4.6')]
    """
    for name, found in rows.items():
        values = [*found.values()]
        if len(set(values)) > 1:
            common = max(values, key=values.count)
            groups = {value: [host for host in found if found[host] == value] for value in values}
            listed = (f"{' '.join(g)} {'has' if len(g) == 1 else 'have'} {v or 'none'}" for v, g in groups.items())
            yield ", ".join(host for host in found if found[host] != common), f"{name} differs: {', '.join(listed)}"


def wrong_names(names: Mapping[str, tuple[str, Mapping[str, Sequence[str]]]]) -> Iterator[tuple[str, bool, str, str]]:
    """Names that do not resolve, or that resolve to the loopback: other hosts would then connect to themselves.

    Args:
      names: by host, its own name, and the addresses to which it resolves each name.

    Returns:
      For each wrong name, the resolving host, whether it is the host's own name, the problem, and the remedy.
    """
    for here, (itself, resolves) in names.items():
        for name, addresses in resolves.items():
            is_own = name in (here, itself)
            which = f"its own name {name}" if is_own else f"the name {name}"
            if not addresses:
                yield here, is_own, f"{which} does not resolve", "Add it to the DNS, or to /etc/hosts there."
            elif any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
                problem = f"{which} resolves to {', '.join(addresses)}, the loopback, which other hosts cannot reach"
                yield here, is_own, problem, "Set its real address in /etc/hosts there."


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
    return "", f"no network interface holds the addresses on all hosts ({listed}). Choose one with --network-interface."


def taken(port: int, why: str) -> tuple[str, str]:
    """The problem of a port that another process holds, and its remedy."""
    return f"port {port} is not free: {why.lower()}", (
        f"Find its process with ss -ltnp 'sport = :{port}', or use another port."
    )
