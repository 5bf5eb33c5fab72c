"""The hosts of an elastic job, which may change at any time.

The launcher runs the discovery script itself, in the user's environment, and horovodrun only reads a file of the hosts
whose agents are ready. horovodrun would pass the script's path to a shell, and all variables on command lines.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

from distpad.launcher import processes, spec, times


def discover(job: spec.Job) -> tuple[spec.Host, ...]:
    """Return the current hosts: those that the job's discovery script prints, or the job's fixed ones.

    Raises:
      ValueError: the script cannot be run, or its output is malformed.
    """
    script = job.host_discovery_script
    if not script:
        return job.hosts
    try:
        code, found, wrote = processes.run([script], limit_s=times.DISCOVERY_LIMIT_S)
    except OSError as error:
        raise ValueError(f"launch: --host-discovery-script {script} cannot be run: {error}") from error
    if code != 0:
        late = f"not done after {times.DISCOVERY_LIMIT_S:g} s"
        reason = late if code is None else wrote.strip() or f"exit code {code}"
        raise ValueError(f"launch: --host-discovery-script {script} failed: {reason}")
    return spec.parse_hosts(found.replace("\n", ","), job.slots_per_host)


def write(file: pathlib.Path, hosts: Iterable[spec.Host]) -> None:
    """Replace the file that horovodrun reads."""
    fresh = file.with_suffix(".new")
    fresh.write_text("".join(f"{host.name}:{host.slots}\n" for host in hosts), encoding="utf-8")
    os.replace(fresh, file)
