"""The public functions as targets: each calls one with arguments of ``Choices``, right, nearly right or wrong."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from hostile_values import (
    Choices,
    integers,
    just,
    nearly,
    nest,
    options,
    sequences,
    small,
)

import distpad
import padding_oracle
from distpad.cli import app
from distpad.cli import launch as launch_command
from distpad.data import chunks, plan, schema
from distpad.launcher import allocation, spec, topology

Target = Callable[[Choices], None]
SIDES = just("pre", "post")
FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="distpad-hostile-"))


# Padding on the host.


def pad(choose: Choices) -> None:
    batch = sequences(choose)
    given = options(
        choose,
        length=small,
        value=lambda c: c(9) - 4,
        padding=SIDES,
        truncating=just("pre", "post", "error"),
        dtype=just("int32", np.float32, "O", str, tf.int64, None),
        ragged_axes=just(0, (0,), (0, 1), [1], -1, None),
        mask=just(True, False),
    )
    padded = distpad.pad(batch, **given)
    if type(batch) is list:
        assert len(padded.values) == len(padded.lengths) == len(batch)
    if given.get("mask", True) and _is_plain(batch) and given.keys() <= {"length", "value", "padding", "truncating"}:
        axes = padding_oracle.ragged_axes(
            padding_oracle.cut(batch, given.get("length"), given.get("truncating", "post"))
        )
        assert padding_oracle.as_lists(padded) == padding_oracle.oracle(batch, axes, **given), (batch, given)


def _is_plain(batch: Any) -> bool:
    """Whether the oracle takes it: lists of lists of integers of Python, none of them empty."""
    return (
        type(batch) is list
        and len(batch) > 0
        and all(type(row) is list and row and set(map(type, row)) == {int} for row in batch)
    )


def pad_sequences(choose: Choices) -> None:
    batch = sequences(choose)
    given = options(
        choose,
        maxlen=small,
        value=small,
        padding=SIDES,
        truncating=SIDES,
        dtype=just("int32", "float32", object, bool, "uint8", None),
    )
    is_long = distpad.errors.is_integer(given.get("maxlen")) and given["maxlen"] > 2**24
    if is_long or (isinstance(batch, np.ndarray) and batch.size > 2**24):
        return  # results of gigabytes take seconds
    ours = _outcome(distpad.pad_sequences, batch, given)
    if "bytes of memory" in str(ours[1]):
        raise ValueError(ours[1])  # Keras would allocate it, or never return
    keras = _outcome(tf.keras.utils.pad_sequences, batch, given)
    if isinstance(keras[0], type) and issubclass(keras[0], MemoryError):
        keras = ours  # distpad raises ValueError before it allocates
    assert ours == keras, (batch, given, ours, keras)
    if isinstance(ours, tuple):
        raise ValueError(f"pad_sequences: {ours}")


def _outcome(function: Any, batch: Any, given: dict[str, Any]) -> Any:
    try:
        made = function(batch, **given)
        return repr(made.tolist()), made.shape, made.dtype
    except Exception as error:
        return type(error), str(error).partition(" at 0x")[0]


def unpad(choose: Choices) -> None:
    values = nearly(lambda c: np.arange(24).reshape(c.of([(2, 12), (2, 3, 4), (4, 6), (24,), (1, 2, 3, 4)])))(choose)
    rows, size = values.shape[:2] if isinstance(values, np.ndarray) and values.ndim > 1 and values.size < 99 else (2, 2)
    made = options(
        choose,
        lengths=lambda c: [c(size + 1) for _ in range(rows)],
        mask=lambda c: np.arange(rows * size).reshape(rows, size) % (2 + c(3)) > 0,
    )
    sequences_ = distpad.unpad(
        tf.constant(values) if choose(4) == 0 and isinstance(values, np.ndarray) and values.size < 99 else values,
        **made,
    )
    assert len(sequences_) == rows if isinstance(sequences_, list) else sequences_.shape[0] == rows


def pad_tensors(choose: Choices) -> None:
    def made(c: Choices) -> Any:
        rows = [[float(n) for n in range(c(4))] for _ in range(1 + c(3))]
        return c.of(
            [
                lambda: tf.ragged.constant(rows),
                lambda: [tf.constant(row) for row in rows],
                lambda: tf.constant([[1, 2], [3, 4]]),
                lambda: tf.constant([["a"]]),
                lambda: tf.sparse.from_dense([[1, 0]]),
                lambda: [tf.constant([1]), nest(c)],
                lambda: tf.constant(1),
            ]
        )()

    distpad.pad(
        made(choose),
        **options(
            choose,
            length=small,
            value=small,
            padding=SIDES,
            truncating=just("pre", "post", "error"),
            dtype=just(tf.float64, "int32", None),
            ragged_axes=just(0, 1, [0, 1]),
            mask=just(True, False),
        ),
    )


# Buckets and samplers.


def buckets(choose: Choices) -> None:
    kind = choose(4)
    if kind == 0:
        made = distpad.Buckets(
            nearly(lambda c: sorted({1 + each for each in map(abs, integers(c))}) or [1])(choose),
            **options(choose, beyond=just("raise", "multiples", "quarters")),
        )
    elif kind == 1:
        made = distpad.Buckets.multiples(nearly(lambda c: 1 + c(9))(choose))
    elif kind == 2:
        made = distpad.Buckets.geometric(
            *(nearly(right)(choose) for right in (lambda c: 1 + c(9), lambda c: 9 + c(300), lambda c: 1.1 + c(9) / 8))
        )
    else:
        lengths = nearly(lambda c: [abs(each) for each in integers(c)])(choose)
        made = distpad.Buckets.from_lengths(
            lengths, nearly(lambda c: 1 + c(5))(choose), **options(choose, beyond=just("raise", "multiples"))
        )
        assert made.boundaries[-1] == max(1, np.max(lengths))
    n = nearly(lambda c: c(400))(choose)
    boundary = made(n)
    assert (
        boundary >= n
        and made.boundary(made.index(n)) == boundary
        and (made.index(n) == 0 or made.boundary(made.index(n) - 1) < n)
    )


def sampler(choose: Choices) -> None:
    lengths = nearly(lambda c: [c(20) for _ in range(c(12))])(choose)
    size = {choose.of(("global_batch_size", "max_tokens")): nearly(lambda c: 1 + c(40))(choose)}
    made = distpad.LengthSampler(
        lengths,
        **{
            **size,
            **options(
                choose,
                buckets=lambda c: distpad.Buckets([8, 20]),
                shuffle=just(True, False),
                seed=small,
                randomness=just(0.0, 0.5, 1.0),
            ),
        },
    )
    epoch = nearly(small)(choose)
    steps = made.plan(epoch)
    assert sorted(index for step in steps for index in step) == [*range(len(made.lengths))]
    workers = nearly(lambda c: 1 + c(4))(choose)
    shard = made.shard(nearly(lambda c: c(2))(choose), workers)
    state = shard.state_dict()
    shard.set_epoch(epoch)
    assert len([*shard]) == len(steps)
    shard.load_state_dict(nearly(lambda c: {**state, **options(c, epoch=small, step=small)})(choose))
    _run(made.shard(choose(3), 3).load_state_dict, nest(choose))


def _run(function: Callable[..., Any], *args: Any) -> None:
    with contextlib.suppress(ValueError, TypeError):
        function(*args)


# The plan of a window.


def _config(choose: Choices) -> Any:
    made = {
        "accumulation_steps": 1 + choose(3),
        "buckets": choose.of((None, "auto", distpad.Buckets([8], beyond="multiples"))),
    }
    return distpad.PaddedBatches(
        [], 1, padding={"x": distpad.Pad(), "y": distpad.Pad((0, 1))}, tokens="y", **made
    )._config


def plans(choose: Choices) -> None:
    config, workers = _config(choose), 1 + choose(4)
    window = config.accumulation_steps * (1 + choose(3))
    packed, rows = [], np.zeros(window)
    for worker in range(workers):
        report = plan.Report.blank(config, window)
        for step in range(choose(window + 1)):
            report.longest[step] = [choose(40) for _ in config.axes]
            report.rows[step], report.tokens[step], report.sequences[step] = 1 + choose(4), choose(99), choose(4)
        report.digest, report.continues = float(choose(3)), choose(2) == 0
        report.failed_at = choose(window) if choose(4) == 3 else None
        rows += report.rows
        packed.append(plan.pack(report, worker, workers))
    maxima, sums = np.max([each for each, _ in packed], axis=0), np.sum([each for _, each in packed], axis=0)
    sizes_of = lambda _, agreed: config.padded_sizes(agreed, None, None)
    full = choose.of((None, 2))
    merged = plan.merge(maxima, sums, config=config, window=window, workers=workers, full_rows=full, sizes_of=sizes_of)
    assert len(merged.steps) % config.accumulation_steps == 0
    for step, planned in enumerate(merged.steps):
        assert planned.rows == rows[step] and all(
            size >= agreed >= 1 for size, agreed in zip(planned.sizes, planned.agreed)
        )


# The features of examples.


def _example(choose: Choices) -> Any:
    label = lambda c: c.one(integers, lambda c: np.array(integers(c)), lambda c: [[1, 2], [3]], nest)
    return choose.of(
        (
            lambda: {"x": 1.0, "y": label(choose)},
            lambda: (label(choose), 2),
            lambda: {"a": {"x": [1]}, "y": label(choose)},
            lambda: nest(choose),
        )
    )()


def schemas(choose: Choices) -> None:
    examples = [_example(choose)] * (1 + choose(2)) + choose.some(_example, 2)
    padding = {choose.of(("y", 0, "a/x")): distpad.Pad(choose.of((0, (0, 1), 1)))}
    features = schema.Features.learn(examples, padding, guess=choose(2) == 0)
    if features is None:
        return
    again = schema.Features.from_text(features.to_text(), padding)
    assert again.to_text() == features.to_text()
    columns = chunks.columns_of(features, examples, np.arange(len(examples)))
    assert all(column.num_examples == len(examples) for column in columns)


# The launcher's texts.


WORDS = (
    "a",
    "node1",
    ":",
    ",",
    "2",
    "-",
    "[",
    "]",
    "(x",
    ")",
    " slots=",
    "\n",
    "#",
    "=",
    "9" * 12,
    "9" * 5000,
    "\0",
    "é",
    "..",
    "~",
    "max-slots=3",
    "-p",
    "-i",
    "0",
    " ",
    "'",
)
YAML = ("np: ", "hosts: ", "command: ", "env: ", "config: ", "2", "- a", "[", "]", "{", "}", "&a ", "*a", "\n", "\n  ", ", ", ": ", "'", '"', "!!int ", "!!binary ", "!!python/object:os.system ", "9" * 5000, "2001-99-99", "1e400", ".inf", "<<: ", "no_retry: ", "backoff-s: ", "k8s: jobset", "tee: yes", "é", "\t", "? ", "0x", "null", "gpus: ", "--", "%YAML 9")  # fmt: skip
JSON = ("{", "}", "[", "]", '"cluster": ', '"task": ', '"worker"', '"chief"', ": ", ", ", '"a:1"', '"index": 0', "9" * 5000, "1e999", "NaN", "null", "true", '"\\ud800"', "\\", "[" * 3000, "1")  # fmt: skip


def words(choose: Choices, of: tuple[str, ...], most: int = 12) -> str:
    return "".join(choose.some(lambda c: c.of(of), most))


def hosts(choose: Choices) -> None:
    listed = words(choose, WORDS)
    path = FOLDER / "hosts"
    path.write_bytes(listed.encode() + choose.of((b"", b"\xff")))
    calls = (
        lambda: spec.parse_hosts(listed, choose.of((None, 0, 2))),
        lambda: spec.read_hostfile(path, choose.of((None, 2))),
        lambda: spec.parse_ranks(listed),
        lambda: spec.horovodrun_ssh_args(listed.split()),
        lambda: _in_allocation(choose, listed),
    )
    found = choose.of(calls)()
    assert len(found) <= 2 * spec.MOST_SLOTS


def _in_allocation(choose: Choices, tasks: str) -> Any:
    """Slurm's own program expands the names: a stand-in for it gives some."""
    before, allocation._expand = allocation._expand, lambda nodes: [f"n{i}" for i in range(choose(4))]
    try:
        tasks = choose.of((tasks, "2(x3)", "1(x999999999999)", "4,2(x2)"))
        return allocation.hosts({"SLURM_JOB_NODELIST": "n[0-3]", "SLURM_TASKS_PER_NODE": tasks})
    finally:
        allocation._expand = before


def tf_config(choose: Choices) -> None:
    right = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}'
    environ = {"TF_CONFIG": choose.one(just(right, right[:-1]), lambda c: words(c, JSON, 20))}
    for name in ("DISTPAD_WORKERS", "OMPI_COMM_WORLD_SIZE", "DISTPAD_HOSTS"):
        if choose(3) == 2:
            environ[name] = choose.of(("2", "", "-1", "9" * 5000, "２", "1.5", "a"))
    calls = (
        lambda: topology.expected_workers(environ),
        lambda: topology.refuse_alone("f", environ),
        lambda: topology.check(topology.Report("Horovod", 1, 1, 1), environ),
    )
    choose.of(calls)()


COMMAND = app.command("launch")


CONTEXT = COMMAND.make_context("launch", ["-np", "2", "true"])


def config_file(choose: Choices) -> None:
    path = FOLDER / "job.yaml"
    names = "abcdefghij"
    aliases = "".join(f"- &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip(names, names[1:]))
    bomb = just(f"hosts:\n- &a [x]\n{aliases}", f"env:\n- &a [x]\n{aliases}", "hosts: " + "[" * 3000, "env: &a {b: *a}")
    written = choose.one(lambda c: words(c, YAML, 20), lambda c: "np: 2\ncommand: python a\n" + words(c, YAML), bomb)
    path.write_bytes(written.encode() + choose.of((b"", b"", b"", b"\xff", b"\0")))
    if choose(64):  # the whole command line takes long
        launch_command._read_config(CONTEXT, path)
        return
    context = COMMAND.make_context("launch", ["--config", str(path)])
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in context.params.items()}
    launch_command._job(given, {})
