"""The label kinds as users start them: under every engine, in processes of their own."""

from __future__ import annotations

import pathlib
import re

import pytest

import worlds

ROOT = pathlib.Path(__file__).resolve().parents[2]
LABELS = ROOT / "examples" / "labels"
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIMIT_S = 240  # of one start, on a machine that is busy with other things
NUMBER = r"[\d.]+(?:e[+-]\d+)?"
KINDS = ["integers", "one_hot", "multi_hot", "images"]
pytestmark = pytest.mark.timeout(LIMIT_S + 20)


def start(world: str, script: str, *arguments: str) -> tuple[int, str]:
    """The exit code of ``python examples/labels/SCRIPT.py ARGUMENTS`` in a world, and all that its processes wrote."""
    return worlds.start(world, LABELS / f"{script}.py", *arguments, limit_s=LIMIT_S)[:2]


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


@pytest.mark.wide  # all.py runs the same, below
@pytest.mark.parametrize("script", KINDS)
def test_each_script_on_two_replicas(script: str) -> None:
    check(*start("mirrored:2", script, "--backend", "mirrored", "--replicas", "2"), tables=1, replicas=2)


@pytest.mark.one_stack
def test_on_one_device_an_error_above_the_limit_is_exit_code_1() -> None:
    code, output = start("local", "integers", "--backend", "local", "--limit", "0")
    check(code, output, tables=1, replicas=1, wanted=1)
    assert output.count("NOT PASSED: distpad's gradient error is") == 1


@pytest.mark.wide  # in one process the same programs run by default
def test_all_kinds_on_four_replicas_of_one_process_print_the_figures_of_the_readme() -> None:
    code, output = start("mirrored:4", "all", "--replicas", "4")
    check(code, output, tables=4, replicas=4)
    rows = re.findall(
        r"^\| (?:integers|.* vectors|images) \| ([\d.]+)% \| ([\d.]+)% \| [\d.e-]+ \|$", README, re.MULTILINE
    )
    plain, own = ([float(row[column]) / 100 for row in rows] for column in range(2))
    assert plain == pytest.approx(figures(output, "plain Keras"), rel=0.04)  # the scripts print two digits
    assert own == pytest.approx(figures(output, "each replica's mean"), rel=0.04)


@pytest.mark.wide
def test_all_kinds_on_two_workers() -> None:
    check(*start("multiworker:2", "all", "--replicas", "2"), tables=4, replicas=2, workers=2)


@pytest.mark.wide
def test_all_kinds_under_horovod() -> None:
    check(*start("horovod:2", "all", "--backend", "horovod", "--replicas", "2"), tables=4, replicas=2, workers=2)
