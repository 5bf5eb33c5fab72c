"""``python -m distpad``: what it prints and how it exits. All start at once, and each test waits for its own."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

import distpad
from distpad.cli import certify

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT_S = 280  # on a machine that others use too; alone it takes 15 s
KNOWS_AN_ENGINE = ("TF_CONFIG", "HOROVOD_RANK", "HOROVOD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
COMMANDS = {
    "nothing": [],
    "help": ["--help"],
    "version": ["--version"],
    "certify help": ["certify", "--help"],
    "certify": ["certify", "--replicas", "2", "--cases", "12"],
    "naive": ["certify", "--replicas", "2", "--cases", "12", "--naive"],
    "nonsense": ["certify", "--backend", "nonsense"],
    "too many": ["certify", "--backend", "local", "--replicas", "3"],
    "bad option": ["certify", "--case", "3"],
    "own": ["certify", "to_certify:right", "--replicas", "2", "--cases", "4"],
    "own wrong": ["certify", "to_certify:wrong", "--replicas", "2", "--cases", "4"],
    "own refused": ["certify", "to_certify:refused", "--replicas", "2", "--cases", "4"],
    "own without a colon": ["certify", "to_certify"],
    "own naive": ["certify", "to_certify:right", "--naive"],
    "own module": ["certify", "nowhere.at_all:right"],
}
OWN = (pathlib.Path(__file__).resolve().parents[1] / "to_certify.py").read_text(encoding="utf-8")


pytestmark = pytest.mark.timeout(LIMIT_S + 20)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "to_certify.py").write_text(OWN)
    environment = {name: value for name, value in os.environ.items() if name not in KNOWS_AN_ENGINE}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "distpad", *arguments],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, arguments in COMMANDS.items()
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.fixture
def run(started):
    def wait(name: str) -> tuple[int, str, str]:
        output, complaints = started[name].communicate(timeout=LIMIT_S)
        return started[name].returncode, output, complaints

    return wait


def test_without_a_command_it_explains_itself(run):
    code, output, complaints = run("nothing")
    assert "certify" in output + complaints and "Usage" in output + complaints
    assert code in (0, 2)  # as the version of Click has it


def test_help(run):
    code, output, _ = run("help")
    assert code == 0 and "certify" in output and "--version" in output


def test_version(run):
    assert run("version") == (0, f"distpad {distpad.__version__}\n", "")


def test_help_of_certify(run):
    code, output, _ = run("certify help")
    assert code == 0
    assert all(option in output for option in ("--backend", "--replicas", "--cases", "--seed", "--naive"))
    assert "horovodrun -np 2 distpad certify" in output


def test_certify_passes(run):
    code, output, complaints = run("certify")
    assert code == 0, complaints
    assert output.splitlines()[0] == "distpad certificate: strategy, 2 replicas on 1 workers"
    assert output.splitlines()[-1] == "passed"
    assert "WARNING" not in complaints and "Traceback" not in complaints


def test_the_mean_of_means_does_not_pass(run):
    code, output, _ = run("naive")
    assert code == 1
    off = re.search(r"^NOT PASSED: gradients are off by ([\d.]+)% of their size$", output, re.MULTILINE)
    assert off and 5 < float(off[1]) < 1000
    assert "diagnosis: random lengths: gradients are the mean of each replica's own mean" in output


def test_an_unknown_backend_lists_the_known(run):
    code, output, complaints = run("nonsense")
    assert (code, output) == (2, "")
    assert "'nonsense', expected one of 'auto', 'local', 'mirrored', 'multiworker', 'horovod'" in complaints
    assert "Traceback" not in complaints


def test_another_number_of_replicas_than_asked_for(run):
    code, output, complaints = run("too many")
    assert (code, output) == (2, "") and "replicas is 3, expected 1" in complaints


def test_a_misspelt_option(run):
    code, output, complaints = run("bad option")
    assert (code, output) == (2, "") and "--case" in complaints


def test_own_model_and_loss(run):
    code, output, complaints = run("own")
    assert code == 0, complaints
    assert "2 replicas" in output.splitlines()[0] and "uneven rows" in output and output.splitlines()[-1] == "passed"


def test_own_loss_that_averages_locally(run):
    code, output, _ = run("own wrong")
    assert code == 1 and "NOT PASSED" in output and "own mean" in output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own refused", "the loss has rank 0"),
        ("own without a colon", "'to_certify' is no MODULE:FUNCTION"),
        ("own naive", "--naive is of the built-in model"),
        ("own module", "module 'nowhere.at_all' is not found"),
    ],
)
def test_what_cannot_be_certified(run, name, message):
    code, output, complaints = run(name)
    assert (code, output) == (2, "") and message in complaints


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("broken_one:right", r"broken_one does not import\. .*No module named 'nowhere_else'"),
        ("to_certify:left", "has no function 'left', expected one of: each, mean, right, wrong"),
        ("to_certify:failing", "to_certify:failing failed.*ZeroDivisionError"),
        ("to_certify:nothing", "returned a dict with modle, expected a dict of model, loss and batch"),
    ],
)
def test_what_is_said_of_a_function_that_is_of_no_use(tmp_path, monkeypatch, target, message):
    (tmp_path / "to_certify.py").write_text(OWN)
    (tmp_path / "broken_one.py").write_text("import nowhere_else")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "to_certify", raising=False)
    with pytest.raises(certify._Unusable, match=f"(?s){message}"):
        certify._made_by(target)
