"""A worker of a small job in which one worker waits at the begin of a phase for its fault: run by test_phases.py.

    phases_worker.py FOLDER PHASE VICTIM

The victim writes its process id to FOLDER/reached and sleeps, and the others wait for it in the phase's collective.
"""

from __future__ import annotations

import os
import pathlib
import sys
import time

import numpy as np
import tensorflow as tf

import distpad
from distpad import backends

RANKS = ("DISTPAD_RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK")
WORKER = next(int(os.environ[name]) for name in RANKS if name in os.environ)


def main(folder: pathlib.Path, phase: str, victim: int) -> None:
    def reach(name: str) -> None:
        if name == phase and victim == WORKER:
            (folder / "pid").write_text(str(os.getpid()))
            (folder / "pid").rename(folder / "reached")
            time.sleep(600)

    class Examples(list):
        def __getitem__(self, index):
            if index == 12 + WORKER:  # of the second half
                reach("reading")
            return {"x": np.ones([index % 3 + 1, 2], "float32"), "y": np.ones([index % 3 + 1, 1], "float32")}

    reach("start")
    engine = backends.start()
    assert (engine.num_workers, engine.worker_index) == (2, WORKER)
    with engine.scope():
        reach("broadcast")
        weights = tf.Variable(tf.ones([2, 1]))
        loss_fn, metric = distpad.DistributedLoss("mse"), distpad.metrics.MaskedMean()
        padding = {"x": distpad.Pad(), "y": distpad.Pad()}
        batches = distpad.PaddedBatches(
            Examples([None] * 16), 2, padding=padding, tokens="y", lookahead=1, replicated=True, timeout_s=120
        )
    distpad.broadcast_variables([weights], backend=engine)

    def train(batch):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            predictions = tf.einsum("blw,wo->blo", batch.data["x"], weights)
            loss = loss_fn(batch.data["y"], predictions, batch=batch)
        metric.update_state(batch.data["y"], predictions, lengths=batch.lengths["y"])
        (gradient,) = distpad.gradient(tape, loss, [weights])
        return engine.all_reduce(gradient) if engine.strategy else gradient

    step = tf.function(lambda batch: engine.strategy.run(train, args=(batch,)) if engine.strategy else train(batch))
    for number, batch in enumerate(batches):
        if number == 1:
            reach("gradient")
        step(batch)
    reach("evaluating")
    assert float(metric.result()) == 2
    if victim == WORKER:
        reach("saving")
    engine.host_max(np.ones(1))
    reach("exit")
    engine.close()
    print(f"worker {WORKER} is done", flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
