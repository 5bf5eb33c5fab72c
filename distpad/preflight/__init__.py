"""``distpad doctor``: facts of each host, and findings from them. This package does not import TensorFlow.

facts.py runs on each host and changes nothing. hosts.py starts it there. checks.py turns facts into findings.
"""
