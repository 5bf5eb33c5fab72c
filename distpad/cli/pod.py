"""``distpad pod``: the entry point of the pods of a training job in Kubernetes."""

from __future__ import annotations

import asyncio
import os
from typing import Any, Optional

import typer

from distpad import errors
from distpad.launcher import pod as pods
from distpad.launcher import podrun, run

# Typer reads the annotations on Python 3.9, which does not know `X | None`.
# ruff: noqa: UP045

GANG = 1  # offset from TensorFlow's port to the port at which pod 0 of a gang listens


def pod(
    kind: str = typer.Argument(..., metavar="KIND", help=" | ".join(pods.KINDS), show_default=False),
    command: Optional[list[str]] = typer.Argument(None, metavar="-- COMMAND...", help="The training command; mpi-worker takes none.", show_default=False),
    port: int = typer.Option(2222, min=1024, max=65534, help="The port of TensorFlow in each pod.", rich_help_panel="indexed-job, jobset, trainjob"),
    wait_s: float = typer.Option(600.0, min=1, help="Seconds to wait for the other pods.", rich_help_panel="indexed-job, MPI"),
    grace_s: float = typer.Option(10.0, min=0, help="Seconds for the training to end by itself after another pod is lost, and after SIGTERM.", rich_help_panel="indexed-job, MPI"),
    finish_s: float = typer.Option(600.0, min=1, help="Seconds to wait for the other workers after this one is done.", rich_help_panel="indexed-job, MPI"),
    host_discovery_script: str = typer.Option(pods.DISCOVERY, help="For elastic jobs.", rich_help_panel="MPI"),
    min_np: Optional[int] = typer.Option(None, min=1, help="Elastic: minimum number of workers. Default: those of one pod.", rich_help_panel="MPI"),
) -> None:  # fmt: skip
    """Run this pod's part of a training job, and exit with the training's code.

    It derives the names of all pods, configures the engine, sets a variable from
    each file in /run/secrets/distpad, and forwards SIGTERM. The pods of an
    indexed-job start together, end together if one fails or is lost, and succeed
    together; the operators do this for the other kinds.

    Examples:

      distpad pod indexed-job -- python train.py --resume

      distpad pod mpi-launcher --wait-s 300 -- python train.py --backend horovod

      distpad pod mpi-worker

    Exit codes: the training's, 2 wrong or missing settings, 3 another pod did not
    start in time, 4 another pod failed or was lost, 124 another pod did not finish
    in time, 126 or 127 the command cannot be started, 143 SIGTERM. The pods of an
    indexed-job replace a training's own exit code 4 by 1.
    """
    try:
        errors.choice("pod", "KIND", kind, pods.KINDS)
        if bool(command) == (kind == "mpi-worker"):
            raise ValueError(
                "pod: mpi-worker takes no command; all other kinds take one after --: distpad pod KIND -- python train.py."
            )
        secrets = pods.secret_files()
        if kind == "mpi-worker":
            code = podrun.serve()
        elif kind in pods.WORKERS:
            member = pods.member(kind, os.environ, port)
            environ = {**os.environ, **run.read_secrets(secrets)}
            gang_port = port + GANG if kind == "indexed-job" else None
            limits = {"wait_s": wait_s, "grace_s": grace_s, "finish_s": finish_s}
            working = podrun.work(member, command or (), environ, gang_port=gang_port, **limits)
            code = asyncio.new_event_loop().run_until_complete(working)  # asyncio.run would wait for a slow DNS
        else:
            given: dict[str, Any] = {
                "command": tuple(command or ()),
                "secret": secrets,
                "cwd": os.getcwd(),
                "waits": True,
            }
            given |= {"min_np": min_np, "grace_s": grace_s, "start_timeout_s": wait_s}
            code = run.run(pods.mpi_job(kind, os.environ, host_discovery_script, **given), os.environ)
    except ValueError as error:
        typer.echo(f"distpad {error}", err=True)
        raise typer.Exit(2) from error
    raise typer.Exit(code)
