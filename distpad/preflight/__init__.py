"""``distpad doctor``: facts of each host, and what they mean for a job. Nothing here imports TensorFlow.

facts.py runs on each host and only looks; hosts.py brings it there; checks.py knows what is wrong and what to do.
"""
