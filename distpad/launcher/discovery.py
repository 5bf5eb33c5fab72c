"""Discovery of the hosts of an elastic job, which may change at any time."""

from __future__ import annotations

import os
import pathlib
import threading
from collections.abc import Callable, Iterable

from distpad.launcher import outcomes, processes, spec, times


class Discovery:
    """Runs the discovery script periodically, and writes the hosts that are ready to a file for horovodrun.

    The launcher runs the script itself, in the user's environment, and horovodrun only reads the file. horovodrun would
    pass the script's path to a shell, and all variables on command lines. A host is ready when its agent is.

    Args:
      job: a job with a discovery script, or with fixed hosts.
      file: the file that horovodrun reads.
      is_ready: called with each host that the script names.
    """

    def __init__(self, job: spec.Job, file: str, is_ready: Callable[[spec.Host], bool]) -> None:
        self.job, self.file, self.is_ready = job, pathlib.Path(file), is_ready
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._repeat, daemon=True)

    def start(self) -> None:
        """Discover the hosts once, unless the job waits for hosts, and start the thread that repeats it.

        Raises:
          ValueError: the script cannot be run, or its output is malformed.
        """
        self._write([] if self.job.waits else self.discover())
        self.thread.start()

    def discover(self) -> tuple[spec.Host, ...]:
        """Return the current hosts."""
        if not self.job.host_discovery_script:
            return self.job.hosts
        script = self.job.host_discovery_script
        try:
            code, found, wrote = processes.run([script], limit_s=times.DISCOVERY_LIMIT_S)
        except OSError as error:
            raise ValueError(f"launch: --host-discovery-script {script} cannot be run: {error}") from error
        if code != 0:
            late = f"not done after {times.DISCOVERY_LIMIT_S:g} s"
            reason = late if code is None else wrote.strip() or f"exit code {code}"
            raise ValueError(f"launch: --host-discovery-script {script} failed: {reason}")
        return spec.parse_hosts(found.replace("\n", ","), self.job.slots_per_host)

    def _write(self, hosts: Iterable[spec.Host]) -> None:
        ready = [f"{host.name}:{host.slots}\n" for host in hosts if self.is_ready(host)]
        fresh = self.file.with_suffix(".new")
        fresh.write_text("".join(ready), encoding="utf-8")
        os.replace(fresh, self.file)

    def _repeat(self) -> None:
        while not self.over.wait(times.here().discovery_s):
            try:
                self._write(self.discover())
            except (ValueError, OSError, outcomes.Ended):
                continue  # keep the last known hosts

    def end(self) -> None:
        """Stop the thread and remove the file."""
        self.over.set()
        if self.thread.is_alive():
            self.thread.join(times.DISCOVERY_LIMIT_S)
        self.file.unlink(missing_ok=True)
