"""Collect the facts of hosts for `distpad doctor`, through the agents that also start jobs there."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from distpad.launcher import checks, crew, facts, render, spec, times

OVERHEAD = 0.15  # fraction of the limit for ssh and start-up

CHANGED = "If the host was reinstalled: ssh-keygen -R {host}, then: ssh {host}"
NO_PYTHON = ("it has no Python at {python}", "Install one there, or choose another with --python")
NO_DISTPAD = ("distpad is not installed there for {python}", "Install it there: {python} -m pip install distpad")
# output of ssh, srun or the shell | problem, remedy
MEANINGS = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": ("its host key has changed", CHANGED),
    "Host key verification failed": ("its host key is not known here", "Verify and accept it: ssh {host}"),
    "Permission denied": ("it accepts no key of this user", "Try: ssh-copy-id {host}"),
    "Could not resolve hostname": ("its name does not resolve", "Check the spelling, the DNS and /etc/hosts"),
    "Connection refused": ("no ssh server listens there", "Check on the host: systemctl status ssh"),
    "Connection timed out": ("it does not answer", "Check that it is up and that port 22 is open"),
    "No route to host": ("there is no route to it", "Check that it is up"),
    "No module named 'distpad": NO_DISTPAD,
    "No module named distpad": NO_DISTPAD,
    "No such file or directory": NO_PYTHON,
    "not found": NO_PYTHON,
}


def ask(
    hosts: Sequence[spec.Host],
    question: checks.Question,
    *,
    python: str,
    ssh_args: Sequence[str] = (),
    limit_s: float,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, dict[str, Any]]:
    """Return the answers of all hosts by name, in the order of ``hosts``.

    Args:
      hosts: the hosts. This machine is queried without ssh, other hosts of a Slurm allocation by srun.
      question: what to check on them.
      python: the Python that has distpad installed, on all hosts.
      ssh_args: extra arguments for ssh.
      limit_s: seconds for all hosts together.
      environ: the environment of ssh, srun and the Python on this machine.

    Returns:
      For each host ``{"facts": ..., "sent": ..., "received": ...}`` (seconds of this machine's clock), or
      ``{"unreachable": WHY, "remedy": ...}``.
    """
    job = spec.Job(command=("doctor",), hosts=tuple(hosts), python=python, ssh_arg=tuple(ssh_args))
    several = [host.name for host in hosts] if len(hosts) > 1 else []
    asked = {"probes": [*facts.PROBES], "hosts": several, "ports": question.ports, "code": question.code}
    answers: dict[str, dict[str, Any]] = {host.name: {} for host in hosts}
    agents: dict[str, crew.Member] = {}
    events: queue.Queue[crew.Event] = queue.Queue()
    sent, until = time.time(), time.monotonic() + limit_s
    for host in hosts:
        argv = render.agent_argv(job, host, environ)
        try:
            env = environ if host.is_here else render.agent_env(environ)
            agents[host.name] = crew.Member(host.name, argv, env, events)
        except OSError as error:
            remedy = "Choose another one with --python." if argv[0] == python else "Install it here."
            answers[host.name] = {"unreachable": f"{argv[0]} cannot be run here: {error.strerror}", "remedy": remedy}
            continue
        orders = render.orders(job, host, {}, {}, 0)
        agents[host.name].send(**{**orders, "asked": {**asked, "limit_s": limit_s * (1 - OVERHEAD)}})
    running = {*agents}
    while running and time.monotonic() < until:
        with contextlib.suppress(queue.Empty):
            name, message = events.get(timeout=times.POLL_S)
            if message["is"] == "ready":
                found = json.loads(render.without_passwords(json.dumps(message["facts"])))
                answers[name] = {"facts": found, "sent": sent, "received": time.time()}
                agents[name].close()
            elif message["is"] == "broken":
                answers[name] = {"unreachable": message["text"], "remedy": f"Try: ssh {name} {python} -m distpad"}
            elif message["is"] == "closed":
                running.discard(name)
                answers[name] = answers[name] or unreachable(agents[name], python, message["code"], limit_s)
    for name in running:
        agents[name].kill(signal.SIGKILL)
        answers[name] = answers[name] or unreachable(agents[name], python, None, limit_s)
    return answers


def unreachable(agent: crew.Member, python: str, code: int | None, within_s: float) -> dict[str, str]:
    """Why an agent did not answer, with a remedy, derived from the output of the command that starts it.

    Args:
      agent: the agent.
      python: the Python that runs it.
      code: the command's exit code; None if it has not ended.
      within_s: the time limit.
    """
    host, wrote = agent.host, list(agent.wrote)
    for mark, meaning in MEANINGS.items():
        if mark in "\n".join(wrote):
            why, remedy = (part.format(host=host, python=python) for part in meaning)
            return {"unreachable": why, "remedy": remedy}
    why, remedy = f"it did not answer within {within_s:g} s", f"Check that this command ends: ssh {host} hostname"
    if code is not None:
        why = f"the command that starts a program there ended with exit code {code}"
        remedy = f"Try: ssh {host} {python} -m distpad"
    return {"unreachable": f"{why}: {wrote[-1].strip() if wrote else 'no output'}", "remedy": remedy}
