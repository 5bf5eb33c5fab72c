"""Makes Python programs start faster: the tests, which start many, have this folder on PYTHONPATH.

Keras imports scikit-learn and matplotlib where they are installed, which takes a third of the 5 s of an import of
TensorFlow. Only the examples, the benchmarks and the documents need them.
"""

import sys

if not any(folder in word for word in sys.orig_argv[1:] for folder in ("examples", "benchmarks", "docs")):
    sys.modules["sklearn"] = sys.modules["matplotlib"] = None  # type: ignore[assignment]
