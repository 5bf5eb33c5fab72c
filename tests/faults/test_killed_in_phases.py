"""Two workers, one of which is killed: the launcher starts both again, and they end as an undisturbed training."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import sys

import pytest

import launched
import worlds

PROGRAM = pathlib.Path(__file__).with_name("killed_training.py")
STEPS, PER_EPOCH = 8, 3
PHASES = ("before the first exchange", "exchange", "step", "checkpoint", "between epochs")


@pytest.mark.wide  # by default test_checkpoints.py kills a training that saves, and worlds resume
@pytest.mark.timeout(400)
@pytest.mark.parametrize("phases", [("checkpoint",), PHASES], ids=len)
def test_killed_and_started_again(tmp_path, record_fault, phases):
    command = [sys.executable, PROGRAM, tmp_path, *phases]
    env = {"PYTHONPATH": os.pathsep.join([worlds.CODE, str(worlds.TESTS)])}
    done = launched.launch("-np", 2, "--max-restarts", len(phases), command=command, env=env, limit_s=380)
    assert done.code == 0, done.stderr
    found = [json.loads(result) for result in re.findall(r"RESULT (.*)", done.stdout)]
    assert [each["same"] for each in found] == [True, True], done.stdout
    resumed_at = 4 if phases == PHASES else 2
    assert [each["first"] for each in found] == [resumed_at] * 2
    books = [sorted(i for each in found for i in each["steps"][str(step)]) for step in range(1, STEPS + 1)]
    for begin in range(0, STEPS - PER_EPOCH + 1, PER_EPOCH):  # whole epochs
        assert sorted(itertools.chain(*books[begin : begin + PER_EPOCH])) == [*range(found[0]["examples"])]
    for phase in phases:
        record_fault(f"SIGKILL: {phase}", "multiworker:2", "started again, same bits", done.seconds / (len(phases) + 1))
