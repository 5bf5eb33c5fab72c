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
                answers[name] = answers[name] or crew.unreachable(agents[name], python, message["code"], limit_s)
    for name in running:
        agents[name].kill(signal.SIGKILL)
        answers[name] = answers[name] or crew.unreachable(agents[name], python, None, limit_s)
    return answers
