"""An elastic job of real workers on this machine, to which a test does what happens to such jobs."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import needs
import worlds

# Two names of one machine are two hosts. The loopback interface is named, or elastic waits for two hosts to compare.
BOTH = ("localhost:1", "127.0.0.1:1")
COOLDOWN_S = ("1", "2")  # how long a host is left alone after the first failure there, and at most
GRACE_S = 10
ROOT = pathlib.Path(__file__).resolve().parents[1]


class Job:
    """``launch/elastic.sh`` with a file of hosts that the test changes, in a ``with`` block.

    Args:
      folder: of this job, which its workers may write ``events`` to: one JSON object a line, each with "pid" and "at".
      hosts: at the start.
      arguments: what Python runs.
      on: the host of a test's cluster to start it on; None: here.
      options: further flags of ``distpad launch``.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        hosts: tuple[str, ...],
        *arguments: Any,
        on: Any = None,
        options: tuple[str, ...] = (),
        **settings: str,
    ) -> None:
        self.folder = folder
        self._begin, self._events = 0, []  # how far the file of events was read, and those
        self.list_hosts(*hosts)
        needs.program("horovodrun")
        argv = [ROOT / "launch" / "elastic.sh", "--hosts-file", folder / "hosts", "--min-np", "1"]
        argv += ["--max-np", max(2, len(hosts)), "-np", len(hosts), "--network-interface", "eth0" if on else "lo"]
        argv += ["--launcher-arg=--blacklist-cooldown-range", *(f"--launcher-arg={seconds}" for seconds in COOLDOWN_S)]
        argv += [*options, "--", sys.executable]
        environment = {**os.environ, "DISTPAD_PYTHON": sys.executable, "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment["PYTHONPATH"] = os.pathsep.join([worlds.CODE, os.environ.get("PYTHONPATH", "")])
        with (folder / "output").open("w") as output:
            self._process = (on.popen if on else subprocess.Popen)(
                [*map(str, argv), *map(str, arguments)],
                env={**environment, **settings},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        worlds.end(self._process)
        for pid in self.left():  # of a launcher that was killed, or left them
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def list_hosts(self, *hosts: str) -> None:
        """What there is from now on, ``name:slots`` each."""
        fresh = self.folder / "hosts.new"
        fresh.write_text("".join(f"{host}\n" for host in hosts))
        fresh.replace(self.folder / "hosts")  # at once: the job may read it at any time

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text(errors="replace")

    def events(self) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError), (self.folder / "events").open() as file:
            file.seek(self._begin)  # of what was not read before, since jobs may be long
            whole, newline, _ = file.read().rpartition("\n")
            self._begin += len(whole) + len(newline)  # the file is ASCII
            self._events += map(json.loads, whole.splitlines())
        return self._events

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], limit_s: float, after: float = 0.0) -> dict[str, Any]:
        """The first event of this kind that came later than ``after``; as ``wait_until``."""
        recent = lambda: (event for event in self.events() if event["at"] > after and wanted(event))
        return self.wait_until(lambda: next(recent(), None), limit_s)

    def wait_until(self, found: Callable[[], Any], limit_s: float) -> Any:
        """What is found, once it is. AssertionError, with all that was said, where it never is, or the job ends."""
        end = time.monotonic() + limit_s
        over = False
        while time.monotonic() < end and not over:
            over = self._process.poll() is not None
            result = found()
            if result:
                return result
            time.sleep(0.05)
        raise AssertionError(f"the job ended, or nothing came within {limit_s:g} s.\n{self.told()}")

    def kill(self, pid: int, number: int = signal.SIGKILL) -> float:
        """End a worker, as the kernel or a power cut does, or as who drains its node. Returns when."""
        os.kill(pid, number)
        return time.time()

    def terminate(self) -> None:
        """SIGTERM to the launcher."""
        self._process.terminate()

    def finish(self, limit_s: float) -> int:
        """Wait for the job's end, and return its exit code. AssertionError where it does not come, or leaves processes:
        those that it has told to end get a moment for it."""
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done within {limit_s:g} s.\n{self.told()}") from None
        end = time.monotonic() + GRACE_S
        while self.left() and time.monotonic() < end:
            time.sleep(0.05)
        assert not self.left(), f"{self.left()} still run.\n{self.told()}"
        return code

    def workers(self) -> dict[int, int]:
        """The processes that run Python for a rank now, by number, with the rank that they began as."""
        found = {}
        for pid in self.left():
            with contextlib.suppress(OSError):
                variables = _variables(pid)
                if os.readlink(f"/proc/{pid}/exe") == os.path.realpath(sys.executable) and "HOROVOD_RANK" in variables:
                    found[pid] = int(variables["HOROVOD_RANK"])
        return found

    def left(self) -> list[int]:
        """All processes of this job, but the launcher's own."""
        mine = str(self.folder / "hosts")
        others = (int(path.name) for path in pathlib.Path("/proc").glob("[0-9]*"))
        return [pid for pid in others if pid != self._process.pid and _variables(pid).get("DISTPAD_HOSTS_FILE") == mine]

    def told(self) -> str:
        events = "\n".join(str(event) for event in self.events()[-60:])
        return f"--- events\n{events}\n--- output\n{self.output[-8000:]}"


def _variables(pid: int) -> dict[str, str]:
    """A process's environment; nothing where it is over, or is not ours."""
    try:
        words = pathlib.Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)
