"""Layers whose training step on many replicas equals that of one device."""

from distpad.layers.batch_normalization import BatchNormalization
from distpad.layers.dropout import Dropout, SpatialDropout1D

__all__ = ["BatchNormalization", "Dropout", "SpatialDropout1D"]
