"""Each loss of tests/every_loss.py, averaged over all replicas: the gradients of one device.

Where DISTPAD_LOSS_TABLE names a folder, the errors found are written there, for tests/loss_table.py.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf

import distpad
import every_loss
import oracle

WORLDS = ("local", "onedevice", "mirrored:2", "multiworker:2", "horovod:2", "mpirun:2")

LIMIT = {"float64": 1e-12, "float32": 1e-5}
EVERYWHERE = {"CategoricalCrossentropy, smoothed": "float64", "tf.nn.ctc_loss, dense labels": "float32"}


@pytest.fixture
def floatx():
    """Keras's losses compute in this dtype, whatever they are shown."""
    before = tf.keras.backend.floatx()
    yield tf.keras.backend.set_floatx
    tf.keras.backend.set_floatx(before)


def error_of(world, case, dtype, floatx, graph):
    """The largest relative error of a gradient on any replica."""
    floatx(case.dtypes[0])
    wanted = every_loss.expected(case, [row for r in range(world.num_replicas) for row in every_loss.rows_of(case, r)])
    floatx(dtype)
    loss_fn = distpad.DistributedLoss(case.make(), per=case.per, backend=world.backend)
    with world.scope():
        variables = [tf.Variable(value.astype(dtype)) for value in every_loss.weights()]

    def step(batch):
        with tf.GradientTape() as tape:
            y_pred = case.activate(batch["x"] @ variables[0] + variables[1])
            labels = batch["y"]
            if case.per == "sequence":
                labels = (labels, batch["lengths"], batch["frames"])
            else:  # what the model makes of padding may be anything
                real = tf.sequence_mask(batch["lengths"], tf.shape(y_pred)[1])[..., None]
                y_pred = tf.where(real, y_pred, tf.cast(np.nan, dtype))
            loss = loss_fn(labels, y_pred, lengths=batch["lengths"])
        return world.reduce(distpad.gradient(tape, loss, variables, backend=world.backend))

    given = lambda r: every_loss.padded(case, every_loss.rows_of(case, r), dtype)
    results = world.run(step, given, graph=graph)
    assert results
    found = max(max(map(oracle.relative_error, gradients, wanted)) for gradients in results.values())
    return float(world.backend.host_max(np.array([np.nan_to_num(found, nan=np.inf)]))[0])


def note(world, name, dtype, error):
    folder = os.environ.get("DISTPAD_LOSS_TABLE")
    if folder and world.backend.worker_index == 0:
        path = pathlib.Path(folder) / f"{os.environ['DISTPAD_WORLD']}.json"
        cells = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**cells, f"{name}|{dtype}": error}, indent=1))


def cases():
    """Each loss in each dtype eagerly, by default under one engine, whose sums are all that the others do otherwise; in
    a graph and by default under every engine, one loss of each kind: of positions and of sequences."""
    one, wide = pytest.mark.worlds("mirrored:2"), pytest.mark.wide
    for name, dtype, graph in itertools.product(every_loss.CASES, LIMIT, [False, True]):
        marks = (wide if graph else one) if name not in EVERYWHERE or dtype != EVERYWHERE[name] else ()
        if every_loss.missing(name) or dtype in every_loss.CASES[name].dtypes:
            yield pytest.param(name, dtype, graph, marks=marks)


@pytest.mark.parametrize(("name", "dtype", "graph"), cases())
def test_a_loss_has_the_gradients_of_one_device(world, name, dtype, graph, floatx):
    case = every_loss.CASES[name]
    if every_loss.missing(name):
        pytest.skip(every_loss.missing(name))
    error = error_of(world, case, dtype, floatx, graph)
    note(world, name, dtype, error)
    assert error <= LIMIT[dtype]
