"""A finding, and what was asked for."""

from __future__ import annotations

import dataclasses

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was looked at on a host (or on all), and what came of it.

    Attributes:
      host: its name, or several, as in "host1, host2"; "all" for a comparison.
      what: the rule's name in checks.py.
      state: "ok", "warning", "error".
      evidence: what was found.
      remedy: what to do.
    """

    host: str
    what: str
    state: str
    evidence: str = ""
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """What the doctor was asked: hosts with their slots, and whether they were named on the command line."""

    slots: dict[str, int]
    slots_given: bool = False
    ports: tuple[int, ...] = ()
    code: str = ""

    @property
    def several(self) -> bool:
        """Whether workers have to reach one another over a network."""
        return len(self.slots) > 1


def error(host: str, evidence: str, remedy: str) -> Finding:
    """What keeps a job from running, or from running right."""
    return Finding(host, "", ERROR, evidence, remedy)


def warning(host: str, evidence: str, remedy: str) -> Finding:
    """What may be meant, or will hurt some jobs."""
    return Finding(host, "", WARNING, evidence, remedy)
