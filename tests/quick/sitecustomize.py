"""Makes Python programs start faster: the tests, which start many, have this folder on PYTHONPATH.

Keras imports scikit-learn and matplotlib where they are installed, which takes a third of the 5 s of an import of
TensorFlow. Only the examples, the benchmarks and the documents need them. horovodrun imports TensorFlow only to ask
whether Horovod was built with Gloo, which launch/install_horovod.sh has tested.
"""

import sys
import types

if not any(folder in word for word in sys.orig_argv[1:] for folder in ("examples", "benchmarks", "docs")):
    sys.modules["sklearn"] = sys.modules["matplotlib"] = None  # type: ignore[assignment]
if any(word.endswith("/horovodrun") for word in sys.orig_argv[1:2]):
    sys.modules["horovod.tensorflow"] = asked = types.ModuleType("horovod.tensorflow")
    asked.gloo_built = lambda: True  # type: ignore[attr-defined]
