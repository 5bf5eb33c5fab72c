"""Probes of the network: free ports, and the cluster in TF_CONFIG."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any

from distpad.launcher import hostfacts


def ports(wanted: Sequence[int]) -> dict[str, str]:
    """For each port, the reason why it cannot be bound here; empty if it is free."""
    found = {port: hostfacts.find_ports(1, port) for port in wanted}
    return {str(port): answer.get("why", "") for port, answer in found.items()}


def tf_config(text: str | None) -> dict[str, Any] | None:
    """The cluster and task in TF_CONFIG, or the error in it; None if it is not set.

    >>> tf_config("{'cluster': {}}")["error"]
    'it is not JSON: Expecting property name enclosed in double quotes at character 1'
    """
    if not text:
        return None
    try:
        config = json.loads(text)
        cluster, task = config.get("cluster") or {}, config.get("task") or {}
        addresses = {kind: list(each) for kind, each in cluster.items()}
        found: dict[str, Any] = {"cluster": addresses, "task": {"type": task.get("type"), "index": task.get("index")}}
    except json.JSONDecodeError as error:
        return {"error": f"it is not JSON: {error.msg} at character {error.pos}"}
    except (AttributeError, TypeError):
        return {
            "error": 'it does not have the form {"cluster": {"worker": [...]}, "task": {"type": ..., "index": ...}}'
        }
    mine = addresses.get(str(task.get("type")), [])
    index = int(task["index"]) if str(task.get("index")).isdecimal() else -1
    if 0 <= index < len(mine):
        found["address"] = str(mine[index])
        found["is_here"] = _is_here(found["address"].rpartition(":")[0])
    return found


def _is_here(name: str) -> bool:
    """Whether a name resolves to an address of this machine. Only its own addresses can be bound."""
    for address in hostfacts.resolve(name):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as tried:
            try:
                tried.bind((address, 0))
                return True
            except OSError:
                continue
    return False
