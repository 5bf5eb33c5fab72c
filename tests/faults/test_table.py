"""The table itself: a row per fault, of passed and of failed tests, in one process and in several."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

TESTS = """
import pytest

@pytest.mark.parametrize("engine", ["horovod", "local"])
def test_faults(engine, record_fault):
    record_fault("SIGKILL in a step", engine, "named", 1.25)
    record_fault("SIGSTOP in a step", engine, "went on", 12)
    assert engine == "local"
"""


@pytest.mark.parametrize("processes", ["0", pytest.param("2", marks=pytest.mark.wide)])
def test_a_row_for_each_fault(tmp_path, processes):
    shutil.copy(pathlib.Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_rows.py").write_text(TESTS)
    options = ["-q", "-p", "no:cacheprovider", "-n", processes, f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "pytest", *options], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.strip("= ") == "faults")
    assert lines[start + 1 : start + 6] == [
        "fault              engine   what happened  seconds",
        "SIGKILL in a step  horovod  named              1.2",
        "SIGSTOP in a step  horovod  went on           12.0",
        "SIGKILL in a step  local    named              1.2",
        "SIGSTOP in a step  local    went on           12.0",
    ], done.stdout
