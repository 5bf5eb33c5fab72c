"""The command ``distpad``: one module per subcommand."""

from __future__ import annotations

import os
import sys
from typing import Any


def main() -> None:
    """Run the command line and exit the process. Typer is imported here, since the library does not need it."""
    from distpad.cli import app

    code: Any = 0
    try:
        app.app()
    except SystemExit as end:
        code = end.code
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # strategies leave thread pools running; an ordinary exit waits for them, sometimes forever
    os._exit(code if isinstance(code, int) else int(code is not None))
