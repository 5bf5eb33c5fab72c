"""A worker that starts its engine and prints its index. Run by test_topology.py, with right and wrong topologies."""

import sys

from distpad import backends

engine = backends.start(sys.argv[1] if len(sys.argv) > 1 else "auto")
print(f"worker {engine.worker_index} of {engine.num_workers} trains", flush=True)
engine.close()
