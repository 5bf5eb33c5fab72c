"""Probes of the network: names as this host sees them, free ports, and the cluster that TF_CONFIG tells of."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any

from distpad.launcher import agent


def names(hosts: Sequence[str]) -> dict[str, list[str]]:
    """The addresses that hosts' names, and this host's own, lead to from here; none for a name that nobody knows."""
    return {name: agent.resolve(name) for name in dict.fromkeys([*hosts, socket.gethostname()])}


def ports(wanted: Sequence[int]) -> dict[str, str]:
    """Why a port cannot be had here, by its number; empty where it is free."""
    found = {port: agent.find_ports(1, port) for port in wanted}
    return {str(port): answer.get("why", "") for port, answer in found.items()}


def tf_config(text: str | None) -> dict[str, Any] | None:
    """What TF_CONFIG tells: its cluster and task, or why it tells nothing; None where it is not set.

    >>> tf_config("{'cluster': {}}")["error"]
    'it is no JSON: Expecting property name enclosed in double quotes at character 1'
    """
    if not text:
        return None
    try:
        config = json.loads(text)
        cluster, task = config.get("cluster") or {}, config.get("task") or {}
        addresses = {kind: list(each) for kind, each in cluster.items()}
        found: dict[str, Any] = {"cluster": addresses, "task": {"type": task.get("type"), "index": task.get("index")}}
    except json.JSONDecodeError as error:
        return {"error": f"it is no JSON: {error.msg} at character {error.pos}"}
    except (AttributeError, TypeError):
        return {"error": 'it has another form than {"cluster": {"worker": [...]}, "task": {"type": ..., "index": ...}}'}
    mine = addresses.get(str(task.get("type")), [])
    index = int(task["index"]) if str(task.get("index")).isdecimal() else -1
    if 0 <= index < len(mine):
        found["address"] = str(mine[index])
        found["is_here"] = _is_here(found["address"].rpartition(":")[0])
    return found


def _is_here(name: str) -> bool:
    """Whether a name leads to an address of this machine: one can listen at those alone."""
    for address in agent.resolve(name):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as tried:
            try:
                tried.bind((address, 0))
                return True
            except OSError:
                continue
    return False
