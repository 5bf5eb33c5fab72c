"""The diff of README.md is two programs, of which only the second one trains as one device does; figures that the text
names are those of their commands."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.one_stack

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"^```diff\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

# Runs a side up to its loop, keeps the weights, runs the loop, and prints how far the weights are then from those of
# one device. That one takes the same steps row by row, in plain TensorFlow, and nothing of it is padded.
PROGRAM = """
import ast, sys
import tensorflow as tf

replicas, is_eager, sides = int(sys.argv[1]), sys.argv[2] == "eager", sys.argv[3:]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
tf.config.run_functions_eagerly(is_eager)
import numpy as np


def weights_of_one_device(names, weights):
    model, rows = names["model"], [(row["x"], row["y"]) for row in names["examples"]]
    model.set_weights(weights)
    for first in range(0, len(rows), 2 * replicas):
        batch = rows[first : first + 2 * replicas]
        assert len({len(labels) for _, labels in batch}) > 1  # widths differ
        with tf.GradientTape() as tape:
            losses = [
                tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(picture[None])[0])
                for picture, labels in batch
            ]
            mean = sum(map(tf.reduce_sum, losses)) / sum(len(labels) for _, labels in batch)
        gradients = tape.gradient(mean, model.trainable_variables)
        for variable, gradient in zip(model.trainable_variables, gradients):
            variable.assign_sub(0.1 * gradient)
    return model.get_weights()


for path in sides:
    with open(path) as file:
        *beginning, loop = ast.parse(file.read(), path).body
    names = {"__name__": "__main__"}
    exec(compile(ast.Module(beginning, []), path, "exec"), names)
    assert names["strategy"].num_replicas_in_sync == replicas
    began = names["model"].get_weights()
    exec(compile(ast.Module([loop], []), path, "exec"), names)
    ended = names["model"].get_weights()
    wanted = weights_of_one_device(names, began)
    moved = max(np.abs(w - b).max() for w, b in zip(wanted, began))
    print("off", max(np.abs(w - e).max() for w, e in zip(wanted, ended)) / moved)
"""


def distances(folder: pathlib.Path, replicas: int, mode: str, *sides: str) -> list[float]:
    """How far the weights of each side, "-" before the change or "+" after it, end from those of one device."""
    (diff,) = DIFFS
    paths = []
    for side in sides:
        lines = [line[1:] for line in diff.splitlines() if line[:1] in ("", " ", side)]
        paths.append(folder / ("after.py" if side == "+" else "before.py"))
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-", str(replicas), mode, *map(str, paths)]
    done = subprocess.run(command, input=PROGRAM, cwd=folder, env=settings, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr
    return [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("off ")]


def test_change_makes_two_replicas_train_as_one_device(tmp_path):
    before, after = distances(tmp_path, 2, "graph", "-", "+")
    assert after < 1e-5
    assert before > 1e-2


@pytest.mark.wide
@pytest.mark.parametrize(("replicas", "mode"), [(1, "graph"), (2, "eager"), (4, "graph")])
def test_change_trains_as_one_device_on_any_replicas(tmp_path, replicas, mode):
    (after,) = distances(tmp_path, replicas, mode, "+")
    assert after < 1e-5


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.wide
@pytest.mark.one_stack
def test_table_of_labels_is_what_its_command_prints():
    command = [sys.executable, "examples/labels/all.py", "--replicas", "4"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr
    plain = [f"{float(percent):.1f}%" for percent in re.findall(r"off by ([\d.]+)% of its size", done.stdout)]
    own = [f"{float(error):.1%}" for error in re.findall(r"^each replica's mean.* (\S+)$", done.stdout, re.MULTILINE)]
    table = [line.strip("|").split(" | ") for line in README.splitlines() if line.startswith(("| int", "| one-hot"))]
    table += [line.strip("|").split(" | ") for line in README.splitlines() if line.startswith(("| multi-hot", "| ima"))]
    assert [(row[1].strip(), row[2].strip()) for row in table] == list(zip(plain, own))
    assert all(float(row[3]) < 1e-6 for row in table)  # whose last digits depend on the processor


def test_benchmarks_that_are_quoted_exist():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    section = text.split("## Benchmarks")[1].split("\n## ")[0]
    quoted = [
        name for line in section.splitlines() if line[:2] == "- " for name in re.findall("`(\\w+)`", line.split(":")[0])
    ]
    commands = (ROOT / "benchmarks" / "run.sh").read_text(encoding="utf-8")
    scripts = {name: re.search(rf"^{name} +\|.*\| (\w+\.py)", commands, re.MULTILINE) for name in quoted}
    assert len(quoted) >= 4
    described = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for name, script in scripts.items():
        assert script, f"benchmarks/run.sh has no {name}"
        assert f"`{script[1]}`" in described and (ROOT / "benchmarks" / script[1]).is_file()
