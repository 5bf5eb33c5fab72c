"""The benchmarks run, on little data: what is asserted is what they compare, never how fast anything was."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import worlds

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import rounds  # noqa: E402 (the path comes first)
import sequences  # noqa: E402

LIMIT_S = 200
ENGINES = ("mirrored", "multiworker", "horovod")
pytestmark = [pytest.mark.wide, pytest.mark.timeout(LIMIT_S + 20)]


def run(world: str, script: str, *arguments: object) -> str:
    """What a benchmark printed, its styles and the launcher's marks left out."""
    settings = {"TERM": "dumb", "COLUMNS": "200"}
    code, output, _ = worlds.start(world, BENCHMARKS / script, *map(str, arguments), limit_s=LIMIT_S, **settings)
    assert code == 0, output
    return re.sub(r"\x1b\[[0-9;]*m", "", output)


# -- the figures ------------------------------------------------------------------------------------------------------


def test_contenders_take_turns_each_behind_the_base():
    ran: list[str] = []
    contenders = {name: lambda name=name: ran.append(name) or float(len(ran)) for name in "abcd"}
    figures = rounds.take_turns(contenders, "a", 4, quiet=True)
    assert ran[::2] == ["a"] * 12
    turns = [ran[k + 1 : k + 6 : 2] for k in range(0, 24, 6)]
    assert [sorted(turn) for turn in turns] == [["b", "c", "d"]] * 4 and len({*map(tuple, turns)}) > 1
    assert figures.own["a"] == [1.0 + 2 * k for k in range(12)] and figures.base == "a"
    for name in "bcd":
        assert len(figures.own[name]) == 4 and figures.ratios[name] == [own / (own - 1) for own in figures.own[name]]


@pytest.mark.parametrize(("count", "left_out"), [(5, 0), (6, 0), (9, 1), (12, 2), (20, 5)])
def test_the_interval_is_that_of_the_sign_test(count, left_out):
    """For 9 values the second and the eighth, as in every table of the binomial distribution."""
    values = list(np.random.default_rng(0).permutation(count))
    assert rounds.interval(values) == (left_out, count - 1 - left_out)


def test_intervals_hold_the_median_as_often_as_they_say():
    random = np.random.default_rng(1)
    held = [low <= 0 <= high for low, high in (rounds.interval(random.normal(size=9)) for _ in range(4000))]
    assert 0.95 < np.mean(held) < 0.975  # 0.961 by theory


def test_the_data():
    drawn, found = sequences.drawn(300), sequences.docstrings(300)
    for items in (drawn, found):
        lengths = [len(item) for item in items]
        assert len(items) == 300 and min(lengths) >= 16 and max(lengths) <= 1024 and len(set(lengths)) > 50
        assert all(item.min() >= 0 and item.max() < sequences.VOCABULARY for item in items)
    assert abs(np.log([len(item) for item in sequences.drawn(5000)]).mean() - 5) < 0.1
    with pytest.raises(ValueError, match="expected at most"):
        sequences.docstrings(10**6)


# -- the programs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", ["horovod:2", "multiworker:2"])
def test_overhead(world):
    output = run(world, "overhead.py", "--rounds", 1, "--steps", 8, "--units", 8)
    assert "2 workers" in output
    for contender in (
        "the oracle",
        "a window of 4",
        "a window of 16",
        "a window of 32",
        "a window of 128",
        "in each step",
    ):
        assert len(re.findall(f"{contender} +│ .*[0-9]", output)) == 1, output


@pytest.mark.parametrize(("world", "flags"), [("horovod:2", []), ("multiworker:2", ["--mixed-precision"])])
def test_tokens(world, flags):
    output = run(world, "tokens.py", "--rounds", 1, "--examples", 96, *flags)
    assert "2 workers" in output
    for contender in ("per batch", "fixed length", "32 examples", "8,192 tokens"):
        assert len(re.findall(f"{contender} +│ .*[0-9]", output)) == 2, output  # in both tables


@pytest.mark.parametrize(("world", "workers"), [("local", 1), ("horovod:2", 2)])
def test_a_ladder_has_no_more_traces_and_compilations_than_rungs_at_the_same_steps(world, workers):
    """By XLA's own account: it writes each program that it compiles. Forward and backward are compiled."""
    output = run(world, "shapes.py", "--rounds", 1, "--steps", 10, "--count")
    line = r"worker (\d), {}, XLA: (\d+) traces of the step, at steps \[([\d, ]+)\]; (\d+) compilations"
    with_buckets, without = (re.findall(line.format(name), output) for name in ("buckets of 6", "no buckets"))
    assert sorted(found[0] for found in with_buckets) == [str(worker) for worker in range(workers)], output
    assert len({found[1:] for found in with_buckets}) == 1  # the same on all
    traces, compilations = int(with_buckets[0][1]), int(with_buckets[0][3])
    assert 1 < traces == compilations <= 6
    assert all(int(found[1]) == int(found[3]) > 6 for found in without) and len(without) == workers


def test_planning():
    output = run("local", "planning.py", "--rounds", 1, "--examples", 1000)
    assert len(re.findall(r"│ +\d\.\d\d │", output)) == 4, output


def test_pipeline():
    """Each contender once, on two batches; which contenders of other libraries run depends on what is installed."""
    output = run("local", "pipeline.py", "--rounds", 1, "--examples", 128, "--workloads", "short", "several")
    for contender in (
        "padded_batch, mapped",
        "ragged_batch .*, unmapped",
        "bucket_by_sequence_length",
        "NumPy by hand, list",
    ):
        assert len(re.findall(f"│ {contender} +│ +[0-9]", output)) == 2, output  # a table for each workload
    for source in ("list", "list, sampler", "tf.data, mapped", "tf.data, unmapped", "Columns", "Columns, sampler"):
        assert len(re.findall(f"│ distpad, {source} +│ +[0-9]", output)) == 4, output  # and its epochs' beginnings


def test_pipeline_of_images_and_of_a_slow_source():
    workloads = ("float-images", "uint8-images", "slow")
    output = run("local", "pipeline.py", "--rounds", 1, "--examples", 128, "--workloads", *workloads)
    assert [output.count(f"{name}: batches of 64, 1 epochs of 64;") for name in workloads] == [1, 1, 1], output
    for reads in ("1 read", "16 reads", "sampler, 16 reads"):
        assert len(re.findall(f"│ distpad, {reads} +│ +[0-9]", output)) == 2, output


def test_waiting():
    output = run("local", "waiting.py", "--rounds", 1, "--steps", 4, "--ms", 1, 2)
    for contender in ("no input pipeline", "padded_batch, prefetch", "distpad, list", "distpad, Columns"):
        rows = re.findall(rf"│ {contender} +│ +(\d+\.\d\d) │ +(\d+\.\d\d) │", output)
        assert len(rows) == 2 and all(0 <= float(share) <= 100 for share in rows[0]), output


def test_padding():
    output = run("local", "padding.py", "--rounds", 1, "--count", 64, "--repeats", 1)
    bases = {"keras.utils.pad_sequences": 4, "to_tensor": 1, "a NumPy loop": 2}
    for contender, tables in {**bases, "pad": 7, "pad, mask=False": 5, "distpad.pad_sequences": 4}.items():
        found = re.findall(rf"│ {re.escape(contender)} +│ +\d", output)
        assert len(found) == 2 * tables, output  # wall time and CPU time


def gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BENCHMARKS / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=4 * LIMIT_S, stdin=subprocess.DEVNULL)


@pytest.mark.timeout(5 * LIMIT_S)
def test_the_script_for_gpus_on_the_cpu():
    done = gpu("--cpu", "float32, XLA", "mixed precision", "overhead, XLA", "wrapper")
    assert done.returncode == 0, done.stdout + done.stderr
    report = (BENCHMARKS.parent / "runs" / "gpu" / "current.txt").read_text()
    summary = report.partition("== summary: 2 CPU devices, which say nothing of GPUs\n")[2].splitlines()
    ran = [tuple(re.split(r"  +", line)[:3]) for line in summary if line]
    certified = [(name, engine, "passed") for name in ("float32, XLA", "mixed precision") for engine in ENGINES]
    assert ran == [
        *certified,
        ("wrapper", "mirrored", "passed"),
        *(("overhead, XLA", e, "passed") for e in ENGINES[1:]),
    ]
    assert len(re.findall(r"distpad certificate: .*2 replicas", report)) == 6 and "NCCL: none" in report


def test_convergence():
    output = run("local", "convergence.py", "--seeds", 1, "--steps", 1, "--eval-strings", 4)
    for batches in ("full shuffle", "similar widths", "a budget of columns"):
        assert re.search(rf"{batches}.*\d\.\d\d", output), output


@pytest.mark.parametrize(("world", "replicas"), [("local", 1), ("local", 2), ("horovod:2", 2)])
def test_wrapper(world, replicas):
    asked = ["--replicas", replicas] if world == "local" else []
    output = run(world, "wrapper.py", "--rounds", 1, "--steps", 2, "--units", 8, *asked)
    assert f"{replicas} replicas" in output
    for contender in ("by hand", "denominator given", "counting in the step"):
        assert len(re.findall(rf"│ {contender} +│ +\d", output)) == 1, output


def test_drift():
    """On 2 replicas: local means go elsewhere than on one, distpad's does not."""
    output = run("local", "drift.py", "--steps", 3, "--replicas", 1, 2)
    found = {
        name.strip(): (float(one), float(two))
        for name, one, two in re.findall(r"│ (\w+: .*?) │ +(\d\S+) │ +(\d\S+) │", output)
    }
    assert len(found) >= 9, output
    for name, (one, two) in found.items():
        if "distpad" in name:
            assert one <= 1e-5 and two <= 1e-5, output
        else:
            assert one > 1e-2 or two > 1e-2, output
    layers = {
        name.strip(): (float(padded), float(two))
        for name, padded, two in re.findall(r"│ (Keras's.*?|distpad.layers) +│ +(\d\S+) │ +(\d\S+) │", output)
    }
    assert len(layers) == 3 and max(layers.pop("distpad.layers")) < 1e-5, output
    assert all(two > 1e-2 for _, two in layers.values()), output


@pytest.mark.parametrize("world", ["local", "horovod:2"])
def test_fit(world):
    replicas = ["--replicas", 2] if world == "local" else []
    output = run(world, "fit.py", "--rounds", 1, "--steps", 3, "--units", 8, *replicas)
    assert "2 replicas" in output
    for contender in ("fit with for_keras", "a loop by hand", "fit, plain Keras with padded_batch"):
        assert len(re.findall(rf"│ {contender} +│ +\d", output)) == 1, output


@pytest.mark.parametrize("world", ["local", "horovod:2"])
def test_normalization(world):
    """distpad's layer is that of one device in all cases; Keras's own in none."""
    output = run(
        world, "normalization.py", "--rounds", 1, "--steps", 2, *(["--replicas", 2] if world == "local" else [])
    )
    found = re.findall(r"│ (Keras|distpad) +│ (\de[-+]\d\d) +│ (\de[-+]\d\d) +│ (\de[-+]\d\d) +│", output)
    assert [name for name, *_ in found] == ["Keras", "distpad"], output
    assert all(float(error) > 1e-2 for error in found[0][1:]) and all(float(error) < 1e-5 for error in found[1][1:])
