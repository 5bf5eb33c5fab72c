"""Makes Python programs start faster: the tests, which start many, have this folder on PYTHONPATH.

Keras imports scikit-learn and matplotlib where they are installed, which takes a third of the 5 s of an import of
TensorFlow. Only the examples, the benchmarks and the documents need them. horovodrun imports TensorFlow only to ask
whether Horovod was built with Gloo, which launch/install_horovod.sh has tested. For each of its commands, such as the
one that lists an elastic job's hosts, it starts a Python that imports horovodrun again, and needs nothing of it.
"""

import sys
import types


def stand_in(name: str, **attributes: object) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes)


words = sys.orig_argv[1:]
if not any(folder in word for word in words for folder in ("examples", "benchmarks", "docs")):
    sys.modules["sklearn"] = sys.modules["matplotlib"] = None  # type: ignore[assignment]
if any(word.endswith("/horovodrun") for word in words[:1]):
    stand_in("horovod.tensorflow", gloo_built=lambda: True)
if "--multiprocessing-fork" in words:
    stand_in("horovod.runner.launch", run_commandline=None)
