"""Register the subcommands of ``distpad``."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import typer

import distpad

SETTINGS: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": "rich"}
COMMANDS: dict[str, dict[str, Any]] = {
    "certify": {},
    "doctor": {},
    # options after the first word of COMMAND belong to COMMAND
    "launch": {"context_settings": {"allow_interspersed_args": False}},
    "pod": {},
}


@functools.cache
def command(name: str) -> Any:
    """Import a subcommand. The imports of the others would take longer than its own."""
    alone = typer.Typer(**SETTINGS)
    alone.command(name, **COMMANDS[name])(getattr(importlib.import_module(f"distpad.cli.{name}"), name))
    return typer.main.get_command(alone)


class _Commands(typer.core.TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return command(cmd_name) if cmd_name in COMMANDS else None


app = typer.Typer(cls=_Commands, no_args_is_help=True, **SETTINGS)


@app.callback(invoke_without_command=True)
def _main(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Pad labels of varying length alike on all devices, and average losses exactly."""
    if version:
        typer.echo(f"distpad {distpad.__version__}")
        raise typer.Exit
