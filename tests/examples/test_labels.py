"""The label kinds as users start them: under every engine, in processes of their own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT_S = 240  # of one start, on a machine that is busy with other things
NUMBER = r"[\d.]+(?:e[+-]\d+)?"
KINDS = ["integers", "one_hot", "multi_hot", "images"]
pytestmark = pytest.mark.timeout(LIMIT_S + 20)


def start(script: str, *arguments: str, launcher: tuple[str, ...] = (), limit_s: float = LIMIT_S) -> tuple[int, str]:
    """The exit code of ``python examples/labels/SCRIPT.py ARGUMENTS``, and all that its processes wrote."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_CONFIG"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    argv = [*launcher, sys.executable, str(ROOT / "examples" / "labels" / f"{script}.py"), *arguments]
    process = subprocess.Popen(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # a launcher ends its workers, which are no longer in its group
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{' '.join(argv)}: not done after {limit_s:.0f} s\n{process.communicate()[0]}")
    return process.returncode, output


def figures(output: str, way: str) -> list[float]:
    """The gradient errors in the tables' lines for one way of averaging."""
    return [float(error) for error in re.findall(rf"{way}.* {NUMBER} +{NUMBER}% +({NUMBER})$", output, re.MULTILINE)]


def check(code: int, output: str, *, tables: int, replicas: int, workers: int = 1, wanted: int = 0) -> None:
    """Worker 0 alone printed the tables, distpad is right in all of them, and the others wrong where they must be."""
    assert code == wanted, output
    assert re.findall(r"replicas: (\d+), workers: (\d+)", output) == [(str(replicas), str(workers))] * tables, output
    exact, plain, own = (figures(output, way) for way in ("distpad", "plain Keras", "each replica's mean"))
    assert len(exact) == len(plain) == len(own) == tables, output
    assert max(exact) <= 1e-5, output
    assert min(plain) > 1e-3, output
    if replicas > 1:
        assert min(own) > 1e-3, output
    else:
        assert max(own) <= 1e-5, output  # a mask is all that one device needs


@pytest.mark.parametrize("script", KINDS)
def test_each_script_on_two_replicas(script: str) -> None:
    check(*start(script, "--backend", "mirrored", "--replicas", "2"), tables=1, replicas=2)


def test_all_kinds_on_one_device_where_an_error_above_the_limit_is_exit_code_1() -> None:
    code, output = start("all", "--backend", "local", "--limit", "0")
    check(code, output, tables=4, replicas=1, wanted=1)
    assert output.count("NOT PASSED: distpad's gradient error is") == 4


def test_all_kinds_on_four_replicas_of_one_process() -> None:
    check(*start("all", "--replicas", "4"), tables=4, replicas=4)


def test_all_kinds_on_two_workers() -> None:
    launcher = (str(ROOT / "launch" / "multiworker.sh"), "-np", "2", "--timeout-s", str(LIMIT_S - 20), "--")
    check(*start("all", "--replicas", "2", launcher=launcher), tables=4, replicas=2, workers=2)


def test_all_kinds_under_horovod() -> None:
    horovodrun = pathlib.Path(sys.executable).with_name("horovodrun")
    program = str(horovodrun) if horovodrun.exists() else shutil.which("horovodrun")
    if program is None or importlib.util.find_spec("horovod") is None:
        missing = "Horovod is not installed for this Python: launch/install_horovod.sh builds it"
        (pytest.fail if os.environ.get("DISTPAD_CI") else pytest.skip)(missing)
    launcher = (program, "--gloo", "-np", "2")
    check(*start("all", "--backend", "horovod", "--replicas", "2", launcher=launcher), tables=4, replicas=2, workers=2)
