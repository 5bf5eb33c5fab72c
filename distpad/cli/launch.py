"""``distpad launch``: start a job on several devices or hosts."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Optional, get_args, get_origin, get_type_hints

import typer
import yaml

from distpad import errors
from distpad.launcher import allocation, describe, kubernetes, kustomize, options, render, run, spec

_MOST_BRACKETS = 20
OF_KUBERNETES = {field.name for field, _, _ in options.stated(kubernetes.Job)}

# Typer reads the annotations on Python 3.9, which does not know `X | None`.
# ruff: noqa: UP045


def _read_config(context: typer.Context, path: Optional[pathlib.Path]) -> Optional[pathlib.Path]:
    """Use the file's values as defaults, so that the command line overrides them."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        nested = itertools.accumulate((mark in "[{") - (mark in "]}") for mark in text)
        if max(nested, default=0) > _MOST_BRACKETS:  # for which PyYAML would take seconds
            raise ValueError(f"more than {_MOST_BRACKETS} brackets in each other")
        given = yaml.safe_load(text) or {}
    except Exception as error:  # PyYAML's of a wrong date or number are of any kind
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
    if errors.is_deep(value, most=2):  # a short file of aliases can be exponentially long
        raise typer.BadParameter(f"{parameter.name}: a nest of lists, expected a value, a list or a mapping")
    if parameter.name == "hosts":
        return ",".join(_hosts(value))
    if isinstance(value, str) and parameter.nargs == -1:
        return shlex.split(value)
    several = parameter.multiple or parameter.nargs == -1
    if isinstance(value, dict) and not several:
        raise typer.BadParameter(f"{parameter.name}: a mapping, expected one value")
    pairs = [f"{name}={text}" for name, text in value.items()] if isinstance(value, dict) else value
    words = [str(each) for each in (pairs if isinstance(pairs, list) else [pairs])]
    return words if several else ",".join(words) if isinstance(value, list) else value


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


# fmt: off
OWN = {  # options that are no fields of a job, or that have another form on the command line
    "hosts": (str, typer.Option("", "-H", "--hosts", help="The hosts, as host:slots,host:slots,... Default: this machine, or the Slurm allocation.", rich_help_panel="Workers")),
    "hostfile": (str, typer.Option("", help="A file with the hosts, one line 'name slots=N' per host.", rich_help_panel="Workers")),
    "gloo": (bool, typer.Option(False, "--gloo", help="Horovod over Gloo, started by horovodrun (default).", rich_help_panel="Engine")),
    "mpi": (bool, typer.Option(False, "--mpi", help="Horovod over MPI, started by mpirun.", rich_help_panel="Engine")),
    "config": (Optional[pathlib.Path], typer.Option(None, metavar="FILE.yaml", is_eager=True, callback=_read_config, help="A file with any of these flags by name, and 'command'. The command line overrides it.")),
    "dry_run": (bool, typer.Option(False, "--dry-run", help="Print the exact command lines and environments, without secrets, and exit.")),
}
# fmt: on


def _parameters() -> Iterator[inspect.Parameter]:
    """The parameters of ``launch``: OWN, and the options of both kinds of jobs."""
    for name, (type_, own) in OWN.items():
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=own, annotation=type_)
    for owner in (spec.Job, kubernetes.Job):
        types = get_type_hints(owner)
        for field, flag, stated in options.stated(owner):
            type_, default = types[field.name], field.default
            if get_origin(type_) is tuple:
                type_, default = list[get_args(type_)[0]], list(default)  # type: ignore
            if default is dataclasses.MISSING:
                type_, default = Optional[type_], None
            shown: dict[str, Any] = {"help": stated.help, "metavar": stated.metavar, "rich_help_panel": stated.panel}
            shown["show_default"] = default not in ("", [], None, sys.executable)
            if field.name == "command":
                described = typer.Argument(default, **{**shown, "metavar": flag})
            else:
                described = typer.Option(default, flag, *(["--np"] if flag == "-np" else []), **shown)
            if stated.help:
                yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=described, annotation=type_)


def launch(context: typer.Context, **given: Any) -> None:
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
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        environ = _environ(given["cwd"])
        named = _named(context, bool(given["kind"]))
        if given["kind"]:
            fields = {name: given[name] for name in named & OF_KUBERNETES}
            typer.echo(kustomize.build(kubernetes.Job(**fields)), nl=False)
            return
        job = _job(given, environ)
        if given["dry_run"]:
            version, hidden = run.mpi_version(job, environ), run.read_secrets(job.secret)
            typer.echo("\n".join(describe.describe(job, environ, hidden, version)))
            return
        code = run.run(job, environ)
    except ValueError as error:
        typer.echo(f"distpad {error}", err=True)
        raise typer.Exit(2) from error
    raise typer.Exit(code)


_own = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
launch.__signature__ = inspect.Signature([*_own, *_parameters()])  # type: ignore[attr-defined]


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
    fields |= {name: os.path.abspath(given[name]) for name in ("log_dir", "host_discovery_script") if given[name]}
    return spec.Job(
        **{
            **fields,
            "hosts": allocation.named(hosts, hostfile, slots, environ),
            "slots_per_host": slots,
            "controller": "gloo" if given["gloo"] else "mpi" if given["mpi"] else "",
            "python": os.path.abspath(python) if os.sep in python else python,  # agents run in another folder
            "cwd": os.path.abspath(given["cwd"] or "."),
        }
    )


def _named(context: typer.Context, is_kubernetes: bool) -> set[str]:
    """Return the names of the parameters that the command line or the file gives.

    Raises:
      ValueError: flags for Kubernetes without --k8s, or other flags with it.
    """
    found = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name != "DEFAULT":
            found[parameter.name or ""] = parameter.opts[0]
    both = OF_KUBERNETES & {field.name for field in dataclasses.fields(spec.Job)} | {"config", "dry_run"}
    mismatched = found.keys() - OF_KUBERNETES - both if is_kubernetes else found.keys() & (OF_KUBERNETES - both)
    if wrong := ", ".join(flag for name, flag in found.items() if name in mismatched):
        known = sorted((OF_KUBERNETES | both) - {"kind", "command"})
        listed = ", ".join(["--k8s", *(f"--{name.replace('_', '-')}" for name in known)])
        rule = f"with --k8s, expected only {listed}. Leave out the others"
        rule = rule if is_kubernetes else "without --k8s, expected --k8s KIND, such as --k8s jobset"
        raise ValueError(f"launch: {wrong} {rule}.")
    return {*found}
