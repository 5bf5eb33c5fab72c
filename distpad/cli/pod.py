"""``distpad pod``: the entry point of the pods of a training job in Kubernetes."""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Optional

import typer

from distpad import errors
from distpad.launcher import pod as pods
from distpad.launcher import podrun, sshfiles

# Typer reads the annotations on Python 3.9, which does not know `X | None`.
# ruff: noqa: UP045

REGISTER = 1  # offset from TensorFlow's port to the port of the register of pods, which pod 0 serves


def pod(
    kind: str = typer.Argument(..., metavar="KIND", help=" | ".join(pods.KINDS), show_default=False),
    command: Optional[list[str]] = typer.Argument(None, metavar="-- COMMAND...", help="The training command; mpi-worker takes none.", show_default=False),
    port: int = typer.Option(2222, min=1024, max=65534, help="The port of TensorFlow, or of sshd, in each pod."),
    wait_s: float = typer.Option(600.0, min=1, help="Seconds to wait for the other pods."),
    grace_s: float = typer.Option(10.0, min=0, help="Seconds for the training to end by itself after another pod is lost, and after SIGTERM."),
    finish_s: float = typer.Option(600.0, min=1, help="Seconds to wait for the other workers after this one is done.", rich_help_panel="indexed-job, jobset, trainjob"),
    keys: pathlib.Path = typer.Option(pathlib.Path("/etc/mpi-ssh"), metavar="FOLDER", help="The mount path of the operator's Secret.", rich_help_panel="MPI"),
    private: Optional[pathlib.Path] = typer.Option(None, metavar="FOLDER", help="For the files of ssh and sshd. Default: /tmp/distpad-ssh-UID.", rich_help_panel="MPI"),
    hostfile: str = typer.Option("", help=f"Default: the operator's, {pods.HOSTFILE}.", rich_help_panel="MPI"),
    host_discovery_script: str = typer.Option(pods.DISCOVERY, help="For elastic jobs.", rich_help_panel="MPI"),
    network_interface: str = typer.Option("eth0", help="The network interface for collectives.", rich_help_panel="MPI"),
    min_np: Optional[int] = typer.Option(None, min=1, help="Elastic: minimum number of workers. Default: those of one pod.", rich_help_panel="MPI"),
    max_np: Optional[int] = typer.Option(None, min=1, help="Elastic: maximum number of workers. Default: those of all pods.", rich_help_panel="MPI"),
) -> None:  # fmt: skip
    """Run this pod's part of a training job, and exit with the training's code.

    It derives the names of all pods, waits for the other pods, configures the
    engine, and forwards SIGTERM. Pods of MultiWorkerMirroredStrategy form a gang:
    if one pod fails or is lost, all pods end and can be restarted, and no pod
    succeeds before all have succeeded.

    Examples:

      distpad pod indexed-job -- python train.py --resume

      distpad pod mpi-launcher --wait-s 300 -- python train.py --backend horovod

      distpad pod mpi-worker

    Exit codes: the training's, 2 wrong or missing settings, 3 another pod did not
    start in time, 4 another pod failed or was lost, 124 another pod did not finish
    in time, 126 or 127 the command cannot be started, 143 SIGTERM.
    """
    try:
        errors.choice("pod", "KIND", kind, pods.KINDS)
        if bool(command) == (kind == "mpi-worker"):
            raise ValueError(
                "pod: mpi-worker takes no command; all other kinds take one after --: distpad pod KIND -- python train.py."
            )
        if kind in pods.GANGS:
            code = podrun.work(
                podrun.Worker(
                    pods.member(kind, os.environ, port),
                    command or (),
                    os.environ,
                    port=port + REGISTER,
                    wait_s=wait_s,
                    grace_s=grace_s,
                    finish_s=finish_s,
                )
            )
        else:
            folder = private or sshfiles.folder()
            sshfiles.write(keys, folder, port)
            if kind == "mpi-worker":
                raise typer.Exit(podrun.serve(folder, port))
            mpi = pods.Mpi(
                command=tuple(command or ()),
                port=port,
                ssh_config=str(folder / "ssh_config"),
                identity=str(folder / "key"),
                hostfile=hostfile,
                discovery=host_discovery_script,
                network_interface=network_interface,
                min_np=min_np,
                max_np=max_np,
                grace_s=grace_s,
                cwd=os.getcwd(),
                python=sys.executable,
            )
            job = mpi.job(os.environ) if kind == "mpi-launcher" else mpi.elastic_job(os.environ)
            code = podrun.launch(job, os.environ, port=port, wait_s=wait_s)
    except ValueError as error:
        typer.echo(f"distpad {error}", err=True)
        raise typer.Exit(2) from error
    raise typer.Exit(code)
