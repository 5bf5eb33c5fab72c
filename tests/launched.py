"""``distpad launch`` as tests start it, here or on a host of a test's cluster, and what is left of it afterwards."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import psutil

from worlds import CODE

TESTS = pathlib.Path(__file__).resolve().parent
WORKER = TESTS / "launch" / "scripted_worker.py"
LIMIT_S = 120  # for a busy machine; what is usual is a fiftieth of it
MARKS = tempfile.TemporaryDirectory(prefix="distpad-marks-")
QUICK = {"DISTPAD_TIME_SCALE": "0.2"}  # the launcher's own patience: distpad/launcher/times.py


def until(happened: Callable[[], Any], limit_s: float = LIMIT_S, look_s: float = 0.1) -> Any:
    """Wait for something that is true. Returns what it was last, so that a test asserts it where the time is over."""
    end = time.monotonic() + limit_s
    while not (found := happened()) and time.monotonic() < end:
        time.sleep(look_s)
    return found


class Launched:
    """A running ``distpad launch`` whose processes carry a mark, by which they are found.

    Args:
        arguments: its flags.
        command: what the workers run.
        host: the cluster's host to start it on; None: here.
        python: whose distpad it is.
        under: a program that starts it, such as nohup.
    """

    def __init__(self, *arguments, command, env=None, cwd=None, host=None, python=sys.executable, under=()):
        self.mark = tempfile.mkdtemp(dir=MARKS.name)  # where scripted workers say that they are up
        call = [python, "-m", "distpad", "launch", "--grace-s", "1", *map(str, arguments), "--", *map(str, command)]
        argv = [*under, *call]
        given = {"DISTPAD_MARK": self.mark, "PYTHONPATH": CODE, **QUICK, **(env or {})}
        environment = {**os.environ, **given}
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.began = time.monotonic()
        self.process = (host.popen if host else subprocess.Popen)(
            argv, env=environment, cwd=cwd, text=True, errors="surrogateescape", start_new_session=True, **streams
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
        """The pids of scripted workers, on all hosts, as soon as so many have come to their last word and wait."""
        end = time.monotonic() + LIMIT_S
        while len(found := os.listdir(self.mark)) < count:
            if time.monotonic() > end or self.process.poll() is not None:
                raise TimeoutError(f"no {count} workers: {found}, {self.finish(1).stderr}")
            time.sleep(0.05)
        return [int(name) for name in found]

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
