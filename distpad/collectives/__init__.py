"""Tensors made alike on all replicas, and gathered; and the checked all-gather under both."""

from distpad.collectives.global_max import gather, pad_to_global_max

__all__ = ["gather", "pad_to_global_max"]
