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
    resolved = {host: (each["host"], each["names"]) for host, each in _having(facts, "names")}
    known = {*facts, *(each["host"] for each in facts.values())}
    reachable = {
        host: (itself, {name: found for name, found in names.items() if name in known})  # others have a finding already
        for host, (itself, names) in resolved.items()
    }
    for here, _, problem, remedy in hostcheck.wrong_names(reachable):
        yield error(here, problem, remedy)


def versions(facts: AllFacts, question: Question) -> Iterator[Finding]:
    """Packages, Python and MPI must have the same version on all hosts."""
    names = sorted({name for each in facts.values() for name in each.get("packages", {})})
    rows = {name: {host: each["packages"].get(name, "") for host, each in _having(facts, "packages")} for name in names}
    rows["Python"] = {host: _minor(each["python"]["version"]) for host, each in _having(facts, "python")}
    rows["mpirun"] = {host: (each["mpi"]["mpirun"] or {}).get("version", "") for host, each in _having(facts, "mpi")}
    for hosts, evidence in hostcheck.differing(rows):
        yield error(hosts, evidence, "Install the same version everywhere.")


def builds(facts: AllFacts, question: Question) -> Iterator[Finding]:
    """Horovod must have the same build on all hosts. A rank without NCCL waits forever for ranks with NCCL."""
    found = {
        host: " ".join(each["engines"]["horovod"]["built_with"])
        for host, each in _having(facts, "engines")
        if (each["engines"].get("horovod") or {}).get("built_with") is not None
    }
    for hosts, evidence in hostcheck.differing({"Horovod's build": found}):
        yield error(hosts, evidence, "Build Horovod again on all hosts: launch/install_horovod.sh --force")


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


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
