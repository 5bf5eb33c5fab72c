"""Print the facts of this machine as JSON.

    echo '{"hosts": ["host2"], "ports": [2222], "limit_s": 60}' | python -m distpad.preflight.facts

All probes share a time limit. The error of a failed probe is a fact as well, and the other probes continue.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from distpad.launcher import gpus, hostfacts, render
from distpad.preflight import machine, network, software

Probe = Callable[[dict[str, Any]], Any]

PROBES: dict[str, Probe] = {
    "machine": lambda asked: machine.machine(),
    "gpus": lambda asked: {**gpus.driver(), "wheels": gpus.packages()},
    "shared_memory": lambda asked: machine.shared_memory(),
    "environment": lambda asked: machine.environment(),
    "python": lambda asked: software.python(),
    "packages": lambda asked: hostfacts.versions(software.PACKAGES),
    "engines": lambda asked: software.engines(0.8 * asked["limit_s"]),
    "mpi": lambda asked: software.mpi(),
    "distpad": lambda asked: software.own_code(),
    "code": lambda asked: software.code(asked["code"]) if asked.get("code") else None,
    "names": lambda asked: hostfacts.names(asked.get("hosts", [])),
    "ports": lambda asked: network.ports(asked.get("ports", [])),
    "tf_config": lambda asked: network.tf_config(os.environ.get("TF_CONFIG")),
}


def collect(asked: dict[str, Any], probes: dict[str, Probe] = PROBES) -> dict[str, Any]:
    """Run all probes in parallel.

    Args:
      asked: ``limit_s``: seconds for all probes; ``hosts``: names to resolve; ``ports``: port numbers to test;
        ``code``: a folder whose Python files are compared.
      probes: functions by name. Their results must be JSON.

    Returns:
      The results of successful probes by name; ``errors``: the messages of failed probes by name; ``host``: this
      host's own name; ``time``: the time of the answer, in seconds of this host's clock.
    """
    asked = {"limit_s": 60.0, **asked}
    found: dict[str, Any] = {}
    errors: dict[str, str] = {}

    def run(name: str, probe: Probe) -> None:
        try:
            found[name] = probe(asked)
        except Exception as error:  # any error is a fact
            errors[name] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=run, args=item, name=item[0], daemon=True) for item in probes.items()]
    until = time.monotonic() + asked["limit_s"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            errors[thread.name] = f"not done after {asked['limit_s']:g} s"
    done = {name: found[name] for name in probes if name in found and name not in errors}
    return {"host": socket.gethostname(), "time": time.time(), **done, "errors": dict(errors)}


def main() -> None:
    """Read the question from standard input and print the facts on one line."""
    facts = collect(json.loads(sys.stdin.read() or "{}"))
    print(render.without_passwords(json.dumps(facts)), flush=True)
    os._exit(0)  # a probe that hangs must not keep the process


if __name__ == "__main__":
    main()
