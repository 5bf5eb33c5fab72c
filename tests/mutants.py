"""The tests can fail: each mutant of the product, in a copy of the checkout, must be killed by an assertion of a test.

    python tests/mutants.py
    python tests/mutants.py mean-of-means horovod-factor-dropped
    python tests/mutants.py --list

A mutant is one replacement in one file of the product. First the selected tests run on an unchanged copy, where they
must pass; then on each mutant, where one of them must fail by an assertion: a mutant that only crashes, hangs or does
not import shows nothing about the tests. Only tests that run by default take part. Exits with 1 where one survives,
with 2 where the list below is out of date.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import suites
import worlds
from mutations import MUTANTS, Mutant

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("distpad", "tests", "launch", "pyproject.toml")
LIMIT_S = 200  # of one world, below the time limit of a single test, so that a hang is never taken for a failed test
ALL_LIMIT_S = 900  # of all that a world's mutants are attacked with
JOBS = 2
BY_DEFAULT = {
    "faults": "",
    "mirrored:2": "",
    "multiworker:2": f"core or {suites.SEVERAL}",
    "horovod:2": f"core or not ({suites.SHARED})",
}  # elsewhere the core
# the last lines of pytest's output; "Failed: Timeout" or an exception of the product is no assertion
ASSERTED = re.compile(r"^FAILED \S+::(.+?) - (?:AssertionError|assert\b|Failed: DID NOT RAISE)", re.MULTILINE)
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "2", "COLUMNS": "400", "PYTHONDONTWRITEBYTECODE": "1"}
FORKS = multiprocessing.get_context("forkserver")
START = "import sys, worlds; sys.exit(worlds.run(sys.argv[2], sys.argv[3:], limit_s=float(sys.argv[1])))"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutant: ``killer`` is the test that failed by an assertion; else ``why`` none did."""

    mutant: Mutant
    killer: str
    why: str
    seconds: float
    output: str


def main() -> int:
    """Run the mutants that the command line names, all by default; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {mutant.name: mutant for mutant in MUTANTS}
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants (default: all)")
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"mutants at once (default: {JOBS})")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no mutant is named {', '.join(unknown)}; there are: {', '.join(known)}")
    chosen = [known[name] for name in options.names] or list(MUTANTS)
    if options.list:
        print(*(f"{mutant.name:<40} {mutant.world:<11} {mutant.file}" for mutant in chosen), sep="\n")
        return 0
    outdated = [argument_error for mutant in MUTANTS if (argument_error := check(mutant))]
    if outdated:
        print(*outdated, sep="\n")
        return 2
    os.environ.update(QUIET)
    FORKS.set_forkserver_preload(["tensorflow", "keras", "pytest"])
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        sound = [*pool.map(lambda world: passes_unchanged(world, chosen), sorted({mutant.world for mutant in chosen}))]
        if not all(sound):
            return 2
        outcomes = []
        for outcome in pool.map(attack, chosen):  # in order, each as soon as it is known
            outcomes.append(outcome)
            print(line(outcome), flush=True)
    survivors = [outcome for outcome in outcomes if not outcome.killer]
    for outcome in survivors:
        print(f"\n=== {outcome.mutant.name}: {outcome.why}\n{outcome.output[-4000:]}")
    print(f"\n{len(outcomes) - len(survivors)} passed, {len(survivors)} failed")
    return 1 if survivors else 0


def check(mutant: Mutant) -> str:
    """What is out of date about a mutant; nothing where its place in the product is found exactly once."""
    found = (ROOT / "distpad" / mutant.file).read_text(encoding="utf-8").count(mutant.old)
    if found == 1:
        return ""
    place = f"{mutant.old!r} is {found} times in distpad/{mutant.file}, expected once"
    return f"{mutant.name}: {place}. The product changed, renew this mutant."


def passes_unchanged(world: str, mutants: list[Mutant]) -> bool:
    """Whether all that a world's mutants are attacked with passes on the product as it is."""
    selections = sorted({mutant.selection for mutant in mutants if mutant.world == world})
    start = time.monotonic()
    with copy() as folder:
        code, output = run(folder, world, " or ".join(f"({selection})" for selection in selections), ALL_LIMIT_S)
    print(f"{'(unchanged)':<40} {world:<11} {'passes' if code == 0 else 'FAILS':<60} {time.monotonic() - start:5.0f} s")
    if code:
        print(f"{world}: the tests must pass before they can kill anything (exit code {code})\n{output}")
    return code == 0


def attack(mutant: Mutant) -> Outcome:
    """Run a mutant's selection against it."""
    start = time.monotonic()
    with copy() as folder:
        path = folder / "distpad" / mutant.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        code, output = run(folder, mutant.world, mutant.selection)
    asserted = ASSERTED.search(output)
    killer, why = "", "survived: all tests passed"
    if code and asserted:
        killer, why = asserted[1], ""
    elif code:
        why = f"no assertion failed (exit code {code}): it crashed, hung, or no test was selected"
    return Outcome(mutant, killer, why, time.monotonic() - start, output)


@contextlib.contextmanager
def copy() -> Iterator[pathlib.Path]:
    """The checkout's product and tests in a folder of their own."""
    with tempfile.TemporaryDirectory(prefix="distpad-mutant-") as folder:
        for name in COPIED:
            source, target = ROOT / name, pathlib.Path(folder, name)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)
        yield pathlib.Path(folder)


def run(folder: pathlib.Path, world: str, selection: str, limit_s: float = LIMIT_S) -> tuple[int, str]:
    """The selected tests of a copy in a world: exit code and output of all its ranks."""
    default = BY_DEFAULT.get(world, "core")
    arguments = ["-k", f"({selection}) and ({default})" if default else selection, "-m", "not wide"]
    if worlds.parse(world)[0] not in (*worlds.STARTERS, "faults"):
        return forked(folder, world, arguments, limit_s)
    argv = [sys.executable, "-c", START, str(limit_s), world, *arguments]
    if world == "faults":  # whose tests start their own jobs
        argv = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "faults", *arguments]
    done = subprocess.run(
        argv,
        cwd=folder / "tests",
        env={**os.environ, **QUIET},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout


def forked(folder: pathlib.Path, world: str, arguments: list[str], limit_s: float) -> tuple[int, str]:
    """The same in a world of one process, forked from one that has imported TensorFlow: that takes most of the time."""
    process = FORKS.Process(target=within, args=(folder, world, arguments))
    process.start()
    process.join(limit_s)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    outputs = sorted(folder.glob("rank-*"))
    return 124 if code is None else code, "".join(path.read_text(errors="replace") for path in outputs)


def within(folder: pathlib.Path, world: str, arguments: list[str]) -> None:
    """What the forked process does: nothing of the checkout itself is imported."""
    os.chdir(folder / "tests")
    os.environ.update(QUIET, DISTPAD_WORLD=world, DISTPAD_RANK_OUTPUT=str(folder))
    sys.path[:0] = [str(folder / "tests"), str(folder)]
    for name in ("mutations", "worlds"):
        sys.modules.pop(name, None)
    import rank

    sys.argv[1:] = [str(folder / "tests" / "replicas"), *arguments]
    os._exit(rank.main())  # as rank.py itself does


def line(outcome: Outcome) -> str:
    mutant = outcome.mutant
    found = f"killed by {outcome.killer}" if outcome.killer else f"NOT KILLED, {outcome.why}"
    return f"{mutant.name:<40} {mutant.world:<11} {found:<60} {outcome.seconds:5.0f} s"


if __name__ == "__main__":
    sys.exit(main())
