"""Wrong arguments on one worker, found while tracing: all workers raise the cause, whatever follows the loss."""

from __future__ import annotations

import pathlib
import re

import pytest
import refused_step

import worlds
from replica_world import HANG_S

PROGRAM = pathlib.Path(__file__).with_name("refused_step.py")
CAUSE = "DistributedLoss: lengths have dtype float32, expected integers"


@pytest.mark.parametrize("kind", refused_step.KINDS)
def test_all_ranks_raise_the_cause(world, kind):
    if world.strategy is not None:
        pytest.skip("TensorFlow's own collectives do not work again after a graph that failed: below, and test_workers")
    assert world.backend.num_workers > 1
    message, seconds = refused_step.raised(world, kind)
    assert CAUSE in message and seconds < HANG_S


@pytest.mark.wide
@pytest.mark.parametrize("kind", refused_step.KINDS)
def test_all_workers_of_a_strategy_raise_the_cause(world, kind):
    if world.strategy is None or world.backend.worker_index:
        pytest.skip("one process starts a world of a strategy")
    done = worlds.start("multiworker:2", PROGRAM, kind, limit_s=120, DISTPAD_WORLD="multiworker:2")
    found = re.findall(r"worker (\d): ([\d.]+): (.*)", done.output)
    assert sorted(worker for worker, *_ in found) == ["0", "1"], done.output
    assert all(CAUSE in message and float(seconds) < HANG_S for _, seconds, message in found), done.output
