"""A thread of one worker's pipeline that cannot be started, or dies, reaches all workers at once."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

import distpad
from replica_world import HANG_S


@pytest.mark.parametrize("name", ["distpad-reader", "distpad-padder", "distpad-read"])
@pytest.mark.parametrize("starts", [False, True])
def test_a_dead_thread_of_one_worker_reaches_all(world, monkeypatch, name, starts):
    worker, last = world.backend.worker_index, world.backend.num_workers - 1
    rows = [{"y": np.array([worker, i])} for i in range(16)]

    class Source:
        __len__ = rows.__len__
        __getitem__ = lambda self, index: rows[index]

    given = {"padding": {"y": distpad.Pad()}, "tokens": "y", "backend": world.backend, "num_parallel_reads": 2}
    batches = distpad.PaddedBatches(Source(), 2, timeout_s=30, **given)  # whose error has another text
    method = "run" if starts else "start"
    original = getattr(threading.Thread, method)

    def changed(self):
        if self.name != name or worker != last:
            original(self)
        elif not starts:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, method, changed)
    own = distpad.DistpadError if starts else RuntimeError
    kind, text = (
        (own, name) if worker == last and starts else (own, "can't") if worker == last else (distpad.PeerError, "")
    )
    began = time.monotonic()
    with pytest.raises(kind, match=text or f"worker {last} failed at step 0"):
        list(batches)
    assert time.monotonic() - began < HANG_S
