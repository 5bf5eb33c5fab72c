"""The programs of examples/fit as users start them: one device trains as two replicas, workers and ranks do."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

import worlds

HERE = pathlib.Path(__file__).resolve().parent
PROGRAMS = sorted((HERE.parents[1] / "examples" / "fit").glob("*.py"))
LIMIT_S = 300
pytestmark = pytest.mark.timeout(LIMIT_S + 20)


def trained(world: str, folder: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """The history and the weights of each program in a world."""
    count = worlds.parse(world)[1]
    runner = "local" if world.startswith("mirrored") else world
    finished = worlds.start(runner, HERE / "run_programs.py", folder, count, *PROGRAMS, limit_s=LIMIT_S)
    assert finished.code == 0, finished.output
    found = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}
    assert [*sorted(found)] == [path.stem for path in PROGRAMS]
    assert all(each.pop("replicas") == count for each in found.values())
    return found


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    found = trained("local", tmp_path_factory.mktemp("local"))
    for each in found.values():  # it learns
        assert each["loss"][-1] < 0.9 * each["loss"][0]
    return found


@pytest.mark.wide
@pytest.mark.parametrize("world", ["mirrored:2", "multiworker:2", "horovod:2"])
def test_two_train_as_one_device_does(world, on_one_device, tmp_path):
    found = trained(world, tmp_path)
    for program, expected in on_one_device.items():
        assert found[program].keys() == expected.keys()
        for name, value in expected.items():
            error = np.max(np.abs(found[program][name] - value)) / np.max(np.abs(value))
            assert error < 1e-5, f"{program}, {name}: {error:.1e}"


@pytest.mark.one_stack
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_is_short_and_says_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40 and text.count(f"python examples/fit/{path.name}") == 4
