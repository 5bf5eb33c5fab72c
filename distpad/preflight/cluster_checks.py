"""Rules of all hosts side by side: what has to be the same, and how they see one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distpad.launcher import hostcheck
from distpad.preflight.findings import Finding, Question, error, warning

AllFacts = Mapping[str, Mapping[str, Any]]

SKEW_S = 5.0


def clock(host: str, answer: Mapping[str, Any]) -> Iterator[Finding]:
    """Logs of hosts whose clocks differ cannot be read side by side, and tickets and certificates fail."""
    ahead = answer["facts"]["time"] - answer["received"]
    behind = answer["sent"] - answer["facts"]["time"]
    off = max(ahead, behind)
    if off > SKEW_S:
        where = "ahead" if ahead > behind else "behind"
        yield warning(host, f"its clock is {off:.0f} s {where}", "Let all hosts keep time: timedatectl set-ntp true")


def names(facts: AllFacts, question: Question) -> Iterator[Finding]:
    """Hosts have to know one another, and themselves, by addresses where others can connect: Gloo looks up its own
    host's name and tells the others what it found."""
    for here, each in facts.items():
        for name, addresses in each.get("names", {}).items():
            own = name in (here, each["host"])
            if not own and name not in facts:
                continue  # of that host there is worse to tell
            trouble = hostcheck.trouble_with(name, addresses, is_own=own)
            if trouble:
                yield error(here, *trouble)


def versions(facts: AllFacts, question: Question) -> Iterator[Finding]:
    """Packages, Python and MPI have to be the same."""
    names = sorted({name for each in facts.values() for name in each.get("packages", {})})
    rows = {name: {host: each["packages"].get(name, "") for host, each in _having(facts, "packages")} for name in names}
    rows["Python"] = {host: _minor(each["python"]["version"]) for host, each in _having(facts, "python")}
    rows["mpirun"] = {host: (each["mpi"]["mpirun"] or {}).get("version", "") for host, each in _having(facts, "mpi")}
    for name, found in rows.items():
        if len(set(found.values())) > 1:
            yield error(_odd_ones(found), f"{name} differs: {_who_has_what(found)}", "Install the same everywhere.")


def builds(facts: AllFacts, question: Question) -> Iterator[Finding]:
    """Horovod has to be built alike: a rank without NCCL would wait for those with it forever."""
    found = {
        host: " ".join(each["engines"]["horovod"]["built_with"])
        for host, each in _having(facts, "engines")
        if (each["engines"].get("horovod") or {}).get("built_with") is not None
    }
    if len(set(found.values())) > 1:
        remedy = "Build it alike everywhere: launch/install_horovod.sh --force"
        yield error(_odd_ones(found), f"what Horovod was built with differs: {_who_has_what(found)}", remedy)


def own_code(facts: AllFacts, question: Question) -> Iterator[Finding]:
    """distpad itself has to be the same: its messages between workers have no versions."""
    yield from _same_files(facts, "distpad", "distpad's own code", "Install the same distpad everywhere.")


def code(facts: AllFacts, question: Question) -> Iterator[Finding]:
    """The folder of ``--code``: workers of two different programs wait for each other, or train two models."""
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
    """The hosts whose probe told something."""
    return [(host, each) for host, each in facts.items() if key in each]


def _odd_ones(found: Mapping[str, str]) -> str:
    """The hosts that differ from most, or from the first."""
    common = max(found.values(), key=list(found.values()).count)
    return ", ".join(host for host, value in found.items() if value != common)


def _who_has_what(found: Mapping[str, str]) -> str:
    groups: dict[str, list[str]] = {}
    for host, value in found.items():
        groups.setdefault(value or "none", []).append(host)
    return ", ".join(
        f"{' '.join(hosts)} {'has' if len(hosts) == 1 else 'have'} {value}" for value, hosts in groups.items()
    )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
