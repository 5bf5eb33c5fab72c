"""``distpad launch``: start a job on several devices or hosts."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shlex
from typing import Any, Optional

import typer
import yaml

from distpad.launcher import allocation, describe, kubernetes, run, spec

DEFAULT: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(spec.Job)}
FOR_KUBERNETES = ("k8s", "image", "workers", "slots", "gpus", "queue", "namespace")
FOR_BOTH = ("command", "max_restarts", "config", "dry_run")  # --k8s starts nothing anyway

# Typer reads the annotations on Python 3.9, which does not know `X | None`.
# ruff: noqa: UP045


def _read_config(context: typer.Context, path: Optional[pathlib.Path]) -> Optional[pathlib.Path]:
    """The file's values as defaults, so that what stands on the command line wins."""
    if path is None:
        return None
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise typer.BadParameter(f"{path} holds {type(given).__name__}, expected flags and their values")
    flags = {name.lstrip("-"): parameter for parameter in context.command.params for name in parameter.opts}
    flags = {name: parameter for name, parameter in flags.items() if parameter.name not in ("config", "help")}
    defaults = {}
    for key, value in given.items():
        parameter = flags.get(str(key).lstrip("-").replace("_", "-"))
        if parameter is None:
            raise typer.BadParameter(f"{path} names {key!r}, expected one of: {', '.join(sorted(flags))}")
        defaults[parameter.name] = _as_flag(parameter, value)
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _as_flag(parameter: Any, value: Any) -> Any:
    """A value of YAML as the command line would have it: a list for what may be repeated, else text."""
    several = parameter.multiple or parameter.nargs == -1
    if several and isinstance(value, dict):
        return [f"{name}={text}" for name, text in value.items()]
    if several and isinstance(value, str) and parameter.nargs == -1:
        return shlex.split(value)
    if several:
        return [str(each) for each in (value if isinstance(value, list) else [value])]
    return ",".join(map(str, value)) if isinstance(value, list) else value


def launch(
    context: typer.Context,
    command: Optional[list[str]] = typer.Argument(None, metavar="-- COMMAND...", help="What each worker runs.", show_default=False),
    backend: str = typer.Option(DEFAULT["backend"], help="mirrored (one process), multiworker or horovod.", rich_help_panel="Workers"),
    np: Optional[int] = typer.Option(None, "-np", "--np", help="How many workers; for mirrored, how many replicas. Left out: the slots of the hosts.", rich_help_panel="Workers"),
    hosts: str = typer.Option("", "-H", "--hosts", help="Where: host:slots,host:slots,... Left out: this machine, or the Slurm allocation.", rich_help_panel="Workers"),
    hostfile: str = typer.Option("", help="The same as a file: a line 'name slots=N' a host.", rich_help_panel="Workers"),
    slots_per_host: Optional[int] = typer.Option(None, min=1, help="For hosts that were given without a number.", rich_help_panel="Workers"),
    min_np: Optional[int] = typer.Option(None, help="Elastic (Horovod over Gloo): go on with no fewer.", rich_help_panel="Workers"),
    max_np: Optional[int] = typer.Option(None, help="Elastic: grow to no more.", rich_help_panel="Workers"),
    host_discovery_script: str = typer.Option("", help="Elastic: prints host:slots, a line a host; asked each second.", rich_help_panel="Workers"),
    gloo: bool = typer.Option(False, "--gloo", help="Horovod over Gloo, by horovodrun (default).", rich_help_panel="Engine"),
    mpi: bool = typer.Option(False, "--mpi", help="Horovod over MPI, by mpirun.", rich_help_panel="Engine"),
    launcher: str = typer.Option("", help="The engine's launcher: horovodrun, mpirun, srun; ssh for the others.", rich_help_panel="Engine"),
    launcher_arg: list[str] = typer.Option([], metavar="ARG", help="A further argument for it; may be repeated.", rich_help_panel="Engine"),
    ssh_arg: list[str] = typer.Option([], metavar="ARG", help="A further argument for ssh, such as -p2222; may be repeated.", rich_help_panel="Engine"),
    network_interface: str = typer.Option("", help="The interface that collectives take, such as eth0.", rich_help_panel="Engine"),
    port: Optional[int] = typer.Option(None, help="multiworker: the first worker's port on each host. Left out: free ones.", rich_help_panel="Engine"),
    python: str = typer.Option(DEFAULT["python"], help="The Python with distpad in it, on all hosts.", show_default=False, rich_help_panel="Engine"),
    env: list[str] = typer.Option([], metavar="NAME", help="A variable that workers on other hosts get, too; may be repeated.", rich_help_panel="Environment"),
    secret: list[str] = typer.Option([], metavar="NAME=FILE", help="A variable whose value stands in a file; may be repeated.", rich_help_panel="Environment"),
    cwd: str = typer.Option("", metavar="FOLDER", help="Where the command runs, on all hosts. Left out: this folder.", rich_help_panel="Environment"),
    log_dir: str = typer.Option("", metavar="FOLDER", help="Write FOLDER/attempt-N/rank-N.stdout and .stderr instead of the terminal.", rich_help_panel="Output"),
    tee: bool = typer.Option(False, "--tee", help="With --log-dir: the terminal, too.", rich_help_panel="Output"),
    ranks: str = typer.Option("", metavar="0,2-4", help="Show only these workers on the terminal.", rich_help_panel="Output"),
    max_restarts: int = typer.Option(DEFAULT["max_restarts"], help="Start again after a failure, at most so often. With --k8s, left out: what k8s/ says.", rich_help_panel="Limits"),
    backoff_s: float = typer.Option(DEFAULT["backoff_s"], help="Seconds before the first restart; doubles each time, to 60.", rich_help_panel="Limits"),
    no_retry: list[int] = typer.Option(list(DEFAULT["no_retry"]), metavar="CODE", help="Exit codes after which nothing is started again.", rich_help_panel="Limits"),
    grace_s: float = typer.Option(DEFAULT["grace_s"], help="Seconds between asking a worker to end and killing it.", rich_help_panel="Limits"),
    start_timeout_s: float = typer.Option(DEFAULT["start_timeout_s"], help="Seconds in which all workers have to start.", rich_help_panel="Limits"),
    timeout_s: Optional[float] = typer.Option(None, help="End everything after so many seconds. Left out: never.", rich_help_panel="Limits"),
    k8s: Optional[str] = typer.Option(None, metavar="KIND", help=f"Print the manifests of a job in Kubernetes, and stop: {', '.join(kubernetes.kinds()) or 'none is installed here'}.", rich_help_panel="Kubernetes"),
    image: str = typer.Option("", metavar="NAME[:TAG][@DIGEST]", help="The image of all pods.", show_default=False, rich_help_panel="Kubernetes"),
    workers: Optional[int] = typer.Option(None, help="How many pods train; for mpijob-elastic at most. Left out: what k8s/ says.", rich_help_panel="Kubernetes"),
    slots: Optional[int] = typer.Option(None, help="Horovod: processes in each pod. Left out: one for each GPU, or one.", rich_help_panel="Kubernetes"),
    gpus: int = typer.Option(0, help="GPUs of each pod that trains.", rich_help_panel="Kubernetes"),
    queue: Optional[str] = typer.Option(None, metavar="NAME", help="Wait in this LocalQueue of Kueue's.", rich_help_panel="Kubernetes"),
    namespace: Optional[str] = typer.Option(None, metavar="NAME", help="Left out: the one that kubectl applies to.", rich_help_panel="Kubernetes"),
    config: Optional[pathlib.Path] = typer.Option(None, metavar="FILE.yaml", is_eager=True, callback=_read_config, help="Any of these flags by name, and 'command'. The command line wins."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print exactly what would run, secrets hidden, and stop."),
) -> None:  # fmt: skip
    """Start a command on several devices or hosts, and see it through.

    It starts workers by their engine's own launcher (horovodrun, mpirun, srun; multiworker has none), passes signals on, and
    ends with the exit code of the worker that failed first, whose last lines it shows. Nobody outlives it.

    Examples:

      distpad launch -np 2 -- python train.py

      distpad launch --backend horovod -H node1:4,node2:4 -- python train.py --epochs 3

      distpad launch --backend horovod --mpi --hostfile hosts --network-interface eth0 -- python train.py

      distpad launch --config job.yaml --log-dir logs --tee --max-restarts 3 -- python train.py --resume

      distpad launch --k8s jobset --image me/it:7 --workers 4 --gpus 8 -- python train.py --resume | kubectl apply -f -

    With --k8s, the command runs in each pod, or by mpirun or horovodrun; left out, it is the handwriting example. In it,
    Kubernetes makes $(NAME) the value of the pod's variable NAME, and $$ a $.

    Exit codes: the first failing worker's (128 + N where signal N ended it), 2 usage, 3 a host cannot be used, 4 a host
    was lost, 124 a time limit, 126 or 127 the command cannot be started, 130 and 143 after SIGINT and SIGTERM.
    """
    environ = dict(os.environ)
    if environ.get("PYTHONPATH"):  # agents and engines are started in other folders
        environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, environ["PYTHONPATH"].split(os.pathsep)))
    try:
        given = _given(context, k8s)
        if k8s is not None:
            wanted = kubernetes.Job(
                kind=k8s,
                image=image,
                command=tuple(command or ()),
                workers=workers,
                slots=slots,
                gpus=gpus,
                queue=queue,
                namespace=namespace,
                max_restarts=max_restarts if "max_restarts" in given else None,
            )
            typer.echo(kubernetes.build(wanted), nl=False)
            return
        job = spec.Job(
            command=tuple(command or ()),
            backend=backend,
            np=np,
            hosts=allocation.named(hosts, hostfile, slots_per_host, environ),
            controller=_controller(gloo, mpi),
            launcher=launcher,
            launcher_args=tuple(launcher_arg),
            ssh_args=tuple(ssh_arg),
            network_interface=network_interface,
            env=tuple(env),
            secrets=spec.parse_secrets(secret),
            log_dir=os.path.abspath(log_dir) if log_dir else "",
            tee=tee,
            ranks=spec.parse_ranks(ranks),
            max_restarts=max_restarts,
            backoff_s=backoff_s,
            no_retry=tuple(no_retry),
            grace_s=grace_s,
            start_timeout_s=start_timeout_s,
            timeout_s=timeout_s,
            port=port,
            min_np=min_np,
            max_np=max_np,
            host_discovery_script=os.path.abspath(host_discovery_script) if host_discovery_script else "",
            slots_per_host=slots_per_host,
            python=os.path.abspath(python) if os.sep in python else python,  # agents do not run in this folder
            cwd=os.path.abspath(cwd or "."),
        )
        if dry_run:
            version = run.mpi_version(job, environ) if job.launcher == "mpirun" else ""
            hidden = run.read_secrets(job.secrets)
            typer.echo("\n".join(describe.describe(job, environ, hidden, version, is_root=os.geteuid() == 0)))
            return
        code = run.run(job, environ)
    except ValueError as error:
        typer.echo(f"distpad {error}", err=True)
        raise typer.Exit(2) from error
    raise typer.Exit(code)


def _controller(gloo: bool, mpi: bool) -> str:
    if gloo and mpi:
        raise ValueError("launch: both --gloo and --mpi are given, expected one of them.")
    return "gloo" if gloo else "mpi" if mpi else ""


def _given(context: typer.Context, k8s: Optional[str]) -> set[str]:
    """What stands on the command line or in the file; refuses flags of jobs in Kubernetes for others, and the reverse."""
    given = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name != "DEFAULT":
            given[parameter.name or ""] = parameter.opts[0]
    strangers = given.keys() - {*FOR_BOTH, *FOR_KUBERNETES} if k8s is not None else given.keys() & {*FOR_KUBERNETES}
    wrong = ", ".join(flag for name, flag in given.items() if name in strangers)
    if wrong and k8s is None:
        raise ValueError(f"launch: {wrong} without --k8s, expected with it: --k8s KIND, such as jobset.")
    if wrong:
        known = ", ".join(f"--{name.replace('_', '-')}" for name in (*FOR_KUBERNETES, *FOR_BOTH[1:]))
        raise ValueError(f"launch: {wrong} with --k8s, expected only {known}. Leave out the others.")
    return {*given}
