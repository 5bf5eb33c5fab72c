"""The minimal programs as users start them: one replica trains as two do. (tests/replicas/test_minimal.py runs them in
processes that hold TensorFlow already.)"""

from __future__ import annotations

import pathlib
import re

import pytest

import worlds

MINIMAL = pathlib.Path(__file__).resolve().parents[2] / "examples" / "minimal"
LIMIT_S = 120
pytestmark = [pytest.mark.one_stack, pytest.mark.timeout(2 * LIMIT_S + 20)]


def losses_of(world: str, *arguments: str, replicas: int) -> list[float]:
    """Of each epoch, as one worker alone printed them."""
    finished = worlds.start(world, *arguments, limit_s=LIMIT_S)
    assert finished.code == 0, finished.output
    lines = re.findall(r"(\d+) replicas, epoch (\d): loss (\d+\.\d+)", finished.output)
    assert [(int(count), int(epoch)) for count, epoch, _ in lines] == [(replicas, e) for e in range(4)]
    return [float(loss) for *_, loss in lines]


@pytest.mark.wide
@pytest.mark.parametrize("name", ["custom_loop", "keras_fit", "horovod_loop"])
def test_one_replica_trains_as_two_do(name: str) -> None:
    world, count = ("horovod:2", ()) if name == "horovod_loop" else ("local", ("2",))
    path = str(MINIMAL / f"{name}.py")
    alone = losses_of("local", path, replicas=1)
    assert losses_of(world, path, *count, replicas=2) == pytest.approx(alone, abs=2e-4)


@pytest.mark.parametrize("path", sorted(MINIMAL.glob("*.py")), ids=lambda path: path.stem)
def test_a_program_is_short_and_says_how_to_run_it(path: pathlib.Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40 and text.count(f"python examples/minimal/{path.name}") == 2
