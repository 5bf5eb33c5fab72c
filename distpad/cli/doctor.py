"""``distpad doctor``: find the problems of a set of hosts before a job starts on them."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import rich.box
import rich.console
import rich.table
import typer
from rich import markup

import distpad
from distpad.launcher import allocation, checks, hosts, render, spec

WIDTH = 100  # columns, if the terminal does not report its width
MARKS = {checks.ERROR: "[bold red]✗[/]", checks.WARNING: "[yellow]![/]"}
# row of the summary | function that reads its value from the facts
ROWS = {
    "Python": lambda facts: facts["python"]["version"],
    "TensorFlow": lambda facts: _tensorflow(facts["engines"].get("tensorflow") or {}),
    "Keras": lambda facts: facts["packages"].get("keras", ""),
    "Addons": lambda facts: facts["packages"].get("tensorflow-addons", ""),
    "NumPy": lambda facts: facts["packages"].get("numpy", ""),
    "Horovod": lambda facts: _horovod(facts),
    "MPI": lambda facts: (facts["mpirun"] or {}).get("version", ""),
    "NCCL": lambda facts: next((v for name, v in facts["packages"].items() if "nccl" in name), ""),
    "distpad": lambda facts: facts["packages"].get("distpad", ""),
    "GPUs": lambda facts: _gpus(facts["gpus"]),
    "cores, memory": lambda facts: f"{facts['machine']['cores']}, {facts['machine']['memory'] / 2**30:.0f} GB",
    "/dev/shm": lambda facts: f"{facts['shared_memory']['size'] / 2**30:.1f} GB",
    "managed by": lambda facts: ", ".join(facts["machine"]["managed_by"]),
}


def doctor(
    host: str = typer.Option("", "-H", "--hosts", metavar="HOST:SLOTS,...", help="The hosts to check. Default: this machine, or the Slurm allocation."),
    hostfile: str = typer.Option("", help="A file with the hosts, one line 'name slots=N' per host."),
    port: list[int] = typer.Option([], min=1, max=65535, help="A port that must be free on each host. Repeatable."),
    code: str = typer.Option("", metavar="FOLDER", help="Also compare the Python files in this folder."),
    python: str = typer.Option(sys.executable, help="The Python that has distpad installed, on all hosts.", show_default=False),
    ssh_arg: list[str] = typer.Option([], metavar="ARG", help="An extra argument for ssh, such as -p2222. Repeatable."),
    timeout_s: float = typer.Option(90.0, min=1, help="Time limit for all hosts together, in seconds."),
    as_json: bool = typer.Option(False, "--json", help="Print all facts and findings as JSON, for a bug report."),
) -> None:  # fmt: skip
    """Check hosts for problems that would keep a job from running, with a remedy for each.

    It checks versions and builds, GPUs, shared memory and TF_CONFIG. With several hosts, it
    also checks ssh, names, ports and clocks, and compares software and code between them.
    It changes nothing and prints no secret.

    Examples:

      distpad doctor

      distpad doctor -H node1:4,node2:4 --code . --port 2222

      distpad doctor --hostfile hosts --json > report.json

    Exit codes: 0 no error, though perhaps warnings; 1 errors; 2 wrong usage.
    """
    try:
        given = allocation.named(host, hostfile, None, os.environ) or (spec.Host("localhost"),)
    except ValueError as error:
        typer.echo(f"distpad {str(error).replace('launch:', 'doctor:', 1)}", err=True)
        raise typer.Exit(2) from error
    named = tuple({each.name: each for each in given}.values())
    slots, folder = {each.name: each.slots for each in named}, os.path.abspath(code) if code else ""
    question = checks.Question(slots, slots_given=":" in host or bool(hostfile), ports=tuple(port), code=folder)
    python = os.path.abspath(python) if os.sep in python else python  # agents run in another folder
    environ = render.absolute_paths(os.environ)
    with rich.console.Console(stderr=True).status(f"asking {', '.join(question.slots)} ..."):  # on a terminal alone
        answers = hosts.ask(named, question, python=python, ssh_args=ssh_arg, limit_s=timeout_s, environ=environ)
    found = checks.check(answers, question)
    if as_json:
        report: dict[str, Any] = {"distpad": distpad.__version__, "asked": dataclasses.asdict(question)}
        report |= {"hosts": answers, "findings": [dataclasses.asdict(finding) for finding in found]}
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _show(answers, found)
    raise typer.Exit(int(any(finding.state == checks.ERROR for finding in found)))


def _show(answers: Mapping[str, Mapping[str, Any]], found: list[checks.Finding]) -> None:
    knows_width = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    console = rich.console.Console(highlight=False, width=None if knows_width else WIDTH)
    facts = {host: answer["facts"] for host, answer in answers.items() if "facts" in answer}
    if facts:
        console.print(_summary(facts))
    wrong = _merged([finding for finding in found if finding.state != checks.OK])
    if wrong:
        console.print(_table(wrong))
    console.print(_verdict(found, len(answers)))


def _summary(facts: Mapping[str, Mapping[str, Any]]) -> rich.table.Table:
    """The facts as a table. Hosts with equal facts share a column."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for host, each in facts.items():
        groups.setdefault(tuple(_cell(name, each) for name in ROWS), []).append(host)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column()
    for names in groups.values():
        shown = ", ".join(names) if len(names) < 4 else f"{names[0]} ... {names[-1]} ({len(names)})"
        table.add_column(shown, overflow="fold")
    for name, cells in zip(ROWS, zip(*groups)):
        if any(cells):
            table.add_row(f"[bold]{name}[/]" if len(set(cells)) > 1 else name, *map(markup.escape, cells))
    return table


def _cell(name: str, facts: Mapping[str, Any]) -> str:
    try:
        return str(ROWS[name](facts))
    except KeyError:  # the probe failed; a finding reports why
        return "?"


def _tensorflow(engine: Mapping[str, Any]) -> str:
    if "error" in engine or not engine:
        return "does not load"
    built = f"CUDA {engine['cuda']}, cuDNN {engine['cudnn']}" if engine["for_gpus"] else "for the CPU"
    return f"{engine['version']}, {built}"


def _gpus(driver: Mapping[str, Any]) -> str:
    kinds = collections.Counter(driver["names"])
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or str(driver["devices"] or "none")


def _horovod(facts: Mapping[str, Any]) -> str:
    version, engine = facts["packages"].get("horovod", ""), facts["engines"].get("horovod") or {}
    if not version:
        return ""
    return f"{version}, " + (f"with {', '.join(engine['built_with'])}" if "built_with" in engine else "does not load")


def _merged(wrong: list[checks.Finding]) -> list[checks.Finding]:
    """Merge equal findings of several hosts into one row."""
    rows: dict[checks.Finding, list[str]] = {}
    for finding in wrong:
        rows.setdefault(dataclasses.replace(finding, host=""), []).append(finding.host)
    return [dataclasses.replace(row, host=", ".join(names)) for row, names in rows.items()]


def _table(wrong: list[checks.Finding]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, leading=1)
    table.add_column("")
    table.add_column("host", overflow="fold", max_width=24)
    table.add_column("problem", ratio=5, overflow="fold")
    table.add_column("remedy", ratio=4, overflow="fold")
    for finding in wrong:
        evidence = f"[bold]{finding.what}[/]: {markup.escape(finding.evidence)}"
        table.add_row(MARKS[finding.state], markup.escape(finding.host), evidence, markup.escape(finding.remedy))
    return table


def _verdict(found: list[checks.Finding], number: int) -> str:
    errors, warnings, passed = (sum(f.state == s for f in found) for s in (checks.ERROR, checks.WARNING, checks.OK))
    where = f"{number} host{'s' * (number != 1)}, {passed} of {len(found)} checks passed"
    few = [f"{count} {what}{'s' * (count != 1)}" for count, what in ((errors, "error"), (warnings, "warning")) if count]
    if errors:
        return f"[bold red]{few[0]}[/]{', '.join(['', *few[1:]])} ({where})"
    return f"[yellow]{few[0]}[/], no error ({where})" if warnings else f"[green]no problems[/] ({where})"
