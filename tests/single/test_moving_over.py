"""Each diff of docs/moving-over.md is two complete programs."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.one_stack

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "moving-over.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"^```diff\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)

# Runs the files it is given, in one process with two devices, and prints the weights that each trained.
PROGRAM = """
import runpy, sys
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
# two strategies of one process take each other's collectives for their own
tf.distribute.MirroredStrategy.__new__ = lambda *_: strategy
tf.distribute.MirroredStrategy.__init__ = lambda *_: None
for path in sys.argv[1:]:
    model = runpy.run_path(path).get("model")
    print("weights", *[] if model is None else model.get_weights()[0].ravel())
"""


def side(diff: str, sign: str) -> str:
    return "".join(line[1:] + "\n" for line in diff.splitlines() if line[:1] in ("", " ", sign))


def test_both_sides_compile() -> None:
    assert len(DIFFS) == 3
    for diff in DIFFS:
        for sign in "-+":
            compile(side(diff, sign), f"side {sign}", "exec")
        assert "import distpad" in side(diff, "+") and "distpad" not in side(diff, "-")


@pytest.mark.wide
def test_both_sides_run_and_counts_that_were_reduced_by_hand_give_the_same_weights(tmp_path: pathlib.Path) -> None:
    paths = []
    for number, diff in enumerate(DIFFS):
        for sign, name in (("-", "before"), ("+", "after")):
            paths.append(tmp_path / f"{name}_{number}.py")
            paths[-1].write_text(side(diff, sign), encoding="utf-8")
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", PROGRAM, *map(str, paths)]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr
    weights = [[float(word) for word in line.split()[1:]] for line in done.stdout.splitlines() if "weights" in line]
    assert len(weights) == 6 and len(weights[4]) == 15 and weights[5] == pytest.approx(weights[4], abs=1e-5)
