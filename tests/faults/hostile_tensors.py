"""The public functions that run TensorFlow as targets: losses, metrics, layers, collectives, batches, certificates."""

from __future__ import annotations

import contextlib
import random
import tempfile
from typing import Any

import numpy as np
import tensorflow as tf
from hostile_values import Choices, integers, just, nearly, nest, options, ragged, small

import distpad
from distpad import backends, layers, metrics
from distpad.collectives import PreLengths

# Losses, metrics and layers.


def _labels(choose: Choices) -> Any:
    return choose.of(
        (
            lambda: tf.zeros([2, 3]),
            lambda: np.ones([2, 3], "f4"),
            lambda: [[1.0, 2.0, 0.0]] * 2,
            lambda: tf.zeros([2, 3, 1]),
            lambda: tf.ragged.constant([[1.0], [2.0]]),
            lambda: tf.zeros([2, 3], tf.int32),
            lambda: tf.constant([["a"]]),
        )
    )()


SOURCES = {
    "sample_weight": just([1.0, 2.0], np.ones([2, 3], "f4"), 1.0),
    "lengths": just([3, 1], np.array([0, 0]), PreLengths([1, 2])),
    "mask": just([[True, False, True]] * 2, np.ones([2], bool)),
}


def loss(choose: Choices) -> None:
    made = distpad.DistributedLoss(
        nearly(just("mse", tf.abs, lambda y, p: tf.abs(y - p), tf.keras.losses.MeanAbsoluteError()))(choose),
        **options(
            choose,
            average=just("token", "sequence_sum", "sequence_mean", 3.0),
            per=just("position", "sequence"),
            padding_value=small,
            backend=just("local", None),
            check_finite=just(True, False),
            name=just("a"),
        ),
    )
    made(
        *(nearly(_labels)(choose) for _ in range(2)),
        **options(
            choose,
            **SOURCES,
            denominator=just(
                3.0, distpad.Counts(3.0, 2.0), distpad.WeightedCounts(3.0, 2.0), distpad.Counts("a", None)
            ),
            batch=just(None),
        ),
    )


def ctc(choose: Choices) -> None:
    made = distpad.CTC(
        **{
            "blank_index": nearly(lambda c: c(4) - 1)(choose),
            **options(choose, too_long=just("error", "leave_out"), frames_per_step=lambda c: 1 + c(3)),
        }
    )
    right = (tf.ones([2, 2], tf.int32), tf.constant([1, 2]), tf.constant([4, 4]))
    made(nearly(just(right))(choose), nearly(just(tf.zeros([2, 4, 3])))(choose))


def counts(choose: Choices) -> None:
    distpad.global_value(nest(choose), **options(choose, backend=just("local")))


def metric(choose: Choices) -> None:
    name = choose.of(metrics.__all__)
    own = {
        "MaskedMean": {"function": just(tf.abs, None)},
        "TokenAccuracy": {"threshold": just(0.5)},
        "CharacterErrorRate": {"blank_index": small, "frames_per_step": small},
    }
    made = getattr(metrics, name)(**options(choose, padding_value=small, backend=just("local"), **own.get(name, {})))
    made.update_state(*(nearly(_labels)(choose) for _ in range(2)), **options(choose, **SOURCES))
    made.result()


def layer(choose: Choices) -> None:
    made = choose.of(
        (
            lambda: layers.Dropout(nearly(just(0.5))(choose), **options(choose, seed=small)),
            lambda: layers.SpatialDropout1D(nearly(just(0.5))(choose), **options(choose, seed=small)),
            lambda: layers.BatchNormalization(
                **options(choose, axis=just(-1, 2), momentum=just(0.9), epsilon=just(1e-3))
            ),
        )
    )()
    if isinstance(made, layers.BatchNormalization):
        made(
            tf.ones([2, 3, 4]), training=True, **options(choose, mask=just(np.ones([2, 3], bool)), lengths=just([3, 1]))
        )
    else:
        made(tf.ones([2, 3, 4]), training=True, **options(choose, indices=just([3, 1], np.array([0, 1]))))


# Collectives and gradients.


def _tensors(choose: Choices) -> Any:
    return choose.of(
        (
            tf.ones([2, 3]),
            {"a": tf.ones([2, 3]), "b": tf.ones([1, 2], tf.int32)},
            np.ones([2, 3, 1]),
            (tf.ones([0, 2]),),
            tf.constant([["a"]]),
        )
    )


def global_max(choose: Choices) -> None:
    distpad.pad_to_global_max(
        nearly(_tensors)(choose),
        **options(
            choose,
            axis=just(1, 0, -1),
            value=just(0, 1.5),
            lengths=just([2, 1]),
            buckets=just(distpad.Buckets([4]), distpad.Buckets.auto()),
            backend=just("local"),
        ),
    )


def gather(choose: Choices) -> None:
    distpad.gather(
        nearly(_tensors)(choose),
        **options(
            choose,
            axis=just(1, 2),
            value=just(0),
            lengths=just([2, 1]),
            rows=just(1, 2),
            indices=just([[0, 1]], None),
            backend=just("local"),
        ),
    )


def gradients(choose: Choices) -> None:
    variables = [tf.Variable([1.0, 2.0])]
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(variables[0])
    calls = (
        lambda: distpad.gradient(
            nearly(just(tape))(choose), nearly(just(value))(choose), nearly(just(variables))(choose)
        ),
        lambda: distpad.clip_by_global_norm(nearly(just([tf.ones([2])]))(choose), nearly(just(1.0))(choose)),
        lambda: distpad.broadcast_variables(nearly(just(variables))(choose), **options(choose, root=just(0))),
        lambda: distpad.scale_regularization(nearly(just([value]))(choose), **options(choose, backend=just("local"))),
        lambda: distpad.GradientAccumulator(nearly(just(variables))(choose)).add(
            tape, nearly(just(value))(choose), **options(choose, count=just(2.0))
        ),
        lambda: distpad.DistributedOptimizer(nest(choose)),
        lambda: distpad.ElasticState(nest(choose), **options(choose, batches=just(None))),
        lambda: distpad.Preemption(
            nearly(just(print))(choose), **options(choose, every=small, backend=just("local"))
        ).step(nearly(small)(choose)),
        lambda: backends.resolve(nest(choose)),
        lambda: (
            backends.HorovodBackend(
                **options(choose, op=just("average", "sum"), process_set=just(None), compression=just(None))
            )
            if choose(2)
            else backends.StrategyBackend(nest(choose))
        ),
        lambda: backends.start(nest(choose), nest(choose)),
    )
    choose.of(calls)()


# The input pipeline.


def _source(choose: Choices) -> Any:
    rows = [{"y": integers(choose), "x": 1.0} for _ in range(choose(4))]
    return choose.of(
        (
            lambda: rows,
            lambda: [{"y": ragged(choose)} for _ in range(3)],
            lambda: [{"y": nest(choose)}],
            lambda: (rows, distpad.LengthSampler([2] * len(rows), global_batch_size=2)),
            lambda: distpad.Columns({"y": [[1], [2, 3]]}),
            lambda: tf.data.Dataset.from_tensor_slices({"y": [[1], [2]]}),
            lambda: iter(rows),
        )
    )()


def batches(choose: Choices) -> None:
    made = distpad.PaddedBatches(
        nearly(_source)(choose),
        **{
            "padding": nearly(just({"y": distpad.Pad()}))(choose),
            "tokens": nearly(just("y"))(choose),
            "batch_size": nearly(just(1, 2))(choose),
            **options(
                choose,
                weights=just("x", None),
                buckets=just("auto", None, distpad.Buckets([8])),
                lookahead=lambda c: 1 + c(4),
                accumulation_steps=lambda c: 1 + c(3),
                num_parallel_reads=lambda c: 1 + c(2),
                drop_remainder=just(True, False),
                replicated=just(True, False),
                backend=just("local"),
                on_error=just("raise", "skip"),
                max_skipped=just(3, 0.5),
                warn_after_s=just(5.0),
                timeout_s=just(9.0),
            ),
        },
    )
    if choose(2):
        made.load_state_dict(
            nearly(lambda c: {**made.state_dict(), **options(c, epoch=small, step=small, begins=integers)})(choose)
        )
    if choose(2):
        made.watch(nearly(just([tf.Variable(1.0)]))(choose))
    iterator = iter(made)
    with contextlib.closing(iterator):
        for _ in range(3):
            if next(iterator, None) is None:
                break


def saving(choose: Choices) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        checkpoints = distpad.Checkpoints(
            nearly(just(folder))(choose),
            **options(choose, every_steps=lambda c: 1 + c(4), every_s=just(0.5), keep=small, sync_every=small),
            **options(choose, weight=just(tf.Variable([1.0])), random=just(random), own=just(np.random.default_rng())),
            backend="local",
        )
        if choose(2):
            checkpoints.restore()
        for _ in range(3):
            checkpoints.step(nearly(small)(choose))


def checks(choose: Choices) -> None:
    (batch,) = distpad.PaddedBatches([{"y": [1]}], 1, padding={"y": distpad.Pad()}, tokens="y")
    distpad.check_finite(
        nearly(_tensors)(choose),
        nearly(just(batch))(choose),
        **options(choose, name=just("gradient"), backend=just("local")),
    )


def features(choose: Choices) -> None:
    choose.of(
        (
            lambda: distpad.Pad(
                **options(
                    choose,
                    axis=just(0, (0, 1), [2]),
                    value=small,
                    side=just("pre", "post"),
                    max_length=lambda c: 1 + c(4),
                    truncating=just("error", "pre", "post"),
                )
            ),
            lambda: [*distpad.Columns(nearly(lambda c: {"y": c.one(ragged, nest), "x": nest(c)})(choose))],
            lambda: distpad.Lengths(nest(choose)),
            lambda: distpad.Mask(nest(choose)),
            lambda: distpad.PaddedBatches([{"y": [1]}], 1, padding={"y": distpad.Pad()}, tokens="y").for_keras(
                x=nest(choose), y=nest(choose), **options(choose, y_true=just(None), repeat=just(True))
            ),
        )
    )()


def certify(choose: Choices) -> None:
    """Each has an argument that is wrong for sure, since a certificate takes seconds."""
    distpad.certify(
        **{
            choose.of(("model", "loss", "step", "batch", "cases", "seed", "backend")): nest(choose),
            "cases": choose.of((0, -1, 1.5, np.True_, None, "a")),
            **options(choose, seed=small, model=nest, batch=nest),
        }
    )
