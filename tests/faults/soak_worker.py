"""A worker that trains with epochs of a second for some time: run by test_soak.py, in a world.

    soak_worker.py FOLDER SECONDS LEAK

It writes its memory, threads and open files after each epoch, one JSON list a line. Each step mostly sleeps. LEAK says
what it keeps after each epoch, to show that the test can fail: "thread", "array", "file" or "none".
"""

from __future__ import annotations

import json
import pathlib
import sys
import threading
import time

import numpy as np
import psutil
import tensorflow as tf

import distpad
from distpad import backends

STEPS, SLEEP_S = 4, 0.3
WIDTH = 8


def main(folder: pathlib.Path, seconds: float, leak: str) -> None:
    engine = backends.start()
    assert engine.num_workers == 2
    mine = range(engine.worker_index, 16, 2)
    examples = [{"x": np.ones([n % 5 + 1, WIDTH], "float32"), "y": np.ones([n % 5 + 1, 1], "float32")} for n in mine]
    with engine.scope():
        model = tf.keras.Sequential([tf.keras.Input([None, WIDTH]), tf.keras.layers.Dense(1)])
        optimizer = distpad.DistributedOptimizer(tf.keras.optimizers.SGD(0.01))
        optimizer.build(model.trainable_variables)
        loss_fn = distpad.DistributedLoss("mse")
        padding = {"x": distpad.Pad(), "y": distpad.Pad()}
        batches = distpad.PaddedBatches(
            examples, 2, padding=padding, tokens="y", buckets=distpad.Buckets([5]), timeout_s=60
        )

    def train(batch):
        with tf.GradientTape() as tape:
            loss = loss_fn(batch.data["y"], model(batch.data["x"]), batch=batch)
        optimizer.apply_gradients(zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables))

    step = tf.function(lambda batch: engine.strategy.run(train, args=(batch,)) if engine.strategy else train(batch))
    kept = []
    leaks = {
        "thread": lambda: threading.Thread(target=time.sleep, args=(seconds,), daemon=True).start(),
        "array": lambda: kept.append(np.ones(1 << 18)),
        "file": lambda: kept.append(open(__file__)),  # noqa: SIM115 (it is left open on purpose)
        "none": lambda: None,
    }
    process, end = psutil.Process(), time.monotonic() + seconds
    with (folder / f"worker-{engine.worker_index}").open("w", buffering=1) as samples:
        while not engine.host_max(np.array([float(time.monotonic() > end)]))[0]:
            for batch in batches:
                step(batch)
                time.sleep(SLEEP_S)
            leaks[leak]()
            sample = process.memory_info().rss / 2**20, process.num_threads(), process.num_fds()
            samples.write(json.dumps(sample) + "\n")
    engine.close()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
