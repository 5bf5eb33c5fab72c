"""The command ``distpad``: one module per subcommand."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any


def main() -> None:
    """Run the command line and exit the process. Typer is imported here, since the library does not need it."""
    _open_closed_streams()
    from distpad.cli import app

    code: Any = 0
    try:
        app.app()
    except SystemExit as end:
        code = end.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any longer
            stream.flush()
    # strategies leave thread pools running; an ordinary exit waits for them, sometimes forever
    os._exit(code if isinstance(code, int) else int(code is not None))


def _open_closed_streams() -> None:
    """Replace standard streams that are closed, so that no file or pipe of the program gets their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the smallest free number
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115 (open until the end)
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")  # noqa: SIM115
