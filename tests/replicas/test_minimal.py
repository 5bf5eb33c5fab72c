"""The programs of examples/minimal run on as many replicas as they say, and their losses fall."""

from __future__ import annotations

import pathlib
import re
import runpy
import sys

import pytest

from distpad import backends

WORLDS = ("mirrored:2", "horovod:2")
MINIMAL = pathlib.Path(__file__).resolve().parents[2] / "examples" / "minimal"
PROGRAMS = {"mirrored": ("custom_loop", "keras_fit"), "horovod": ("horovod_loop",)}


@pytest.mark.worlds("horovod:2")  # README.md has the programs of the others
def test_minimal_programs(world, monkeypatch, capsys):
    if world.kind not in PROGRAMS:
        pytest.skip("no minimal program has this engine")
    # two strategies of one process take each other's collectives for their own
    monkeypatch.setattr(backends, "start", lambda kind, replicas: world.backend)
    for name in PROGRAMS[world.kind]:
        path = str(MINIMAL / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, str(world.num_replicas)])
        runpy.run_path(path, run_name="__main__")
        lines = re.findall(r"^(\d+) replicas, epoch (\d): loss (\d+\.\d+)", capsys.readouterr().out, re.MULTILINE)
        if world.backend.worker_index > 0:
            assert not lines  # of all workers, one speaks
            continue
        assert [(int(count), int(epoch)) for count, epoch, _ in lines] == [(world.num_replicas, e) for e in range(4)]
        assert float(lines[3][2]) < 0.9 * float(lines[0][2])
