"""What ``distpad launch`` does: a job (spec) becomes command lines and environments (render), and is run (run).

On each host an agent serves the workers there, and ends what is left of them; each worker's program runs under a small
parent of ours (worker). So every engine's job is watched in the same way, whoever started its processes. Nothing here
imports TensorFlow. For a cluster of Kubernetes it prints manifests and starts nothing (kubernetes).
"""
