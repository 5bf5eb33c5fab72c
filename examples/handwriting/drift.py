"""Measure how far the weights drift from those of one device, with distpad and with the mean of means.

The optimiser is plain gradient descent. An optimiser that normalises its steps hides a wrong gradient scale.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from distpad import backends
from handwriting import engines, learner, model, rows
from handwriting.engines import Engine

STEPS = 60
LEARNING_RATE = 0.05


def measure(
    engine: Engine, data: rows.Rows, config: model.Config, batch_size: int, steps: int = STEPS
) -> dict[str, object]:
    """Compare the weights after each step with the weights of one device that trains on the same global batches.

    Collective: all workers call it. Only worker 0 trains the single device and gets distances.

    Returns:
        A dict for ``save``: "backend", "replicas", "batch_size", "distpad" and "naive" (the distance after each step,
        ``|w - w1| / |w1|``), "seconds".
    """
    start = time.monotonic()
    weights = model.build(config).get_weights()
    # All workers build the single device's learner, so that layer names are equal on all. Only worker 0 trains it.
    own = steps if engine.worker == 0 else 0
    alone = functools.partial(_train, engines.LOCAL, data, config, batch_size, own, weights, naive=False)
    single = backends.run_alone(lambda: list(alone()))
    result: dict[str, object] = {"backend": engine.name, "replicas": engine.replicas, "batch_size": batch_size}
    for name, naive in (("distpad", False), ("naive", True)):
        several = _train(engine, data, config, batch_size, steps, weights, naive=naive)
        distances = [_distance(here, there) for here, there in zip(several, single or _nothing())]
        result[name] = distances
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def save(result: dict[str, object], folder: Path) -> None:
    """Write one engine's result to a file that ``load_all`` reads."""
    path = folder / f"drift-{result['backend']}-{result['replicas']}.json"
    path.write_text(json.dumps(result) + "\n")


def load_all(folder: Path) -> list[dict]:
    """Load the results of all engines in a folder. The report shows them side by side."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("drift-*.json"))]


def _train(
    engine: Engine,
    data: rows.Rows,
    config: model.Config,
    batch_size: int,
    steps: int,
    weights: list[np.ndarray],
    *,
    naive: bool,
) -> Iterator[np.ndarray]:
    """Yield the weights after each step, as one vector."""
    optimizer = functools.partial(tf.keras.optimizers.SGD, LEARNING_RATE)
    trained = learner.Learner(engine, config, optimizer, naive=naive)
    trained.model.set_weights(weights)
    trained.broadcast()
    if not steps:
        return
    for batch in rows.shuffled_batches(engine, data, batch_size, steps):
        trained.step(batch)
        yield np.concatenate([array.ravel() for array in trained.model.get_weights()])


def _distance(weights: np.ndarray, single: np.ndarray | None) -> float:
    if single is None:
        return float("nan")
    single = single.astype(np.float64)
    return float(np.linalg.norm(weights - single) / np.linalg.norm(single))


def _nothing() -> Iterator[None]:
    while True:
        yield None
