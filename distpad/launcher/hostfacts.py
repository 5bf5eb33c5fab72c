"""Facts of this host, for the launcher's checks and for `distpad doctor`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import socket
from collections.abc import Iterable, Sequence
from typing import Any

from distpad.launcher import gpus, hostcheck


def facts(hosts: Sequence[str], *, gpus_too: bool = False) -> dict[str, Any]:
    """The facts that the launcher compares between hosts before a job starts."""
    return {
        "host": socket.gethostname(),
        "versions": {"Python": ".".join(platform.python_version_tuple()[:2]), **versions(hostcheck.SAME_EVERYWHERE)},
        "interfaces": interfaces(),
        "gpus": gpus.driver() if gpus_too else {},
        "resolves": names(hosts),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of the installed ones among some packages."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def interfaces() -> dict[str, list[str]]:
    """The addresses of each network interface of this host."""
    import psutil

    return {name: [each.address for each in found] for name, found in psutil.net_if_addrs().items()}


def names(hosts: Sequence[str]) -> dict[str, list[str]]:
    """The addresses to which this host resolves its own name and those of ``hosts``."""
    return {name: resolve(name) for name in dict.fromkeys([*hosts, socket.gethostname()])}


def resolve(name: str) -> list[str]:
    """The addresses to which this host resolves a name; empty if it does not resolve."""
    with contextlib.suppress(OSError):
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    return []


def find_ports(count: int, first: int | None) -> dict[str, Any]:
    """Find ``count`` free ports: consecutive ones from ``first``, or any. All stay bound until the last is found."""
    wanted = [0] * count if first is None else list(range(first, first + count))
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for port in wanted:
            each = held.enter_context(socket.socket())
            # as gRPC does: a port in TIME_WAIT counts as free
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                each.bind(("", port))
            except OSError as error:
                return {"ports": [], "taken": port, "why": error.strerror}
            found.append(each.getsockname()[1])
        return {"ports": found}
