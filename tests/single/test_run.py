"""tests/run.sh: what runs beside what, what is counted, and what ends with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest

import drawn
import run
import suites

STACK = "current"


def task(name: str, command: str, cores: float = 1, limit_s: float = 20, stack: str = STACK) -> run.Task:
    return run.Task(name, stack, cores, limit_s, command)


@pytest.fixture
def results(tmp_path):
    """Runs tasks in a queue with two cores; the results by their names."""

    def results(*tasks: run.Task) -> dict[str, run.Row]:
        queue = run.Queue(2, tmp_path, dict(os.environ))
        queue.waiting = [task("setup", "echo made >&2; echo /nowhere/bin/python"), *tasks]
        queue.run()
        return {row.task.name: row for row in queue.rows}

    return results


REPORT = '<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1">{}</testsuite></testsuites>'
CASE = '<testcase classname="tests.single.test_x" name="test_y" time="1.5"/>'


def test_what_is_counted(results, capsys):
    found = results(
        task("well", "true"),
        task("bad", "false"),
        task("pytest", f"echo '{REPORT.format(CASE)}' >\"$REPORT\"; exit 1"),
        task("no test", f"echo '{'<testsuites/>'}' >\"$REPORT\"; exit 5"),
        task("first on PATH", "[[ $PATH == /nowhere/bin:* ]]"),
    )
    counts = {name: (row.result, row.passed, row.failed, row.skipped) for name, row in found.items()}
    assert counts == {
        "setup": ("passed", 1, 0, 0),
        "well": ("passed", 1, 0, 0),
        "bad": ("FAILED", 0, 1, 0),
        "pytest": ("FAILED", 2, 2, 1),
        "no test": ("FAILED", 0, 1, 0),
        "first on PATH": ("passed", 1, 0, 0),
    }
    capsys.readouterr()
    assert run.summarise(list(found.values()), 1) == 1
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == "4 passed, 4 failed, 1 skipped"
    assert "   1.5  current pytest  tests/single/test_x.py::test_y\n" in output
    assert run.summarise([found["setup"], found["well"]], 1) == 0


def test_a_stack_without_an_environment_runs_nothing_and_fails(results):
    found = results(task("setup", "exit 17", stack="classic"), task("suite", "true", stack="classic"))
    assert {name: row.failed for name, row in found.items()} == {"setup": 1}


def test_cores_are_filled_and_not_overbooked(results, tmp_path):
    cores = {"a": 1, "b": 1, "c": 2, "waits": 0.4, "d": 1}
    log = tmp_path / "log"
    results(
        *(task(name, f"echo {name} >>{log}; sleep 0.5; echo -{name} >>{log}", need) for name, need in cores.items())
    )
    running, most, order = set(), 0.0, log.read_text().split()
    for step in order:
        running = running - {step[1:]} if step[0] == "-" else running | {step}
        most = max(most, sum(cores[name] for name in running))
    began = [step for step in order if step[0] != "-"]
    assert sorted(began[:3]) == ["a", "b", "waits"]  # c does not fit beside them, what waits does
    assert 2 <= most <= 2 + run.OVER and len(order) == 10


def test_what_takes_too_long_is_ended_with_all_that_it_started(results, tmp_path):
    pids = tmp_path / "pids"
    (row,) = [
        row
        for name, row in results(task("long", f"sleep 100 & echo $! $$ >{pids}; wait", limit_s=3)).items()
        if name == "long"
    ]
    assert (row.result, row.failed) == ("TIMED OUT", 1) and row.wall_s < 60
    assert not [pid for pid in pids.read_text().split() if alive(int(pid))]


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as state:
            return state.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_that_runs(tmp_path, number):
    pids = tmp_path / "pids"
    program = (
        "import sys, run, suites\n"
        f"run.tasks_of = lambda *_: [run.Task('setup', 'current', 1, 60, 'echo $$ >{pids}; sleep 100')]\n"
        "run.install_packages = lambda: None\n"
        "sys.exit(run.main([]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(suites.TESTS)})
    limit = time.monotonic() + 60
    while not (pids.exists() and pids.read_text().strip()) and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == 128 + number and not alive(int(pids.read_text()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "singel"], "invalid choice: 'singel'"),
        (["--stack", "old"], "invalid choice: 'old'"),
        (["--jobs", "0"], "--jobs is 0, expected more than 0"),
        (["--suite", "mutants"], "--suite names no suite of either stack, or only suites that need --all"),
    ],
)
def test_wrong_arguments(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        run.parse(words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_the_longest_starts_first_and_environments_before_all():
    tasks = run.tasks_of(suites.SUITES, every=False)
    assert [each.name for each in tasks[:2]] == ["setup", "setup"]
    seconds = {(suite.stack, suite.name): suite.seconds for suite in suites.SUITES}
    order = [seconds[each.stack, each.name] for each in tasks[2:]]
    assert order == sorted(order, reverse=True)
    lint = run.tasks_of([suite for suite in suites.SUITES if suite.name == "lint"], every=False)
    assert "--horovod" not in lint[0].command and len(lint) == 2


# -- which tests run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "arguments", "everything", "left"),
    [
        ("", ["tests/single"], False, ["plain"]),
        ("core", ["tests/single"], False, ["plain"]),
        ("wide", ["tests/single"], False, ["plain", "wide"]),
        ("", ["tests/single/test_x.py::wide"], False, ["plain", "wide"]),
        ("", [], True, ["plain", "wide"]),
    ],
)
def test_wide_tests_run_where_they_are_asked_for(request, monkeypatch, expression, arguments, everything, left):
    (conftest,) = [
        plugin
        for plugin in request.config.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", None) == str(suites.TESTS / "conftest.py")
    ]
    monkeypatch.setattr(drawn, "ALL", everything)
    items = [
        types.SimpleNamespace(name=name, get_closest_marker=lambda mark, name=name: name == mark or None)
        for name in ("plain", "wide")
    ]
    gone = []
    hook = types.SimpleNamespace(pytest_deselected=lambda items: gone.extend(items))
    config = types.SimpleNamespace(getoption=lambda _: expression, args=arguments, hook=hook)
    conftest.pytest_collection_modifyitems(config, items)
    assert [item.name for item in items] == left and len(items) + len(gone) == 2


def test_help_shows_how():
    done = subprocess.run(["bash", suites.TESTS / "run.sh", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and re.search(r"^  tests/run.sh --all$", done.stdout, re.MULTILINE)
