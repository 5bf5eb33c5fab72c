"""The outcome of an attempt, and the launcher's log."""

from __future__ import annotations

import contextlib
import dataclasses
import sys

HOST, LOST, TIME = 3, 4, 124  # exit codes: a host cannot be used, a host was lost, a time limit


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of an attempt.

    Attributes:
      code: the launcher's exit code.
      why: the reason, for the summary; empty on success.
      rank: the worker that failed first, if one did. The summary shows its last lines.
      shows_launcher: whether the summary shows the last lines of the engine's launcher.
      may_retry: whether a restart may help.
    """

    code: int
    why: str = ""
    rank: int | None = None
    shows_launcher: bool = False
    may_retry: bool = True


class Ended(Exception):
    """Raised to end an attempt from any depth; carries the outcome."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.why)
        self.outcome = outcome


def log(text: str) -> None:
    """Print a message on standard error, which keeps standard output for the workers."""
    with contextlib.suppress(OSError):
        print(f"distpad launch: {text}", file=sys.stderr, flush=True)
