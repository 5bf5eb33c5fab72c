"""``distpad launch``: start a job on several devices or hosts."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any, Optional

import typer
import yaml

from distpad.launcher import allocation, describe, kubernetes, kustomize, render, run, spec

DEFAULT: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(spec.Job)}
FOR_BOTH = ("command", "gpus", "env", "secret", "network_interface", "max_restarts", "timeout_s", "config", "dry_run")
OF_KUBERNETES = {field.name for field in dataclasses.fields(kubernetes.Job)} - {"kind", "folder"}
FOR_KUBERNETES = ("k8s", *sorted(OF_KUBERNETES - {*FOR_BOTH}))

# Typer reads the annotations on Python 3.9, which does not know `X | None`.
# ruff: noqa: UP045


def _read_config(context: typer.Context, path: Optional[pathlib.Path]) -> Optional[pathlib.Path]:
    """Use the file's values as defaults, so that the command line overrides them."""
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
    """Convert a YAML value to its command line form: a list for repeatable flags, else text."""
    several = parameter.multiple or parameter.nargs == -1
    if parameter.name == "hosts":
        return ",".join(_hosts(value))
    if isinstance(value, dict) and not several:
        raise typer.BadParameter(f"{parameter.name}: a mapping, expected one value")
    if several and isinstance(value, dict):
        return [f"{name}={text}" for name, text in value.items()]
    if several and isinstance(value, str) and parameter.nargs == -1:
        return shlex.split(value)
    if several:
        return [str(each) for each in (value if isinstance(value, list) else [value])]
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _hosts(value: Any) -> list[str]:
    """Convert ``node1:4``, a list of such hosts, or a mapping from hosts to slots to the form of the command line."""
    if isinstance(value, list):
        return [host for each in value for host in _hosts(each)]
    if not isinstance(value, dict):
        return [str(value)]
    for name, slots in value.items():
        if not isinstance(slots, (int, type(None))):
            kind = "mapping" if isinstance(slots, dict) else type(slots).__name__
            raise typer.BadParameter(f"hosts: slots of {name} is a {kind}, expected an integer")
    return [name if slots is None else f"{name}:{slots}" for name, slots in value.items()]


def launch(
    context: typer.Context,
    command: Optional[list[str]] = typer.Argument(None, metavar="-- COMMAND...", help="The command that each worker runs.", show_default=False),
    backend: str = typer.Option(DEFAULT["backend"], help="mirrored (one process), multiworker or horovod.", rich_help_panel="Workers"),
    np: Optional[int] = typer.Option(None, "-np", "--np", help="Number of workers; for mirrored, number of replicas. Default: the slots of the hosts.", rich_help_panel="Workers"),
    hosts: str = typer.Option("", "-H", "--hosts", help="The hosts, as host:slots,host:slots,... Default: this machine, or the Slurm allocation.", rich_help_panel="Workers"),
    hostfile: str = typer.Option("", help="A file with the hosts, one line 'name slots=N' per host.", rich_help_panel="Workers"),
    slots_per_host: Optional[int] = typer.Option(None, min=1, help="Slots of the hosts that are given without a number.", rich_help_panel="Workers"),
    min_np: Optional[int] = typer.Option(None, help="Elastic (Horovod over Gloo): minimum number of workers.", rich_help_panel="Workers"),
    max_np: Optional[int] = typer.Option(None, help="Elastic: maximum number of workers.", rich_help_panel="Workers"),
    host_discovery_script: str = typer.Option("", help="Elastic: a script that prints one line host:slots per host. It runs once a second.", rich_help_panel="Workers"),
    gpus: int = typer.Option(0, help="GPUs of each host that workers use; with --k8s, of each pod that trains. A worker that does not see its GPUs ends the job.", rich_help_panel="Workers"),
    gpus_per_worker: Optional[int] = typer.Option(None, help="GPUs of each worker, which sees only these, by its local rank. Default: for multiworker, those of its host divided by the workers there; for Horovod one, which the program chooses by its local rank.", rich_help_panel="Workers"),
    gloo: bool = typer.Option(False, "--gloo", help="Horovod over Gloo, started by horovodrun (default).", rich_help_panel="Engine"),
    mpi: bool = typer.Option(False, "--mpi", help="Horovod over MPI, started by mpirun.", rich_help_panel="Engine"),
    launcher: str = typer.Option("", help="The engine's launcher: horovodrun, mpirun or srun; ssh for the other engines.", rich_help_panel="Engine"),
    launcher_arg: list[str] = typer.Option([], metavar="ARG", help="An extra argument for the engine's launcher. Repeatable.", rich_help_panel="Engine"),
    ssh_arg: list[str] = typer.Option([], metavar="ARG", help="An extra argument for ssh, such as -p2222. Repeatable.", rich_help_panel="Engine"),
    network_interface: str = typer.Option("", help="The network interface for collectives, such as eth0.", rich_help_panel="Engine"),
    port: Optional[int] = typer.Option(None, help="multiworker: the first worker's port on each host. Default: free ports.", rich_help_panel="Engine"),
    python: str = typer.Option(DEFAULT["python"], help="The Python that has distpad installed, on all hosts.", show_default=False, rich_help_panel="Engine"),
    env: list[str] = typer.Option([], metavar="NAME[=VALUE]", help="A further variable for all workers, or one of the login such as SSH_AUTH_SOCK. Repeatable.", rich_help_panel="Environment"),
    secret: list[str] = typer.Option([], metavar="NAME=FILE", help="A variable whose value is read from a file; with --k8s, NAME=SECRET:KEY. Repeatable.", rich_help_panel="Environment"),
    cwd: str = typer.Option("", metavar="FOLDER", help="The command's working directory, on all hosts. Default: the current one.", rich_help_panel="Environment"),
    log_dir: str = typer.Option("", metavar="FOLDER", help="Write FOLDER/attempt-N/rank-N.stdout and .stderr instead of the terminal.", rich_help_panel="Output"),
    tee: bool = typer.Option(False, "--tee", help="With --log-dir: write to the terminal as well.", rich_help_panel="Output"),
    ranks: str = typer.Option("", metavar="0,2-4", help="Show only these workers on the terminal.", rich_help_panel="Output"),
    max_restarts: int = typer.Option(DEFAULT["max_restarts"], help="Maximum number of restarts after failures. Default with --k8s: the value in k8s/.", rich_help_panel="Limits"),
    backoff_s: float = typer.Option(DEFAULT["backoff_s"], help="Seconds before the first restart; doubles each time, up to 60.", rich_help_panel="Limits"),
    no_retry: list[int] = typer.Option(list(DEFAULT["no_retry"]), metavar="CODE", help="An exit code after which the job does not restart. Repeatable.", rich_help_panel="Limits"),
    grace_s: float = typer.Option(DEFAULT["grace_s"], help="Seconds between SIGTERM and SIGKILL for a worker.", rich_help_panel="Limits"),
    lost_after_s: float = typer.Option(DEFAULT["lost_after_s"], help="Seconds of silence after which a host is lost, and after which the processes of a lost launcher end.", rich_help_panel="Limits"),
    start_timeout_s: float = typer.Option(DEFAULT["start_timeout_s"], help="Seconds within which all workers must start.", rich_help_panel="Limits"),
    timeout_s: Optional[float] = typer.Option(None, help="Time limit for the whole job, in seconds. Default: none.", rich_help_panel="Limits"),
    k8s: Optional[str] = typer.Option(None, metavar="KIND", help=f"Print the manifests of a Kubernetes job and exit: {', '.join(kubernetes.kinds()) or 'none is installed here'}.", rich_help_panel="Kubernetes"),
    image: str = typer.Option("", metavar="NAME[:TAG][@DIGEST]", help="The image of all pods.", show_default=False, rich_help_panel="Kubernetes"),
    workers: Optional[int] = typer.Option(None, help="Number of pods that train; for mpijob-elastic the maximum. Default: the value in k8s/.", rich_help_panel="Kubernetes"),
    slots: Optional[int] = typer.Option(None, help="Horovod: processes in each pod. Default: one per GPU, or one.", rich_help_panel="Kubernetes"),
    name: Optional[str] = typer.Option(None, help="The job's name. Default: a new one, such as train-x7k2p.", show_default=False, rich_help_panel="Kubernetes"),
    cpu: Optional[int] = typer.Option(None, help="CPUs of each pod that trains. Default: 8 per GPU, or 4.", rich_help_panel="Kubernetes"),
    memory: Optional[str] = typer.Option(None, metavar="QUANTITY", help="Memory of each pod that trains, /dev/shm included. Default: 32Gi per GPU, or 8Gi.", rich_help_panel="Kubernetes"),
    mount: list[str] = typer.Option([], metavar="CLAIM:PATH[:ro]", help="An existing PersistentVolumeClaim to mount. Default: checkpoints:/checkpoints. Repeatable.", rich_help_panel="Kubernetes"),
    rdma: Optional[str] = typer.Option(None, metavar="RESOURCE[=NUMBER]", help="RDMA devices of each pod that trains, such as rdma/hca=8. See k8s/components/rdma.", rich_help_panel="Kubernetes"),
    queue: Optional[str] = typer.Option(None, metavar="NAME", help="The Kueue LocalQueue in which the job waits.", rich_help_panel="Kubernetes"),
    topology: Optional[str] = typer.Option(None, metavar="LABEL", help="Kueue: place all pods that train on nodes with the same value of this label, such as a rack.", rich_help_panel="Kubernetes"),
    exclusive_topology: Optional[str] = typer.Option(None, metavar="LABEL", help="JobSet: likewise, and no other JobSet there.", rich_help_panel="Kubernetes"),
    priority_class: Optional[str] = typer.Option(None, metavar="NAME", help="The PriorityClass of all pods.", rich_help_panel="Kubernetes"),
    service_account: Optional[str] = typer.Option(None, metavar="NAME", help="The ServiceAccount of all pods, such as for the cloud's storage. They get no token of Kubernetes's API.", rich_help_panel="Kubernetes"),
    node_selector: list[str] = typer.Option([], metavar="LABEL=VALUE", help="A label of the nodes of pods that train. Repeatable.", rich_help_panel="Kubernetes"),
    toleration: list[str] = typer.Option([], metavar="KEY[=VALUE][:EFFECT]", help="A taint of nodes that pods that train tolerate. Repeatable.", rich_help_panel="Kubernetes"),
    image_pull_secret: list[str] = typer.Option([], metavar="NAME", help="A Secret of the image's registry. Repeatable.", rich_help_panel="Kubernetes"),
    ttl_s: Optional[int] = typer.Option(None, help="Seconds after which Kubernetes deletes the job when it has ended. Default: a week.", rich_help_panel="Kubernetes"),
    component: list[str] = typer.Option([], metavar="NAME", help=f"{' or '.join(kubernetes.COMPONENTS)}: see k8s/components. Repeatable.", rich_help_panel="Kubernetes"),
    namespace: Optional[str] = typer.Option(None, metavar="NAME", help="Default: the namespace that kubectl applies to.", rich_help_panel="Kubernetes"),
    config: Optional[pathlib.Path] = typer.Option(None, metavar="FILE.yaml", is_eager=True, callback=_read_config, help="A file with any of these flags by name, and 'command'. The command line overrides it."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the exact command lines and environments, without secrets, and exit."),
) -> None:  # fmt: skip
    """Start a command on several devices or hosts, and supervise it to its end.

    The engine's own launcher starts the workers (horovodrun, mpirun, srun; multiworker has none). This command forwards
    signals, shows the last lines of the worker that failed first, and ends with that worker's exit code. No process of
    the job outlives it.

    Examples:

      distpad launch -np 2 -- python train.py

      distpad launch --backend horovod -H node1:4,node2:4 -- python train.py --epochs 3

      distpad launch --backend horovod --mpi --hostfile hosts --network-interface eth0 -- python train.py

      distpad launch --config job.yaml --log-dir logs --tee --max-restarts 3 -- python train.py --resume

      distpad launch --k8s jobset --image me/it:7 --workers 4 --gpus 8 -- python train.py --resume | kubectl apply -f -

    With --k8s, the command runs in each pod, or under mpirun or horovodrun. Without a command, the job trains the
    handwriting example. Kubernetes replaces $(NAME) in the command by the pod's variable NAME, and $$ by $.

    Exit codes: that of the worker that failed first (128 + N if signal N ended it), 2 wrong usage, 3 a host cannot be
    used, 4 a host was lost, 124 time limit, 126 or 127 the command cannot be started, 130 SIGINT, 143 SIGTERM.
    """
    try:
        environ = _environ(cwd)
        given = _given_parameters(context, k8s)
        if k8s is not None:
            fields = {name: context.params[name] for name in given & OF_KUBERNETES}
            fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
            typer.echo(kustomize.build(kubernetes.Job(kind=k8s, **fields)), nl=False)
            return
        job = _job(context.params, environ)
        if dry_run:
            version, hidden = run.mpi_version(job, environ), run.read_secrets(job.secrets)
            typer.echo("\n".join(describe.describe(job, environ, hidden, version, is_root=os.geteuid() == 0)))
            return
        code = run.run(job, environ)
    except ValueError as error:
        typer.echo(f"distpad {error}", err=True)
        raise typer.Exit(2) from error
    raise typer.Exit(code)


def _environ(cwd: str) -> dict[str, str]:
    """Return the variables, with absolute paths.

    Raises:
      ValueError: this process has no working folder, although paths are relative to it.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        if not os.path.isabs(cwd):
            why = "the working folder was deleted, expected one that exists. cd to it, or give --cwd FOLDER."
            raise ValueError(f"launch: {why}") from error
        os.chdir("/")
    return render.absolute_paths(os.environ)


def _job(given: Mapping[str, Any], environ: Mapping[str, str]) -> spec.Job:
    """The job of the parameters. Fields of spec.Job without a line here are parameters of the same name."""
    if given["gloo"] and given["mpi"]:
        raise ValueError("launch: both --gloo and --mpi are given, expected one of them.")
    hosts, hostfile, python = given["hosts"], given["hostfile"], given["python"]
    slots = given["slots_per_host"]
    if hosts or hostfile or not (given["np"] or "SLURM_JOB_ID" in environ):  # otherwise, the number of tasks counts
        slots = slots or spec.slots_for_gpus(given["backend"], given["gpus"], given["gpus_per_worker"])
    fields = {field.name: given[field.name] for field in dataclasses.fields(spec.Job) if field.name in given}
    fields |= {name: tuple(given[name] or ()) for name in ("command", "env", "no_retry")}
    fields |= {name: os.path.abspath(given[name]) for name in ("log_dir", "host_discovery_script") if given[name]}
    return spec.Job(
        **{
            **fields,
            "hosts": allocation.named(hosts, hostfile, slots, environ),
            "slots_per_host": slots,
            "controller": "gloo" if given["gloo"] else "mpi" if given["mpi"] else "",
            "launcher_args": tuple(given["launcher_arg"]),
            "ssh_args": tuple(given["ssh_arg"]),
            "secrets": spec.parse_secrets(given["secret"]),
            "ranks": spec.parse_ranks(given["ranks"]),
            "python": os.path.abspath(python) if os.sep in python else python,  # agents run in another folder
            "cwd": os.path.abspath(given["cwd"] or "."),
        }
    )


def _given_parameters(context: typer.Context, k8s: Optional[str]) -> set[str]:
    """Return the names of the parameters that the command line or the file gives.

    Raises:
      ValueError: flags for Kubernetes without --k8s, or other flags with it.
    """
    given = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name != "DEFAULT":
            given[parameter.name or ""] = parameter.opts[0]
    mismatched = given.keys() - {*FOR_BOTH, *FOR_KUBERNETES} if k8s is not None else given.keys() & {*FOR_KUBERNETES}
    wrong = ", ".join(flag for name, flag in given.items() if name in mismatched)
    if wrong and k8s is None:
        raise ValueError(f"launch: {wrong} without --k8s, expected --k8s KIND, such as --k8s jobset.")
    if wrong:
        known = ", ".join(f"--{name.replace('_', '-')}" for name in (*FOR_KUBERNETES, *FOR_BOTH[1:]))
        raise ValueError(f"launch: {wrong} with --k8s, expected only {known}. Leave out the others.")
    return {*given}
