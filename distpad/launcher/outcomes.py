"""How an attempt ended, and saying so."""

from __future__ import annotations

import contextlib
import dataclasses
import sys

HOST, LOST, TIME = 3, 4, 124  # exit codes: a host cannot be used; it was lost; a time limit


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
      code: the launcher's exit code.
      why: a sentence for people; empty where all is well.
      rank: the worker that failed first, where one did; its last lines are shown.
    """

    code: int
    why: str = ""
    rank: int | None = None
    shows_launcher: bool = False
    may_retry: bool = True


class Ended(Exception):
    """Carries the outcome out of whatever the attempt was waiting for."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.why)
        self.outcome = outcome


def say(text: str) -> None:
    """Tell people something: on standard error, where it is in nobody's way."""
    with contextlib.suppress(OSError):
        print(f"distpad launch: {text}", file=sys.stderr, flush=True)
