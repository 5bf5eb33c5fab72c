"""Programs that a test writes: shell scripts that stand in for what it does not want to run."""

from __future__ import annotations

import pathlib


def script(path: pathlib.Path, text: str, shell: str = "sh") -> pathlib.Path:
    """Write an executable script, and return its path."""
    path.write_text(f"#!/bin/{shell}\n{text}\n")
    path.chmod(0o755)
    return path
