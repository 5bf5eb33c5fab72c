"""Checks that compare all hosts: clocks, names, software and code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distpad.launcher import hostcheck
from distpad.preflight.findings import Finding, Question, error, warning

AllFacts = Mapping[str, Mapping[str, Any]]

SKEW_S = 5.0


def clock(host: str, answer: Mapping[str, Any]) -> Iterator[Finding]:
    """Clocks must agree. Otherwise logs of several hosts cannot be compared, and tickets and certificates fail."""
    ahead = answer["facts"]["time"] - answer["received"]
    behind = answer["sent"] - answer["facts"]["time"]
    off = max(ahead, behind)
    if off > SKEW_S:
        where = "ahead" if ahead > behind else "behind"
        yield warning(host, f"its clock is {off:.0f} s {where}", "Synchronise all clocks: timedatectl set-ntp true")


def names(facts: AllFacts, question: Question) -> Iterator[Finding]:
    """Each host must resolve all names, its own included, to addresses that other hosts can reach.

    Gloo resolves the name of its own host and sends the address to the other workers.
    """
    for here, each in facts.items():
        for name, addresses in each.get("names", {}).items():
            own = name in (here, each["host"])
            if not own and name not in facts:
                continue  # a finding already reports that this host is unreachable
            problem = hostcheck.name_problem(name, addresses, is_own=own)
            if problem:
                yield error(here, *problem)


def versions(facts: AllFacts, question: Question) -> Iterator[Finding]:
    """Packages, Python and MPI must have the same version on all hosts."""
    names = sorted({name for each in facts.values() for name in each.get("packages", {})})
    rows = {name: {host: each["packages"].get(name, "") for host, each in _having(facts, "packages")} for name in names}
    rows["Python"] = {host: _minor(each["python"]["version"]) for host, each in _having(facts, "python")}
    rows["mpirun"] = {host: (each["mpi"]["mpirun"] or {}).get("version", "") for host, each in _having(facts, "mpi")}
    for name, found in rows.items():
        if len(set(found.values())) > 1:
            yield error(
                _outliers(found), f"{name} differs: {_hosts_by_value(found)}", "Install the same version everywhere."
            )


def builds(facts: AllFacts, question: Question) -> Iterator[Finding]:
    """Horovod must have the same build on all hosts. A rank without NCCL waits forever for ranks with NCCL."""
    found = {
        host: " ".join(each["engines"]["horovod"]["built_with"])
        for host, each in _having(facts, "engines")
        if (each["engines"].get("horovod") or {}).get("built_with") is not None
    }
    if len(set(found.values())) > 1:
        remedy = "Build Horovod again on all hosts: launch/install_horovod.sh --force"
        yield error(_outliers(found), f"Horovod's build differs: {_hosts_by_value(found)}", remedy)


def own_code(facts: AllFacts, question: Question) -> Iterator[Finding]:
    """distpad must be the same on all hosts, since messages between its workers carry no version."""
    yield from _same_files(facts, "distpad", "distpad's own code", "Install the same distpad everywhere.")


def code(facts: AllFacts, question: Question) -> Iterator[Finding]:
    """The folder of ``--code`` must be the same. Workers with different programs hang, or train different models."""
    remedy = f"Copy it there: rsync -a {question.code}/ HOST:{question.code}/"
    yield from _same_files(facts, "code", f"the code in {question.code}", remedy)


def _same_files(facts: AllFacts, key: str, what: str, remedy: str) -> Iterator[Finding]:
    found = {host: each[key] for host, each in _having(facts, key) if each[key] is not None}
    if not found:
        return
    common = max(found.values(), key=list(found.values()).count)
    for host, files in found.items():
        differing = sorted(name for name in {*files, *common} if files.get(name) != common.get(name))
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            yield error(host, f"{what} differs from the other hosts' in {', '.join(differing[:3])}{more}", remedy)


def _having(facts: AllFacts, key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The hosts whose facts contain ``key``."""
    return [(host, each) for host, each in facts.items() if key in each]


def _outliers(found: Mapping[str, str]) -> str:
    """The hosts whose value is not the most common one; among equally common values, the first host's counts."""
    common = max(found.values(), key=list(found.values()).count)
    return ", ".join(host for host, value in found.items() if value != common)


def _hosts_by_value(found: Mapping[str, str]) -> str:
    groups: dict[str, list[str]] = {}
    for host, value in found.items():
        groups.setdefault(value or "none", []).append(host)
    return ", ".join(
        f"{' '.join(hosts)} {'has' if len(hosts) == 1 else 'have'} {value}" for value, hosts in groups.items()
    )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
