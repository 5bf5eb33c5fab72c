"""The hosts of a job: from the command line, or from the Slurm allocation of this process."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Mapping

from distpad.launcher import spec


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
      ValueError: Slurm's variables are missing, or scontrol does not expand them.
    """
    nodes, tasks = environ.get("SLURM_JOB_NODELIST", ""), environ.get("SLURM_TASKS_PER_NODE", "1")
    names = _expand(nodes)
    runs = [(int(count), int(times or 1)) for count, times in re.findall(r"(\d{1,9})(?:\(x(\d{1,9})\))?", tasks)]
    counts = (count for count, times in runs for _ in range(times))
    slots = [slots_per_host] * len(names) if slots_per_host else [*itertools.islice(counts, len(names) + 1)]
    if len(slots) != len(names):
        raise ValueError(
            f"launch: SLURM_TASKS_PER_NODE is {tasks!r}, expected numbers for {len(names)} nodes ({nodes})."
        )
    return tuple(spec.Host(name, count) for name, count in zip(names, slots))


def _expand(nodes: str) -> list[str]:
    try:
        asked = ["scontrol", "show", "hostnames", nodes]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
        names, why = found.stdout.split(), found.stderr.strip()
    except (OSError, subprocess.SubprocessError) as error:
        names, why = [], str(error)
    if not nodes or not names:  # scontrol ends with 0 even if the list is malformed
        raise ValueError(
            f"launch: the nodes of the Slurm job are {nodes!r} (SLURM_JOB_NODELIST), expected a list that scontrol "
            f"expands{f': {why}' if why else ''}. Give the hosts with -H."
        )
    return names
