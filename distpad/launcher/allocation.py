"""The hosts of a job: from the command line, or from the Slurm allocation of this process."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from distpad.launcher import nodelist, spec


def named(listed: str, hostfile: str, slots_per_host: int | None, environ: Mapping[str, str]) -> tuple[spec.Host, ...]:
    """Return the hosts of ``-H`` or ``--hostfile``; by default those of the allocation, or none.

    Raises:
      ValueError: both are given, or one is malformed.
    """
    if listed and hostfile:
        raise ValueError("launch: both -H and --hostfile are given, expected one of them.")
    if hostfile:
        return spec.read_hostfile(hostfile, slots_per_host)
    if listed:
        return spec.parse_hosts(listed, slots_per_host)
    if "SLURM_JOB_ID" in environ:
        return hosts(environ, slots_per_host)
    return ()


def hosts(environ: Mapping[str, str], slots_per_host: int | None = None) -> tuple[spec.Host, ...]:
    """Return the allocation's nodes. Each has as many slots as the job has tasks there.

    Args:
      environ: Slurm's variables.
      slots_per_host: overrides Slurm's numbers of tasks.

    Raises:
      ValueError: Slurm's variables are missing or malformed.
    """
    nodes = environ.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise ValueError(
            "launch: SLURM_JOB_ID is set, but SLURM_JOB_NODELIST is not, expected both. Give the hosts with -H."
        )
    names = _ask_scontrol(nodes) or nodelist.slurm_hostnames(nodes)
    tasks = environ.get("SLURM_TASKS_PER_NODE", "1")
    slots = [slots_per_host] * len(names) if slots_per_host else nodelist.slurm_tasks_per_node(tasks)
    if len(slots) != len(names):
        raise ValueError(
            f"launch: SLURM_TASKS_PER_NODE is {tasks!r}, expected numbers for {len(names)} nodes ({nodes})."
        )
    return tuple(spec.Host(name, count) for name, count in zip(names, slots))


def _ask_scontrol(nodes: str) -> list[str]:
    """Expand a list of nodes with scontrol; empty if scontrol is not available, as in a container."""
    try:
        asked = ["scontrol", "show", "hostnames", nodes]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return found.stdout.split()
