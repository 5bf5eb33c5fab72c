"""A small training for pods: one sum over all workers per step.  summing.py STEPS [SECONDS-PER-STEP]"""

import sys
import time

import numpy as np
import tensorflow as tf

from distpad import backends

engine = backends.start()
counter = tf.Variable(0.0)


@tf.function
def step():
    def one():
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.ones([]))

    return engine.strategy.run(one)


print(f"worker {engine.worker_index} of {engine.num_workers} sums", flush=True)
for number in range(int(sys.argv[1])):
    assert np.asarray(step()) == engine.num_workers
    print(f"step {number}", flush=True)
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
engine.close()
