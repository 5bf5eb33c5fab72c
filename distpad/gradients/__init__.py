"""Gradients of the global batch: reduced, accumulated over micro-batches, clipped, and applied."""

from distpad.gradients.accumulation import GradientAccumulator
from distpad.gradients.clipping import clip_by_global_norm
from distpad.gradients.compute import broadcast_variables, global_value, gradient, scale_regularization
from distpad.gradients.optimizer import DistributedOptimizer

__all__ = [
    "DistributedOptimizer",
    "GradientAccumulator",
    "broadcast_variables",
    "clip_by_global_norm",
    "global_value",
    "gradient",
    "scale_regularization",
]
