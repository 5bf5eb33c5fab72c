"""A worker that sends what no worker sends: all workers refuse it, and none unpickles it."""

from __future__ import annotations

import os
import pickle
import tempfile

import numpy as np
import pytest
import tensorflow as tf

import distpad
from distpad.backends import messages
from distpad.collectives import dataset
from distpad.data import epoch, plan, schema, watch

COUNT = 16


RAN = os.path.join(tempfile.gettempdir(), f"distpad-ran-{os.getpid()}")


class Evil:
    def __reduce__(self):
        return os.mkdir, (RAN,)


PICKLE = pickle.dumps(Evil(), protocol=0).decode("latin-1")


def made(world, **options):
    rows = [{"y": np.full(1 + i % 3, i)} for i in range(COUNT * world.backend.replicas_here)]
    given = {
        "padding": {"y": distpad.Pad()},
        "tokens": "y",
        "buckets": None,
        "lookahead": 4,
        "replicated": True,
        "timeout_s": 20,
    }
    return distpad.PaddedBatches(rows, 2, **given, backend=world.backend, **options)


@pytest.mark.parametrize("part", ["configuration", "examples", "checksums", "skipped", "report", "sizes"])
def test_a_broken_worker_is_refused_by_all(world, monkeypatch, part):
    batches = made(world, on_error="skip")
    is_broken = world.backend.worker_index == world.backend.num_workers - 1
    with world.backend.scope():
        weight = tf.Variable([1.0])
    if part == "checksums":
        batches.watch([weight])
    if is_broken and part == "configuration":
        make = epoch.Epoch.__init__

        def made_otherwise(self, *arguments):
            make(self, *arguments)
            self._configuration = PICKLE

        monkeypatch.setattr(epoch.Epoch, "__init__", made_otherwise)
    if is_broken and part == "examples":
        monkeypatch.setattr(schema.Features, "to_text", lambda self: PICKLE)
    if is_broken and part == "checksums":
        monkeypatch.setattr(watch.Watch, "checksum", lambda self: [1.0, -1.0])
        monkeypatch.setattr(watch.Watch, "describe", lambda self: PICKLE)
    if part == "skipped":
        batches = made(world, on_error="skip", max_skipped=0)
        if is_broken:
            dumps = epoch.json.dumps
            is_list = lambda value: isinstance(value, list)
            monkeypatch.setattr(epoch.json, "dumps", lambda given, **o: PICKLE if is_list(given) else dumps(given, **o))
        batches._source.given[3] = {"y": 1.5}
    if is_broken and part in ("report", "sizes"):
        pack = plan.pack

        def packed(*arguments):
            maxima, sums = pack(*arguments)
            (maxima if part == "sizes" else sums)[4 if part == "sizes" else 1] = 1e12 if part == "sizes" else -1e6
            return maxima, sums

        monkeypatch.setattr(plan, "pack", packed)
    with pytest.raises(distpad.PeerError, match="of another worker is malformed"):
        list(batches)
    assert not os.path.exists(RAN)


def test_rows_of_a_broken_worker_are_refused_by_all(world, monkeypatch):
    if world.backend.worker_index == world.backend.num_workers - 1:
        monkeypatch.setattr(dataset, "_packed", lambda *_: PICKLE.encode("latin-1"))
    with pytest.raises(distpad.PeerError, match="the rows of another worker is malformed"):
        distpad.gather(tf.ones([2, 3]), indices=[0, 1], backend=world.backend)


def test_an_elastic_state_of_a_broken_worker_is_refused(world, monkeypatch):
    if world.kind != "horovod":
        pytest.skip("Horovod's matter")
    state = distpad.ElasticState([tf.Variable(1.0)], backend=world.backend, step=np.int64(3), rates=(0.1, None))
    state.sync()
    assert state.step == 3 and state.rates == (0.1, None)
    if world.backend.worker_index == 0:
        monkeypatch.setattr(messages, "pack", lambda *_: PICKLE.encode("latin-1"))
    with pytest.raises(distpad.PeerError, match="malformed"):
        state.sync()
    assert not os.path.exists(RAN)
