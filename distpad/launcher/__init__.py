"""The implementation of ``distpad launch``. This package does not import TensorFlow, except builds.py.

spec.py defines a job, render.py turns it into command lines and environments, and run.py runs it. On each host, an
agent (agent.py) configures the workers and kills leftover processes. Each worker's command runs under a small parent
process (worker.py). The launcher therefore supervises all engines' jobs alike, whichever program starts the workers.
For Kubernetes, kubernetes.py defines a job and kustomize.py makes manifests of it, which starts nothing.
"""
