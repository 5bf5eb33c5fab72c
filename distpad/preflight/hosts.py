"""Collect the facts of all hosts in parallel, within a time limit. Unreachable hosts get a reason and a remedy."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distpad.launcher import hostcheck, processes, render, spec

AT_ONCE = 32  # hosts
OVERHEAD = 0.15  # fraction of the limit for ssh and start-up


def ask(
    hosts: Sequence[spec.Host],
    question: Mapping[str, Any],
    *,
    python: str,
    ssh_args: Sequence[str] = (),
    limit_s: float,
    environ: Mapping[str, str] = os.environ,
    on_answer: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, Any]]:
    """Return the answers of all hosts by name, in the order of ``hosts``.

    Args:
      hosts: the hosts. This machine is queried without ssh, other hosts of a Slurm allocation by srun.
      question: the input of facts.py, sent over standard input.
      python: the Python that has distpad installed, on all hosts.
      ssh_args: extra arguments for ssh.
      limit_s: seconds for all hosts together.
      environ: the environment of ssh, srun and the Python on this machine.
      on_answer: called with the name of each host that is done, from any thread.

    Returns:
      For each host ``{"facts": ..., "sent": ..., "received": ...}`` (seconds of this machine's clock), or
      ``{"unreachable": WHY, "remedy": ...}``.
    """
    asked = json.dumps({**question, "limit_s": limit_s * (1 - OVERHEAD)})

    def one(host: spec.Host) -> dict[str, Any]:
        program = [python, "-m", "distpad.preflight.facts"]
        argv = render.remote_argv(program, host, environ, ssh_args, by_srun="SLURM_JOB_ID" in environ)
        env = dict(environ) if host.is_here else render.agent_env(environ)
        answer = _run(argv, asked, env, limit_s, host.name, python)
        on_answer(host.name)
        return answer

    with concurrent.futures.ThreadPoolExecutor(min(AT_ONCE, len(hosts))) as pool:
        return dict(zip([host.name for host in hosts], pool.map(one, hosts)))


def _run(argv: list[str], asked: str, env: Mapping[str, str], limit_s: float, host: str, python: str) -> dict[str, Any]:
    sent = time.time()
    try:
        code, output, wrote = processes.run(argv, text=asked, env=env, limit_s=limit_s)
    except OSError as error:
        remedy = "Choose another one with --python." if argv[0] == python else "Install it here."
        return {"unreachable": f"{argv[0]} cannot be run here: {error.strerror}", "remedy": remedy}
    for line in output.splitlines():  # a login script may write as well
        with contextlib.suppress(json.JSONDecodeError):
            facts = json.loads(line)
            if isinstance(facts, dict) and "errors" in facts:
                return {"facts": facts, "sent": sent, "received": time.time()}
    why, remedy = hostcheck.why_silent(host, python, wrote.splitlines(), code, limit_s)
    return {"unreachable": why, "remedy": remedy}
