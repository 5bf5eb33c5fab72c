"""The test suites of both stacks in one queue, which keeps the machine's cores busy: tests/run.sh runs this.

Makes the environments (seconds where the cache is warm; the first time minutes, most of them building Horovod) and
starts a suite as soon as its own is there: the longest first, what mostly waits beside what computes. What a suite
prints is shown when it ends. Goes on after a failed suite; exit code 1 where any failed.
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
OVER = 1.0  # cores by which the queue may overbook: what waits for another's answer leaves as much (0.5: a fifth idle)
GRACE_S = 30
SLOWEST = 10
EXAMPLES = """examples:
  tests/run.sh
  tests/run.sh --all
  tests/run.sh --stack current --suite lint single
  tests/run.sh --stack classic --suite horovod:2 mirrored:4 --all

By default it takes a quarter of an hour on two cores. As root on Debian or Ubuntu it installs missing packages;
otherwise it names them and goes on. With CI=true an engine that is missing is a failure, not a skipped test."""

PACKAGES = {  # what tells that it is here: the Debian package that brings it
    "command -v cmake": "cmake",
    "command -v g++": "g++",
    "command -v make": "make",
    "command -v mpirun": "openmpi-bin",
    "command -v mpicxx": "libopenmpi-dev",
    "command -v ip": "iproute2",
    "command -v ssh": "openssh-client",
    "PATH=$PATH:/usr/sbin; command -v sshd": "openssh-server",
    "PATH=$PATH:/usr/sbin; command -v slurmctld": "slurm-wlm",
    "PATH=$PATH:/usr/sbin; command -v munged": "munge",
    'python3.11 -c "import venv, ensurepip"': "python3.11-venv",
}
# What makes two runs alike, and keeps two cores from being shared by dozens of threads. TensorFlow's inter-op threads
# stay as they are: collectives of several replicas block in them.
SETTINGS = {
    **dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"], "1"),
    **{"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONHASHSEED": "0", "MPLBACKEND": "agg"},
}


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


class Task(NamedTuple):
    """What the queue runs: a suite, or the making of a stack's environment."""

    name: str
    stack: str
    cores: float
    limit_s: float
    command: str


class Row(NamedTuple):
    """What became of a task: a row of the table, and the seconds of each of its tests."""

    task: Task
    result: str
    wall_s: float
    cpu_s: float
    passed: int
    failed: int
    skipped: int
    tests: list[tuple[float, str]]


class Running:
    """A task in a session of its own, so that all of it can be ended; its output waits in a file."""

    def __init__(self, task: Task, folder: pathlib.Path, environment: dict[str, str]):
        self.task, self.started = task, time.monotonic()
        place = folder / f"{task.stack}-{task.name}"
        self.report, self.output = place.with_name(f"{place.name}.xml"), place.with_name(f"{place.name}.out")
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
        self.told: float | None = None  # when it was told to end

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def poll(self) -> Row | None:
        """Its row, once it has ended; ends it when its time is over."""
        now = time.monotonic()
        if self.told is None and now > self.started + self.task.limit_s:
            self.told = now
            self.signal(signal.SIGTERM)
        elif self.told is not None and now > self.told + GRACE_S:
            self.signal(signal.SIGKILL)
        done, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not done:
            return None
        self.process.returncode = code = os.waitstatus_to_exitcode(status)
        self.signal(signal.SIGKILL)  # whoever is left of it
        result = "TIMED OUT" if self.told is not None else "passed" if code == 0 else "FAILED"
        counts, tests = read_report(self.report, result == "passed")
        return Row(self.task, result, now - self.started, usage.ru_utime + usage.ru_stime, *counts, tests)


def read_report(path: pathlib.Path, passed: bool) -> tuple[tuple[int, int, int], list[tuple[float, str]]]:
    """Passed, failed and skipped tests, and the seconds of each. What has no report of pytest's is one test."""
    try:
        root = ET.parse(path).getroot()
    except (OSError, ET.ParseError):
        return (int(passed), int(not passed), 0), []
    total, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in root.iter("testsuite"))
        for key in ("tests", "failures", "errors", "skipped")
    )
    # Where pytest ended badly without a failed test (nothing collected, interrupted), that counts as one.
    failed = max(failures + errors, int(not passed))
    tests = [
        (float(case.get("time", 0)), f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}")
        for case in root.iter("testcase")
    ]
    return (max(total - failures - errors - skipped, 0), failed, skipped), tests


class Queue:
    """Runs tasks side by side, as long as the cores that they keep busy are no more than there are."""

    def __init__(self, cores: float, folder: pathlib.Path, environment: dict[str, str]):
        self.cores, self.folder, self.environment = cores, folder, environment
        self.waiting: list[Task] = []
        self.running: list[Running] = []
        self.rows: list[Row] = []
        self.programs: dict[str, str] = {}  # of each stack whose environment is there: its folder of programs
        self.began = time.monotonic()
        self.told = 0  # the signal that it was sent: raised at once, it could lose a process that is just being started

    def tell(self, number: int, _: object) -> None:
        self.told = number

    def run(self) -> None:
        while (self.waiting or self.running) and not self.told:
            self.start()
            time.sleep(0.1)
            for each in list(self.running):
                row = each.poll()
                if row:
                    self.running.remove(each)
                    self.finish(each, row)

    def start(self) -> None:
        """Start whatever fits. What needs more cores than are left does not hold up what needs fewer."""
        for task in list(self.waiting):
            busy = sum(each.task.cores for each in self.running)
            making = task.name == "setup"
            if (making or task.stack in self.programs) and (not self.running or busy + task.cores <= self.cores + OVER):
                self.waiting.remove(task)
                path = os.pathsep.join([*filter(None, [self.programs.get(task.stack)]), os.environ["PATH"]])
                self.running.append(Running(task, self.folder, {**self.environment, "PATH": path}))
                minutes = (time.monotonic() - self.began) / 60
                say(f"{task.stack} {task.name}: started after {minutes:.1f} minutes; {len(self.waiting)} wait")

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
    """Install what Debian has and this machine lacks; where it cannot, say so and go on."""
    here = lambda probe: subprocess.run(["bash", "-c", probe], stdin=subprocess.DEVNULL, capture_output=True)
    missing = [package for probe, package in PACKAGES.items() if here(probe).returncode]
    if not missing:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        command = f"sudo apt-get install -y {' '.join(missing)}"
        say(f"missing: {' '.join(missing)}. Going on without; on Debian and Ubuntu: {command}")
        return
    say(f"installing {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = lambda *words: subprocess.run(
        ["apt-get", "-qq", *words], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    apt("update")
    for package in missing:  # one by one: a name that this release lacks must not stop the others
        done = apt("install", "-y", "--no-install-recommends", package)
        if done.returncode:
            print(f"{done.stderr[-500:]}apt-get could not install {package}: going on without it", flush=True)


def tasks_of(chosen: list[Suite], every: bool) -> list[Task]:
    """The environments, and then the suites, the longest first."""
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
    """Print the table, the suites in the order of what they cost, and the tests that take longest."""
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
        print("\nthe tests that take longest (seconds)")
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
    add("--all", action="store_true", help="what is slow or wide too: whole worlds, mutants, benchmarks, Open MPI 5")
    add("--stack", choices=[*STACKS, "all"], default="all", help="which of the two stacks (default: all)")
    add("--suite", nargs="+", choices=names, default=names, metavar="NAME", help="only these suites")
    add("--jobs", type=float, default=os.cpu_count(), metavar="CORES", help="the cores to fill (default: all)")
    add("--list", action="store_true", help="print the suites and their commands, and stop")
    found = parser.parse_args(words)
    if found.jobs <= 0:
        parser.error(f"--jobs is {found.jobs:g}, expected more than 0")
    found.suites = [
        suite
        for suite in SUITES
        if suite.name in found.suite and found.stack in ("all", suite.stack) and (found.all or suite.command)
    ]
    if not found.suites:
        parser.error(f"no such suite on {found.stack}, or under --all alone: see --list")
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
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # each process would compile distpad and the tests again
    if environment.get("CI") == "true":
        environment["DISTPAD_CI"] = "1"
    with tempfile.TemporaryDirectory(prefix="distpad-tests.") as folder:
        queue = Queue(asked.jobs, pathlib.Path(folder), environment)
        queue.waiting = tasks
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, queue.tell)
        try:
            queue.run()
        finally:
            queue.end()
        if queue.told:
            return 128 + queue.told
        return summarise(queue.rows, (time.monotonic() - began) / 60)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
