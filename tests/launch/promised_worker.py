"""A worker that starts the engine it was started for. Run by test_promises.py, under promises kept and broken."""

import sys

from distpad import backends

engine = backends.start(sys.argv[1] if len(sys.argv) > 1 else "auto")
print(f"worker {engine.worker_index} of {engine.num_workers} trains", flush=True)
engine.close()
