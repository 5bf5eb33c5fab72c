"""Shared code of the label kinds: start an engine, run each way of averaging, and compare with one device.

Import this module before TensorFlow, because TensorFlow reads its log level on import.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # oneDNN prints its note at any log level

import numpy as np
import tensorflow as tf

import distpad

tf.get_logger().setLevel("ERROR")

LIMIT = 1e-5  # on distpad's gradient error, from the precision of float32
DISTPAD, KERAS, OWN = "distpad", "plain Keras: the mean with its padding", "each replica's mean of valid positions"

Batch = dict  # name -> array; in a replica's step, name -> tensor
Step = Callable[[Any, Batch], tuple]  # (model, batch) -> (loss, gradients), run on each replica


class Kind(NamedTuple):
    """One kind of labels, and the ways to train on them.

    Attributes:
      title: title of the table.
      inputs, outputs: sizes of the model, which is linear at each position.
      sequences: ``replica -> (features, labels)``, two lists with one item for each sequence. An item is an array
        ``[positions..., inputs]``, or a list of arrays. Labels have the form that ``by_hand`` takes.
      by_hand: the loss in NumPy: ``(labels, logits) -> (sum over the positions, its derivative by logits)``.
      ways: name -> the function that pads ``(features, labels)`` on the host, and the step that each replica runs.
    """

    title: str
    inputs: int
    outputs: int
    sequences: Callable[[int], tuple[list, list]]
    by_hand: Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]
    ways: dict[str, tuple[Callable[[list, list], Batch], Step]]


class Linear:
    """Compute ``features @ kernel + bias`` at each position. Rows are independent, so gradients are comparable."""

    def __init__(self, inputs: int, outputs: int) -> None:
        random = np.random.default_rng(7)
        self.kernel = tf.Variable(random.normal(size=[inputs, outputs]), dtype=tf.float32)
        self.bias = tf.Variable(random.normal(size=[outputs]), dtype=tf.float32)
        self.variables = [self.kernel, self.bias]

    def __call__(self, features: tf.Tensor) -> tf.Tensor:
        return tf.tensordot(features, self.kernel, 1) + self.bias


def lengths(random: np.random.Generator, rows: int) -> np.ndarray:
    """Draw lengths like those of captions, transcripts and sentences: many are short, a few are long."""
    return np.clip(random.lognormal(2.0, 0.8, size=rows).astype(int), 1, 60)


def mean_of_means(loss: Callable[[Any, Batch], tf.Tensor]) -> Step:
    """Return the usual training step: each replica takes a mean, and the engine averages the means."""

    def step(model: Linear, batch: Batch) -> tuple:
        engine = distpad.backends.resolve()
        with tf.GradientTape() as tape:
            mean = loss(model, batch)
            if engine.gradient_reduction == "sum":  # Keras does this under strategies; Horovod averages itself
                mean /= engine.num_replicas
        return mean, distpad.gradient(tape, mean, model.variables)

    return step


def main(*kinds: Kind, arguments: Sequence[str] | None = None) -> int:
    """Print the table of each kind. Return exit code 1 if distpad's gradients differ from those of one device."""
    parser = argparse.ArgumentParser(description="Compares the gradients of several replicas with those of one device.")
    parser.add_argument("--backend", default="auto", choices=["auto", "local", "mirrored", "multiworker", "horovod"])
    parser.add_argument("--replicas", type=int, help="number of replicas; mirrored creates this number of CPU devices")
    parser.add_argument("--limit", type=float, default=LIMIT, help="maximum gradient error (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        backend = distpad.backends.start(options.backend, options.replicas)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    passed = [_compare(kind, backend, options.limit) for kind in kinds]
    sys.stdout.flush()
    return 0 if all(passed) else 1


def _compare(kind: Kind, backend: distpad.backends.Backend, limit: float) -> bool:
    """Run all ways of one kind and print its table. Collective; the result is equal on all workers."""
    rows = [kind.sequences(replica) for replica in range(backend.num_replicas)]
    strategy = getattr(backend, "strategy", None)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = Linear(kind.inputs, kind.outputs)
    distpad.broadcast_variables(model.variables, backend=backend)
    true_loss, true_gradient = _one_device(kind, model, rows)
    losses, errors = {"one device, sequence by sequence": true_loss}, {}
    for name, (pad, step) in kind.ways.items():
        losses[name], gradient = _run(backend, model, step, [pad(*replica) for replica in rows])
        errors[name] = float(np.abs(gradient - true_gradient).max() / np.abs(true_gradient).max())
    passed = errors[DISTPAD] <= limit  # NaN does not pass
    if backend.worker_index == 0:
        numbers = f"replicas: {backend.num_replicas}, workers: {backend.num_workers}"
        print(f"\n{kind.title}\n{backend.name}, {numbers}, sequences: {sum(len(labels) for _, labels in rows)}")
        print(f"{'':40}{'loss':>9}{'loss error':>12}{'gradient error':>17}")
        for name, loss in losses.items():
            figures = f"{abs(loss / true_loss - 1):>12.2%}{errors[name]:>17.1e}" if name in errors else ""
            print(f"{name:40}{loss:>9.5f}{figures}")
        print(f"The gradient of plain Keras is off by {errors[KERAS]:.1%} of its size.")
        if not passed:
            print(f"NOT PASSED: distpad's gradient error is {errors[DISTPAD]:.1e}, expected at most {limit:.0e}.")
    return passed


def _run(backend: distpad.backends.Backend, model: Linear, step: Step, batches: list[Batch]) -> tuple:
    """Return the global loss, and the gradient of the optimiser step as one vector. Collective."""

    def on_replica(batch: Batch) -> tuple:
        loss, gradients = step(model, batch)
        # A training loop calls optimizer.apply_gradients here. Under a strategy, that call sums over the replicas.
        return loss, backend.reduce_in_optimizer(gradients)

    results = backend.run(on_replica, lambda replica: batches[replica])
    local = np.array(sum(float(loss) for loss, _ in results))  # local contributions; a loop calls distpad.global_value
    loss = float(backend.host_sum(local)) / backend.gradient_scale
    return loss, np.concatenate([gradient.numpy().ravel() for gradient in results[0][1]])


def _one_device(kind: Kind, model: Linear, rows: list[tuple[list, list]]) -> tuple[float, np.ndarray]:
    """Compute the mean over all positions of all replicas, and its gradient, in float64 NumPy without padding."""
    kernel, bias = (variable.numpy().astype("float64") for variable in model.variables)
    total, positions, d_kernel, d_bias = 0.0, 0, np.zeros_like(kernel), np.zeros_like(bias)
    for features, labels in rows:
        for x, y in zip(_arrays(features), _arrays(labels)):
            x = x.reshape(-1, kind.inputs).astype("float64")
            loss, slope = kind.by_hand(y, x @ kernel + bias)
            total, positions = total + loss, positions + len(x)
            d_kernel += x.T @ slope
            d_bias += slope.sum(axis=0)
    return total / positions, np.concatenate([d_kernel.ravel(), d_bias]) / positions


def _arrays(sequences: list) -> Iterator[np.ndarray]:
    """Yield the arrays of a nested list."""
    for item in sequences:
        if isinstance(item, list):
            yield from _arrays(item)
        else:
            yield item
