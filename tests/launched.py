"""``distpad launch`` as tests start it, here or on a host of a test's cluster, and what is left of it afterwards."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

import psutil

TESTS = pathlib.Path(__file__).resolve().parent
WORKER = TESTS / "launch" / "scripted_worker.py"
LIMIT_S = 60


class Launched:
    """A running ``distpad launch`` whose processes carry a mark, by which they are found.

    Args:
        arguments: its flags.
        command: what the workers run.
        host: the cluster's host to start it on; None: here.
        python: whose distpad it is.
    """

    def __init__(self, *arguments, command, env=None, cwd=None, host=None, python=sys.executable):
        self.mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
        argv = [python, "-m", "distpad", "launch", "--grace-s", "3", *map(str, arguments), "--", *map(str, command)]
        environment = {**os.environ, "DISTPAD_MARK": self.mark, "PYTHONPATH": str(TESTS.parent), **(env or {})}
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.began = time.monotonic()
        self.process = (host.popen if host else subprocess.Popen)(
            argv, env=environment, cwd=cwd, text=True, start_new_session=True, **streams
        )

    def left(self) -> list[str]:
        """What still runs of it, on any host."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("DISTPAD_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found

    def workers(self, count: int) -> list[int]:
        """The pids of the command, on all hosts, as soon as there are so many."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            found = []
            for process in psutil.process_iter():
                try:
                    run = process.cmdline()[:2]
                    if str(WORKER) in run and process.environ().get("DISTPAD_MARK") == self.mark:
                        found.append(process.pid)
                except psutil.Error:
                    continue
            if len(found) >= count:
                return found
            time.sleep(0.1)
        raise TimeoutError(f"no {count} workers: {found}")

    def finish(self, limit_s: float = LIMIT_S) -> Launched:
        """Wait for its end; then it has ``code``, ``stdout``, ``stderr`` and ``seconds``."""
        try:
            self.stdout, self.stderr = self.process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self.code, self.seconds = self.process.returncode, time.monotonic() - self.began
        return self


def launch(*arguments, limit_s: float = LIMIT_S, **settings) -> Launched:
    """One that has ended, and left nobody."""
    done = Launched(*arguments, **settings).finish(limit_s)
    assert done.left() == [], "somebody was left behind"
    return done


def scripted(*words, python=sys.executable) -> list:
    """The command that does what it is told: see launch/scripted_worker.py."""
    return [python, WORKER, *words]
