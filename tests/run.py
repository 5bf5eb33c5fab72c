"""Runs the test suites of both stacks in one queue, which keeps the machine's cores busy. tests/run.sh calls this.

The queue first creates the environments: in seconds if the cache has them, in minutes otherwise, because Horovod is
built. A suite starts when its environment is ready and enough cores are free. Longer suites start first, and suites
that mostly wait run beside suites that compute. The output of a suite is printed when the suite ends. A failed suite
does not stop the queue. Exit code 1 if a suite failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from typing import NamedTuple

from suites import SUITES, Suite

ROOT = pathlib.Path(__file__).resolve().parents[1]
STACKS = ("current", "classic")
OVER = 1.0  # cores to overbook, because suites also wait for other processes; with 0.5, a fifth of the cores is idle
GRACE_S = 30
SLOWEST = 10
EXAMPLES = """examples:
  tests/run.sh
  tests/run.sh --all
  tests/run.sh --stack current --suite lint single
  tests/run.sh --stack classic --suite horovod:2 mirrored:4 --all

The default suites take a quarter of an hour on two cores. As root on Debian or Ubuntu, the script installs missing
system packages. Otherwise, it prints their names and continues. With CI=true, a missing engine is a failure, not a
skipped test."""

PACKAGES = {  # shell command that succeeds if the package is installed: Debian package
    "command -v cmake": "cmake",
    "command -v g++": "g++",
    "command -v make": "make",
    "command -v patch": "patch",
    "command -v mpirun": "openmpi-bin",
    "command -v mpicxx": "libopenmpi-dev",
    "command -v ip": "iproute2",
    "command -v ssh": "openssh-client",
    "PATH=$PATH:/usr/sbin; command -v sshd": "openssh-server",
    "PATH=$PATH:/usr/sbin; command -v slurmctld": "slurm-wlm",
    "PATH=$PATH:/usr/sbin; command -v munged": "munge",
    'python3.11 -c "import venv, ensurepip"': "python3.11-venv",
}
# These variables make runs reproducible, and limit the threads per core. TensorFlow's inter-op threads are not limited,
# because collectives of several replicas block in these threads.
SETTINGS = {
    **dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"], "1"),
    **{"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONHASHSEED": "0", "MPLBACKEND": "agg"},
}


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


class Task(NamedTuple):
    """A command of the queue: a suite, or the setup of a stack's environment."""

    name: str
    stack: str
    cores: float
    limit_s: float
    command: str


class Row(NamedTuple):
    """The result of a task: a row of the table, and the seconds of each test."""

    task: Task
    result: str
    wall_s: float
    cpu_s: float
    passed: int
    failed: int
    skipped: int
    tests: list[tuple[float, str]]


class Running:
    """A task in its own session, so that a signal reaches all its processes. A file holds its output."""

    def __init__(self, task: Task, folder: pathlib.Path, environment: dict[str, str]):
        self.task, self.started = task, time.monotonic()
        name = f"{task.stack}-{task.name}"
        self.report, self.output = folder / f"{name}.xml", folder / f"{name}.out"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                ["bash", "-c", task.command],
                cwd=ROOT,
                env={**environment, "REPORT": str(self.report)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.terminated: float | None = None  # time of SIGTERM

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def poll(self) -> Row | None:
        """Return the row of an ended task, else None. After the time limit, send SIGTERM, and later SIGKILL."""
        now = time.monotonic()
        if self.terminated is None and now > self.started + self.task.limit_s:
            self.terminated = now
            self.signal(signal.SIGTERM)
        elif self.terminated is not None and now > self.terminated + GRACE_S:
            self.signal(signal.SIGKILL)
        done, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not done:
            return None
        self.process.returncode = code = os.waitstatus_to_exitcode(status)
        self.signal(signal.SIGKILL)  # processes that the task left behind
        result = "TIMED OUT" if self.terminated is not None else "passed" if code == 0 else "FAILED"
        counts, tests = read_report(self.report, result == "passed")
        return Row(self.task, result, now - self.started, usage.ru_utime + usage.ru_stime, *counts, tests)


def read_report(path: pathlib.Path, passed: bool) -> tuple[tuple[int, int, int], list[tuple[float, str]]]:
    """Return the passed, failed and skipped tests, and the seconds of each. Without a pytest report, count one test."""
    try:
        root = ET.parse(path).getroot()
    except (OSError, ET.ParseError):
        return (int(passed), int(not passed), 0), []
    total, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in root.iter("testsuite"))
        for key in ("tests", "failures", "errors", "skipped")
    )
    # pytest can fail without a failed test (no test collected, or interrupted). This counts as one failed test.
    failed = max(failures + errors, int(not passed))
    tests = [
        (float(case.get("time", 0)), f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}")
        for case in root.iter("testcase")
    ]
    return (max(total - failures - errors - skipped, 0), failed, skipped), tests


class Queue:
    """Runs tasks in parallel. The running tasks keep at most ``cores + OVER`` cores busy."""

    def __init__(self, cores: float, folder: pathlib.Path, environment: dict[str, str]):
        self.cores, self.folder, self.environment = cores, folder, environment
        self.waiting: list[Task] = []
        self.running: list[Running] = []
        self.rows: list[Row] = []
        self.programs: dict[str, str] = {}  # the bin folder of each stack whose environment is ready
        self.began = time.monotonic()
        # The received signal. An exception in the handler could lose a process that is starting.
        self.received = 0

    def receive(self, number: int, _: object) -> None:
        self.received = number

    def run(self) -> None:
        while (self.waiting or self.running) and not self.received:
            self.start()
            time.sleep(0.1)
            for each in list(self.running):
                row = each.poll()
                if row:
                    self.running.remove(each)
                    self.finish(each, row)

    def start(self) -> None:
        """Start each waiting task with an environment and enough free cores. Large tasks do not block small ones."""
        for task in list(self.waiting):
            busy = sum(each.task.cores for each in self.running)
            making = task.name == "setup"
            if (making or task.stack in self.programs) and (not self.running or busy + task.cores <= self.cores + OVER):
                self.waiting.remove(task)
                path = os.pathsep.join([*filter(None, [self.programs.get(task.stack)]), os.environ["PATH"]])
                self.running.append(Running(task, self.folder, {**self.environment, "PATH": path}))
                minutes = (time.monotonic() - self.began) / 60
                say(f"{task.stack} {task.name}: started after {minutes:.1f} minutes; {len(self.waiting)} waiting")

    def finish(self, ended: Running, row: Row) -> None:
        task = row.task
        say(f"{task.stack} {task.name}: {row.result}; {task.command}")
        output = ended.output.read_text(errors="replace")
        print(output, flush=True)
        self.rows.append(row)
        if task.name != "setup":
            return
        if row.result == "passed":
            self.programs[task.stack] = str(pathlib.Path(output.strip().splitlines()[-1]).parent)
        else:
            self.waiting = [each for each in self.waiting if each.stack != task.stack]

    def end(self) -> None:
        for each in self.running:
            each.signal(signal.SIGTERM)
        limit = time.monotonic() + GRACE_S
        while self.running and time.monotonic() < limit:
            self.running = [each for each in self.running if each.poll() is None]
            time.sleep(0.05)
        for each in self.running:
            each.signal(signal.SIGKILL)


def install_packages() -> None:
    """Install missing Debian packages. If this is impossible, print their names and continue."""
    check = lambda probe: subprocess.run(["bash", "-c", probe], stdin=subprocess.DEVNULL, capture_output=True)
    missing = [package for probe, package in PACKAGES.items() if check(probe).returncode]
    if not missing:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        command = f"sudo apt-get install -y {' '.join(missing)}"
        say(f"continuing without these packages: {' '.join(missing)}. On Debian and Ubuntu: {command}")
        return
    say(f"installing {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = lambda *words: subprocess.run(
        ["apt-get", "-qq", *words], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    apt("update")
    for package in missing:  # one by one, because apt-get installs nothing if it does not know one of the names
        done = apt("install", "-y", "--no-install-recommends", package)
        if done.returncode:
            print(
                f"{done.stderr[-500:]}apt-get could not install {package}: continuing without this package", flush=True
            )


def tasks_of(chosen: list[Suite], every: bool) -> list[Task]:
    """Return the setup tasks, and then the suites, the longest first."""
    tasks = []
    for stack in STACKS:
        names = {suite.name for suite in chosen if suite.stack == stack}
        if names:
            flags = "--tests" if names == {"lint"} else "--tests --horovod"
            tasks.append(Task("setup", stack, 1, 3600, f"launch/environment.sh {stack} {flags}"))
    for suite in sorted(chosen, key=lambda suite: -suite.seconds):
        command = (every and suite.under_all) or suite.command
        tasks.append(Task(suite.name, suite.stack, suite.cores, 60 * suite.limit, command))
    return tasks


def summarise(rows: list[Row], minutes: float) -> int:
    """Print a table of the suites, sorted by CPU time, and the slowest tests. Return exit code 1 if a test failed."""
    say("results")
    print(
        f"{'stack':8} {'suite':14} {'result':10} {'min:s':>6} {'CPU s':>6} {'passed':>7} {'failed':>7} {'skipped':>8}"
    )
    line = "{:8} {:14} {:10} {:3.0f}:{:02.0f} {:6.0f} {:7} {:7} {:8}"
    for row in sorted(rows, key=lambda row: -row.cpu_s):
        counts = (0, row.failed, 0) if row.task.name == "setup" else (row.passed, row.failed, row.skipped)
        print(line.format(row.task.stack, row.task.name, row.result, *divmod(int(row.wall_s), 60), row.cpu_s, *counts))
    tests = sorted(((s, name, row.task) for row in rows for s, name in row.tests), key=lambda test: -test[0])
    if tests:
        print("\nslowest tests (seconds)")
    for seconds, name, task in tests[:SLOWEST]:
        print(f"{seconds:6.1f}  {task.stack} {task.name}  {name}")
    passed = sum(row.passed for row in rows if row.task.name != "setup")
    failed, skipped = sum(row.failed for row in rows), sum(row.skipped for row in rows)
    print(f"\nminutes: {minutes:.1f}; CPU seconds: {sum(row.cpu_s for row in rows):.0f}")
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return int(failed > 0)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/run.sh",
        description=__doc__.split("\n", 2)[2],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(dict.fromkeys(suite.name for suite in SUITES))
    add = parser.add_argument
    add("--all", action="store_true", help="also run slow suites: all engines in full, mutants, benchmarks, Open MPI 5")
    add("--stack", choices=[*STACKS, "all"], default="all", help="stack to test (default: all)")
    add("--suite", nargs="+", choices=names, default=names, metavar="NAME", help="run only these suites")
    add("--jobs", type=float, default=os.cpu_count(), metavar="CORES", help="number of cores to use (default: all)")
    add("--list", action="store_true", help="print the suites and their commands, then exit")
    found = parser.parse_args(words)
    if found.jobs <= 0:
        parser.error(f"--jobs is {found.jobs:g}, expected more than 0")
    found.suites = [
        suite
        for suite in SUITES
        if suite.name in found.suite and found.stack in ("all", suite.stack) and (found.all or suite.command)
    ]
    if not found.suites:
        stacks = "either stack" if found.stack == "all" else f"stack {found.stack}"
        parser.error(f"--suite names no suite of {stacks}, or only suites that need --all. See --list --all")
    return found


def main(words: list[str]) -> int:
    asked = parse(words)
    tasks = tasks_of(asked.suites, asked.all)
    if asked.list:
        for task in tasks:
            print(f"{task.stack:8} {task.name:14} {task.cores:4g} cores  {task.command}")
        return 0
    began = time.monotonic()
    install_packages()
    environment = {**os.environ, **SETTINGS, "DISTPAD_TESTS": "all" if asked.all else "default"}
    given = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "quick"), *([given] if given else [])])
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # each process would compile distpad and the tests again
    if environment.get("CI") == "true":
        environment["DISTPAD_CI"] = "1"
    with tempfile.TemporaryDirectory(prefix="distpad-tests.") as folder:
        queue = Queue(asked.jobs, pathlib.Path(folder), environment)
        queue.waiting = tasks
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, queue.receive)
        try:
            queue.run()
        finally:
            queue.end()
        if queue.received:
            return 128 + queue.received
        return summarise(queue.rows, (time.monotonic() - began) / 60)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
