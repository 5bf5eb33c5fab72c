"""fit that one worker leaves within an epoch: nobody hangs, and a message says what to write."""

from __future__ import annotations

import pathlib
import re

import pytest

import worlds

PROGRAM = pathlib.Path(__file__).with_name("stops_alone.py")


@pytest.mark.wide
@pytest.mark.parametrize("world", ["multiworker:2", "horovod:2"])
def test_a_worker_that_stops_alone_within_an_epoch(world):
    done = worlds.start(world, PROGRAM, limit_s=120)
    lines = [line for line in done.output.splitlines() if "worker 0: " in line]
    assert done.code and "Set model.stop_training in on_epoch_end" in lines[0], done.output
    seconds = [float(found) for found in re.findall(r"worker 1: ([\d.]+): ", done.output)]
    assert seconds and max(seconds) < 60, done.output
