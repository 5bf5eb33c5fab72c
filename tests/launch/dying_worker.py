"""A worker that dies before a collective that the other worker has entered. Run by test_launch.py, under a launcher."""

import os
import sys
import time

import tensorflow as tf

import distpad

backend = distpad.backends.start("auto")
assert backend.num_workers == 2, "a test of two workers"
loss_fn = distpad.DistributedLoss(lambda t, p: tf.abs(t - p), backend=backend)


def step(x: tf.Tensor) -> tf.Tensor:
    return loss_fn(tf.zeros_like(x), x)


backend.run(step, lambda r: tf.ones([1, 2]))
print(f"worker {backend.worker_index} made a step", flush=True)
if backend.worker_index == 1:
    time.sleep(1)  # the other worker waits in its step by now
    os._exit(7)
backend.run(step, lambda r: tf.ones([1, 2]))
print("a step without the other worker: this must not be reached", flush=True)
sys.exit(0)
