"""Two workers train for a while: memory, threads and open files stay flat.

    pytest tests/faults/test_soak.py --soak-minutes 30

The first half of the epochs warms up. The medians of the third and the fourth quarter are compared.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

import worlds

WORKER = pathlib.Path(__file__).with_name("soak_worker.py")
WORLDS = ("horovod:2", pytest.param("multiworker:2", marks=pytest.mark.wide))
START_S = 180  # to begin and to end, on a busy machine
MOST = {"MiB": 1.5, "threads": 1.0, "files": 1.0}  # by which a median may grow: TensorFlow's pools vary by a thread
LEAKING_S = 40


def soak(world: str, folder: pathlib.Path, seconds: float, leak: str = "none") -> dict[str, float]:
    """The most by which a worker's numbers grew from the third to the fourth quarter of its epochs."""
    folder.mkdir(exist_ok=True)
    done = worlds.start(world, WORKER, folder, str(seconds), leak, limit_s=seconds + START_S)
    assert done.code == 0, done.output
    files = sorted(folder.glob("worker-*"))
    assert len(files) == 2
    growth = []
    for file in files:
        samples = np.array([json.loads(line) for line in file.read_text().splitlines()])
        quarter = len(samples) // 4
        assert quarter >= 3, f"{len(samples)} epochs are too few to compare"
        growth.append(np.median(samples[-quarter:], axis=0) - np.median(samples[-2 * quarter : -quarter], axis=0))
    return dict(zip(MOST, np.max(growth, axis=0).tolist()))


def grown(growth: dict[str, float]) -> list[str]:
    return [name for name, most in MOST.items() if growth[name] > most]


@pytest.mark.timeout(0)  # worlds.start has a limit
@pytest.mark.parametrize("world", WORLDS)
def test_nothing_grows(world, tmp_path, request, record_fault):
    minutes = request.config.getoption("--soak-minutes")
    growth = soak(world, tmp_path, 60 * minutes)
    found = ", ".join(f"{name} {value:+.1f}" for name, value in growth.items())
    record_fault(f"none for {minutes:g} minutes", world, found, 60 * minutes)
    assert not grown(growth), found


@pytest.mark.wide
@pytest.mark.parametrize(("leak", "expected"), [("thread", "threads"), ("array", "MiB"), ("file", "files")])
def test_a_leak_is_found(leak, expected, tmp_path):
    assert expected in grown(soak("horovod:2", tmp_path, LEAKING_S, leak))
