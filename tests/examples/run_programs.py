"""Run programs in one process a worker, one after the other, and save the history and the weights of each.

python tests/examples/run_programs.py FOLDER REPLICAS PROGRAM...
"""

from __future__ import annotations

import pathlib
import runpy
import sys

import numpy as np
import tensorflow as tf

from distpad import backends

folder, replicas, *programs = sys.argv[1:]
engine = backends.start(replicas=int(replicas))
backends.start = lambda *_, **__: engine  # most engines can be started only once
for program in programs:
    tf.keras.backend.clear_session()  # so that each program has the names of layers that it has alone
    sys.argv = [program]
    found = runpy.run_path(program, run_name="__main__")
    weights = {f"weight {number}": weight for number, weight in enumerate(found["model"].get_weights())}
    if engine.worker_index == 0:
        np.savez(
            pathlib.Path(folder, pathlib.Path(program).stem),
            replicas=engine.num_replicas,
            **weights,
            **found["history"],
        )
