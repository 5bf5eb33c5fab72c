"""The hosts of an elastic job, which may be others each second."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable

from distpad.launcher import outcomes, spec, times


class Discovery:
    """Asks for the hosts, and lists those that are ready where horovodrun reads them.

    The script runs here, in the user's environment, and horovodrun only reads its answer: it would give the script's
    path to a shell, and all variables to whoever reads command lines. A host is listed when its agent is ready.

    Args:
      job: with a script, or with hosts that stay.
      file: what horovodrun reads.
      welcome: called with each host that is found; says whether it is ready.
    """

    def __init__(self, job: spec.Job, file: str, welcome: Callable[[spec.Host], bool]) -> None:
        self.job, self.file, self.welcome = job, pathlib.Path(file), welcome
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._ask_again, daemon=True)

    def start(self) -> None:
        """Ask for the first time, and go on asking.

        Raises:
          ValueError: the script cannot be run, or prints what names no hosts.
        """
        self._list(self.ask())
        self.thread.start()

    def ask(self) -> tuple[spec.Host, ...]:
        """The hosts that there are now."""
        if not self.job.host_discovery_script:
            return self.job.hosts
        script = self.job.host_discovery_script
        try:
            with subprocess.Popen(
                [script],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is not for it, and what it started itself ends with it
            ) as process:
                try:
                    found, said = process.communicate(timeout=times.DISCOVERY_LIMIT_S)
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError) as error:
            raise ValueError(f"launch: --host-discovery-script {script} cannot be run: {error}") from error
        if process.returncode:
            said = said.strip() or f"exit code {process.returncode}"
            raise ValueError(f"launch: --host-discovery-script {script} failed: {said}")
        return spec.parse_hosts(found.replace("\n", ","), self.job.slots_per_host)

    def _list(self, hosts: Iterable[spec.Host]) -> None:
        ready = [f"{host.name}:{host.slots}\n" for host in hosts if self.welcome(host)]
        fresh = self.file.with_suffix(".new")
        fresh.write_text("".join(ready), encoding="utf-8")
        os.replace(fresh, self.file)

    def _ask_again(self) -> None:
        while not self.over.wait(times.here().discovery_s):
            try:
                self._list(self.ask())
            except (ValueError, OSError, outcomes.Ended):
                continue  # what was known stays

    def end(self) -> None:
        """Stop asking."""
        self.over.set()
        if self.thread.is_alive():
            self.thread.join(times.DISCOVERY_LIMIT_S)
        self.file.unlink(missing_ok=True)
