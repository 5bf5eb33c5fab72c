#!/usr/bin/env python
"""Valid positions per second: batches of similar lengths in a few buckets against the usual ways to pad.

All contenders train the same model on the same examples each epoch, 16 per replica. Two contenders use tf.data:
"per batch" pads to the longest example of a replica's batch, "fixed length" pads to the longest of the data set. Two
contenders use LengthSampler and PaddedBatches with 6 buckets: one by number of examples, the other by a token budget.
The second table shows the spread of step times, because workers wait for the slowest step: first as timed, then with
each step at the median of all steps of its shape. The median excludes other load on the machine.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import engine
import numpy as np
import rounds
import sequences
import tensorflow as tf
from rich.console import Console
from rich.table import Table

import distpad
from distpad import backends

EXAMPLES = """\
examples:
  horovodrun -np 2 python benchmarks/tokens.py
  launch/multiworker.sh -np 2 -- python benchmarks/tokens.py --set docstrings --rounds 3
"""
SIZE = 16  # examples per replica
BOUNDARIES = 6
OWN, LONGEST = "padded_batch, per batch", "padded_batch, fixed length"


def main() -> None:
    parser = rounds.parser(__doc__, EXAMPLES)
    parser.add_argument("--set", choices=sequences.SETS, default="lognormal", help="data set (default lognormal)")
    parser.add_argument("--examples", type=int, default=2048, metavar="N", help="examples of an epoch (default 2048)")
    parser.add_argument("--mixed-precision", action="store_true", help="compute in float16, as GPUs do fast")
    options = parser.parse_args()

    backend = engine.start(mixed_precision=options.mixed_precision)
    data = sequences.SETS[options.set](options.examples)
    lengths = np.array([len(item) - 1 for item in data])  # each position predicts the next character
    buckets = distpad.Buckets.from_lengths(lengths, BOUNDARIES)
    everyone = SIZE * backend.num_replicas
    budget = everyone * 256
    examples, tokens = f"LengthSampler, {everyone} examples", f"LengthSampler, {budget:,} tokens"
    sources: dict[str, Iterable[Any]] = {
        OWN: shuffled(backend, data, None),
        LONGEST: shuffled(backend, data, int(lengths.max())),
        examples: grouped(backend, data, buckets, lengths, global_batch_size=everyone),
        tokens: grouped(backend, data, buckets, lengths, max_tokens=budget),
    }
    ours = engine.Trainer(backend, model, functools.partial(our_loss, backend))
    any_length = dict.fromkeys("xy", tf.TensorSpec([SIZE, None], tf.int64))
    usual = engine.Trainer(backend, model, functools.partial(usual_loss, backend), batch=any_length)
    # shape and seconds of each step
    times: dict[str, list[tuple[tuple[int, ...], float]]] = {name: [] for name in sources}
    contenders: dict[str, Callable[[], float]] = {}
    for name, source in sources.items():
        step = (usual if name in (OWN, LONGEST) else ours).step
        contenders[name] = functools.partial(rate, step, source, times[name], int(lengths.sum()))
        contenders[name]()  # trace the step
        times[name].clear()
    chief = backend.worker_index == 0
    figures = rounds.take_turns(contenders, OWN, options.rounds, quiet=not chief)
    if not chief:
        return
    who = f"{backend.num_workers} workers ({backend.name})"
    title = f"{options.set}, {who}, {options.rounds} epochs of {len(data)} examples, buckets of {BOUNDARIES}"
    rounds.show(title, "1000 positions a second", figures, scale=1e-3)
    spread = Table(title="Times of the steps of an epoch", title_justify="left")
    for heading in ("contender", "steps", "shapes", "median, ms", "90th percentile over median", "by shape"):
        spread.add_column(heading, justify="left" if heading == "contender" else "right")
    for name, found in times.items():
        by_shape: dict[tuple[int, ...], list[float]] = {}
        for shape, seconds in found:
            by_shape.setdefault(shape, []).append(seconds)
        timed = [seconds for _, seconds in found]
        expected = [statistics.median(by_shape[shape]) for shape, _ in found]  # without other load on the machine
        over = (f"{np.percentile(each, 90) / statistics.median(each):.2f}" for each in (timed, expected))
        steps, median = len(found) // len(figures.own[name]), f"{1000 * statistics.median(timed):.1f}"
        spread.add_row(name, str(steps), str(len(by_shape)), median, *over)
    Console(width=110).print(spread)


def model() -> tf.keras.Model:
    layers = tf.keras.layers
    made = tf.keras.Sequential(
        [
            layers.Embedding(sequences.VOCABULARY, 32),
            layers.Conv1D(128, 5, padding="causal", activation="relu"),
            layers.Conv1D(128, 5, padding="causal", activation="relu"),
            layers.Dense(sequences.VOCABULARY),
        ]
    )
    made.build([None, None])
    return made


def entropy(true: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(true, tf.cast(logits, tf.float32))


def our_loss(backend: backends.Backend, trained: tf.keras.Model, batch: distpad.Batch) -> tf.Tensor:
    loss = distpad.DistributedLoss(entropy, backend=backend)
    return loss(batch.data["y"], trained(batch.data["x"]), lengths=batch.lengths["y"], denominator=batch.counts)


def usual_loss(backend: backends.Backend, trained: tf.keras.Model, batch: Any) -> tf.Tensor:
    """Compute a replica's mean over its own positions. The padding value is -1."""
    mask = batch["y"] >= 0
    each = entropy(tf.where(mask, batch["y"], 0), trained(tf.maximum(batch["x"], 0)))
    mean = tf.reduce_sum(tf.where(mask, each, 0.0)) / tf.cast(tf.math.count_nonzero(mask), tf.float32)
    return mean if backend.gradient_reduction == "mean" else mean / backend.num_replicas


def shuffled(backend: backends.Backend, data: list[np.ndarray], length: int | None) -> Iterable[Any]:
    """Build a tf.data pipeline without Python code. All workers shuffle alike, and each takes its shard."""
    flat, ends = tf.constant(np.concatenate(data)), tf.constant(np.cumsum([len(item) for item in data]))
    begins = tf.constant(np.cumsum([0] + [len(item) for item in data[:-1]]))

    def pair(i: tf.Tensor) -> dict[str, tf.Tensor]:
        item = flat[begins[i] : ends[i]]
        return {"x": item[:-1], "y": item[1:]}

    order = tf.data.Dataset.range(len(data)).shuffle(len(data), seed=0)
    mine = order.shard(backend.num_workers, backend.worker_index).map(pair)
    shapes, fill_values = {key: [length] for key in "xy"}, dict.fromkeys("xy", tf.constant(-1, flat.dtype))
    return mine.padded_batch(SIZE, shapes, fill_values, drop_remainder=True).prefetch(4)


def grouped(
    backend: backends.Backend, data: list[np.ndarray], buckets: distpad.Buckets, lengths: np.ndarray, **size: int
) -> distpad.PaddedBatches:
    sampler = distpad.LengthSampler(lengths, buckets=buckets, **size)
    source = [{"x": item[:-1], "y": item[1:]} for item in data]
    padding = {"x": distpad.Pad(), "y": distpad.Pad()}
    return distpad.PaddedBatches((source, sampler), padding=padding, tokens="y", buckets=buckets, backend=backend)


def rate(step: Callable[[Any], Any], source: Iterable[Any], times: list[Any], positions: int) -> float:
    """Return the valid positions per second of an epoch. Append shape and seconds of each step to ``times``."""
    began = last = time.perf_counter()
    for batch in source:
        value = step(batch)
        tf.nest.map_structure(lambda leaf: np.asarray(leaf), tf.nest.flatten(value, expand_composites=True))
        now = time.perf_counter()
        data = batch.data if isinstance(batch, distpad.Batch) else batch
        here = tf.nest.flatten(data["y"], expand_composites=True)[0]  # under a strategy, a value for each replica
        times.append((tuple(here.shape), now - last))
        last = now
    return positions / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
