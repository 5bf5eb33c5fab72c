"""The end of an attempt, and the launcher's log."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

HOST, LOST, TIME = 3, 4, 124  # exit codes: a host cannot be used, a host was lost, a time limit


class Ended(Exception):
    """The end of an attempt, raised from any depth.

    Args:
      code: the launcher's exit code.
      why: the reason, for the summary; empty on success.
      rank: the worker that failed first, if one did. The summary shows its last lines.
      shows_launcher: whether the summary shows the last lines of the engine's launcher.
      may_retry: whether a restart may help.
    """

    def __init__(
        self, code: int, why: str = "", rank: int | None = None, *, shows_launcher: bool = False, may_retry: bool = True
    ) -> None:
        super().__init__(why)
        self.code, self.why, self.rank = code, why, rank
        self.shows_launcher, self.may_retry = shows_launcher, may_retry


def log(text: str, program: str = "launch") -> None:
    """Print a message on standard error, which keeps standard output for the workers."""
    with contextlib.suppress(OSError):
        print(f"distpad {program}: {text}", file=sys.stderr, flush=True)


def few(names: Sequence[str]) -> str:
    """A short text of names: at most 8, and the number of the others."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
