"""The command ``distpad``: one file a subcommand."""

from __future__ import annotations

import os
import sys
from typing import Any


def main() -> None:
    """Run the command line, and end the process. Its packages are imported here: the library does not need them."""
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
    # strategies leave thread pools behind on which an ordinary exit waits, sometimes forever
    os._exit(code if isinstance(code, int) else int(code is not None))
