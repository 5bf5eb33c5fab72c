"""``python -m distpad``: what it prints and how it exits. What makes no devices runs in this process, which has
imported TensorFlow."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import typer

import distpad
from distpad import cli
from distpad.cli import certify

ROOT = pathlib.Path(__file__).resolve().parents[3]
LIMIT_S = 280  # of one command, on a machine that others use too
KNOWS_AN_ENGINE = ("TF_CONFIG", "HOROVOD_RANK", "HOROVOD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
TWO = ("--replicas", "2", "--cases", "1")
OWN = (pathlib.Path(__file__).resolve().parents[2] / "to_certify.py").read_text(encoding="utf-8")


pytestmark = pytest.mark.timeout(LIMIT_S + 20)


@pytest.fixture
def run(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in KNOWS_AN_ENGINE}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}

    def run(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "distpad", *arguments],
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        return done.returncode, done.stdout, done.stderr

    (tmp_path / "to_certify.py").write_text(OWN)
    return run


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    def ended(code: int) -> None:
        raise SystemExit(code)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["distpad", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    (tmp_path / "to_certify.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "to_certify", raising=False)
    monkeypatch.setattr(os, "_exit", ended)
    monkeypatch.setenv("COLUMNS", "200")
    for name in KNOWS_AN_ENGINE:
        monkeypatch.delenv(name, raising=False)
    return run


def test_without_a_command_it_explains_itself(run):
    code, output, argument_errors = run()
    assert "certify" in output + argument_errors and "Usage" in output + argument_errors
    assert code in (0, 2)  # as the version of Click has it


def test_help(run):
    code, output, _ = run("--help")
    assert code == 0 and "certify" in output and "--version" in output


def test_version(run):
    assert run("--version") == (0, f"distpad {distpad.__version__}\n", "")


def test_help_of_certify(run):
    code, output, _ = run("certify", "--help")
    assert code == 0
    assert all(option in output for option in ("--backend", "--replicas", "--cases", "--seed", "--naive"))
    assert "horovodrun -np 2 distpad certify" in output


@pytest.mark.parametrize(
    ("arguments", "head"),
    [  # that two replicas give what one does is shown in every world; here, what is printed
        (("--backend", "local"), "local, 1 replicas on 1 workers"),
        pytest.param(TWO, "strategy, 2 replicas on 1 workers", marks=pytest.mark.wide),
    ],
)
def test_certify_passes(run, run_here, arguments, head):
    code, output, argument_errors = (run if arguments is TWO else run_here)("certify", "--cases", "1", *arguments)
    assert code == 0, argument_errors
    assert output.splitlines()[0] == f"distpad certificate: {head}"
    assert output.splitlines()[-1] == "passed"
    assert "WARNING" not in argument_errors and "Traceback" not in argument_errors


@pytest.mark.wide
def test_the_mean_of_means_does_not_pass(run):
    code, output, _ = run("certify", *TWO, "--naive")
    assert code == 1
    off = re.search(r"^NOT PASSED: gradients are off by ([\d.]+)% of their size$", output, re.MULTILINE)
    assert off and 5 < float(off[1]) < 1000
    assert "diagnosis: random lengths: gradients are the mean of each replica's own mean" in output


def test_an_unknown_backend_lists_the_known(run_here):
    code, output, argument_errors = run_here("certify", "--backend", "nonsense")
    assert (code, output) == (2, "")
    assert "'nonsense', expected one of 'auto', 'local', 'mirrored', 'multiworker', 'horovod'" in argument_errors
    assert "Traceback" not in argument_errors


def test_another_number_of_replicas_than_asked_for(run_here):
    code, output, argument_errors = run_here("certify", "--backend", "local", "--replicas", "3")
    assert (code, output) == (2, "") and "replicas is 3, expected 1" in argument_errors


def test_a_misspelt_option(run):
    code, output, argument_errors = run("certify", "--case", "3")
    assert (code, output) == (2, "") and "--case" in argument_errors


@pytest.mark.wide  # all kinds of steps: tests/replicas/test_certificate_own.py does it in every engine
def test_own_model_and_loss(run):
    code, output, argument_errors = run("certify", "to_certify:right", *TWO)
    assert code == 0, argument_errors
    assert "2 replicas" in output.splitlines()[0] and "uneven rows" in output and output.splitlines()[-1] == "passed"


@pytest.mark.wide  # tests/replicas certifies it in the worlds
def test_own_loss_that_averages_locally(run):
    code, output, _ = run("certify", "to_certify:wrong", *TWO)
    assert code == 1 and "NOT PASSED" in output and "own mean" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to_certify:refused", "--backend", "local"], "the loss has rank 0"),
        (["to_certify"], "the target is 'to_certify', expected MODULE:FUNCTION"),
        (["to_certify:right", "--naive"], "--naive is given with MODULE:FUNCTION"),
        (["nowhere.at_all:right"], "module 'nowhere.at_all' is not found"),
    ],
)
def test_what_cannot_be_certified(run_here, arguments, message):
    code, output, argument_errors = run_here("certify", *arguments)
    assert (code, output) == (2, "") and message in argument_errors


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("broken_one:right", r"broken_one does not import\. .*No module named 'nowhere_else'"),
        ("to_certify:left", "has no function 'left', expected one of: each, mean, right, wrong"),
        ("to_certify:failing", "to_certify:failing failed.*ZeroDivisionError"),
        ("to_certify:nothing", "returned a dict with modle, expected a dict of model, loss and batch"),
    ],
)
def test_what_is_said_of_a_function_that_is_of_no_use(tmp_path, monkeypatch, capsys, target, message):
    (tmp_path / "to_certify.py").write_text(OWN)
    (tmp_path / "broken_one.py").write_text("import nowhere_else")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "to_certify", raising=False)
    with pytest.raises(typer.Exit):
        certify._made_by(target)
    assert re.search(f"(?s){message}", capsys.readouterr().err)
