"""fit with a callback that stops the first worker within an epoch; prints "worker N: SECONDS: ERROR" on each."""

from __future__ import annotations

import time

import numpy as np
import tensorflow as tf

import distpad
from distpad.backends import fit_checks
from distpad.versions import KERAS

fit_checks._LIMIT_S = 5.0
engine = distpad.backends.start()
worker = engine.worker_index


class Stops(tf.keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = worker == 0


examples = [{"x": np.ones([n, 1], "float32"), "y": np.ones([n, 1], "float32")} for n in range(1 + worker, 17)]
with engine.scope():
    model = tf.keras.Sequential([tf.keras.Input([None, 1]), tf.keras.layers.Dense(1, kernel_initializer="ones")])
    optimizer = distpad.DistributedOptimizer(tf.keras.optimizers.SGD(0.01))
    model.compile(loss=distpad.DistributedLoss("mse"), optimizer=optimizer)
    padding = {"x": distpad.Pad(), "y": distpad.Pad()}
    batches = distpad.PaddedBatches(examples, 2, padding=padding, tokens="y", timeout_s=20)
repeat = KERAS < 3 and engine.strategy is not None
fed = batches.for_keras(x="x", y="y", repeat=repeat)
started = time.monotonic()
try:
    model.fit(fed, epochs=2, verbose=0, callbacks=[Stops()], **({"steps_per_epoch": 8} if repeat else {}))
    found = "none"
except Exception as error:
    found = " ".join(str(error).split())
print(f"worker {worker}: {time.monotonic() - started:.1f}: {found}", flush=True)
if found != "none":
    raise SystemExit(1)
