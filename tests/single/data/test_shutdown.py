"""A process that feeds fit ends, also where an error keeps its iterator and a thread of tf.data is in Python."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import time
import numpy as np, tensorflow as tf, distpad
from distpad.data import keras as feeding

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
made_of = feeding.Elements.of

def slowly(*arguments):
    time.sleep(0.3)  # so that the feed is always behind
    return made_of(*arguments)

feeding.Elements.of = slowly
examples = [{"x": np.ones([n, 2], "f4"), "y": np.zeros([n, 1], "f4")} for n in range(1, 200)]
padding = {"x": distpad.Pad(), "y": distpad.Pad()}
batches = distpad.PaddedBatches(examples, batch_size=2, padding=padding, tokens="y", backend=strategy)

class Stop(tf.keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 3:
            raise KeyError("enough")

with strategy.scope():
    model = tf.keras.Sequential([tf.keras.Input([None, 2]), tf.keras.layers.Dense(1)])
    squares = tf.keras.losses.MeanSquaredError(reduction="none")
    model.compile(loss=distpad.DistributedLoss(squares), optimizer="sgd")
model.fit(batches.for_keras(x="x", y="y"), verbose=0, callbacks=[Stop()])
"""


@pytest.mark.wide  # in the worlds, an error of the source ends fit, too
def test_after_an_error_in_fit():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "KeyError: 'enough'" in done.stderr
