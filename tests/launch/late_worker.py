"""A program whose worker 0 finishes late: the other worker must wait for it before it exits."""

import time

import tensorflow as tf

from distpad import backends

engine = backends.start("multiworker", 2)
engine.host_sum(tf.constant([1.0]).numpy())
if engine.worker_index == 0:
    time.sleep(3)
print(f"worker {engine.worker_index} came at {time.time():.3f}", flush=True)
engine.close()
print(f"worker {engine.worker_index} left at {time.time():.3f}", flush=True)
