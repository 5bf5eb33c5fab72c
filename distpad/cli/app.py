"""Register the subcommands of ``distpad``."""

from __future__ import annotations

import typer

import distpad
from distpad.cli import certify, doctor, launch, pod

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.command("certify")(certify.certify)
app.command("doctor")(doctor.doctor)
# options after the first word of COMMAND belong to COMMAND
app.command("launch", context_settings={"allow_interspersed_args": False})(launch.launch)
app.command("pod")(pod.pod)


@app.callback(invoke_without_command=True)
def _main(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Pad labels of varying length alike on all devices, and average losses exactly."""
    if version:
        typer.echo(f"distpad {distpad.__version__}")
        raise typer.Exit
