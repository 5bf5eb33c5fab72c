"""The question to the doctor, and the findings in its answer."""

from __future__ import annotations

import dataclasses

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check on one host, or on all hosts.

    Attributes:
      host: the host's name, or several names, as in "host1, host2"; "all" for a comparison.
      what: the check's name in checks.py.
      state: "ok", "warning", "error".
      evidence: the facts behind the finding.
      remedy: an instruction for the user.
    """

    host: str
    what: str
    state: str
    evidence: str = ""
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """The hosts, ports and code to check. ``slots_given`` is true if the user gave the slots of the hosts."""

    slots: dict[str, int]
    slots_given: bool = False
    ports: tuple[int, ...] = ()
    code: str = ""

    @property
    def several(self) -> bool:
        """Whether workers communicate over a network."""
        return len(self.slots) > 1


def error(host: str, evidence: str, remedy: str) -> Finding:
    """A problem that keeps a job from running, or from correct results."""
    return Finding(host, "", ERROR, evidence, remedy)


def warning(host: str, evidence: str, remedy: str) -> Finding:
    """A setting that may be intended, or that harms only some jobs."""
    return Finding(host, "", WARNING, evidence, remedy)
