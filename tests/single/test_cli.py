"""``python -m distpad``: what it prints and how it exits. All start at once, and each test waits for its own."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

import distpad

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
}


pytestmark = pytest.mark.timeout(LIMIT_S + 20)


@pytest.fixture(scope="module")
def started():
    environment = {name: value for name, value in os.environ.items() if name not in KNOWS_AN_ENGINE}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "distpad", *arguments],
            env=environment,
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
