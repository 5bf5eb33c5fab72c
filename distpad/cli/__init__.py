"""The command ``distpad``: one file a subcommand."""

from __future__ import annotations


def main() -> None:
    """Run the command line. Its packages are imported here, so that the library does not need them."""
    from distpad.cli import app

    app.app()
