"""distpad pads labels of varying length alike on all replicas, and averages losses exactly over valid positions.

Names are imported from their modules on first use. ``import distpad`` therefore costs nothing, and commands that do
not need TensorFlow do not import it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PACKAGES = {
    "Batch": "data",
    "Buckets": "padding",
    "CTC": "losses",
    "Certificate": "certification",
    "Checkpoints": "saving",
    "Columns": "data",
    "Counts": "losses",
    "DistpadError": "errors",
    "DistributedLoss": "losses",
    "DistributedOptimizer": "gradients",
    "ElasticState": "backends",
    "GradientAccumulator": "gradients",
    "Indices": "data",
    "LengthSampler": "data",
    "Lengths": "data",
    "Mask": "data",
    "Pad": "data",
    "Padded": "padding",
    "PaddedBatches": "data",
    "PeerError": "errors",
    "PreLengths": "collectives",
    "Preemption": "saving",
    "WeightedCounts": "losses",
    "broadcast_variables": "gradients",
    "certify": "certification",
    "check_finite": "backends",
    "clip_by_global_norm": "gradients",
    "gather": "collectives",
    "global_value": "gradients",
    "gradient": "gradients",
    "pad": "padding",
    "pad_sequences": "padding",
    "pad_to_global_max": "collectives",
    "scale_regularization": "gradients",
    "unpad": "padding",
}
_MODULES = ("backends", "layers", "metrics")
__all__ = sorted([*_PACKAGES, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"distpad.{name}")
    if name not in _PACKAGES:
        raise AttributeError(f"module 'distpad' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"distpad.{_PACKAGES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:  # the same names for editors and type checkers; a test compares the two lists
    from distpad import backends as backends
    from distpad import layers as layers
    from distpad import metrics as metrics
    from distpad.backends import ElasticState as ElasticState
    from distpad.backends import check_finite as check_finite
    from distpad.certification import Certificate as Certificate
    from distpad.certification import certify as certify
    from distpad.collectives import PreLengths as PreLengths
    from distpad.collectives import gather as gather
    from distpad.collectives import pad_to_global_max as pad_to_global_max
    from distpad.data import Batch as Batch
    from distpad.data import Columns as Columns
    from distpad.data import Indices as Indices
    from distpad.data import Lengths as Lengths
    from distpad.data import LengthSampler as LengthSampler
    from distpad.data import Mask as Mask
    from distpad.data import Pad as Pad
    from distpad.data import PaddedBatches as PaddedBatches
    from distpad.errors import DistpadError as DistpadError
    from distpad.errors import PeerError as PeerError
    from distpad.gradients import DistributedOptimizer as DistributedOptimizer
    from distpad.gradients import GradientAccumulator as GradientAccumulator
    from distpad.gradients import broadcast_variables as broadcast_variables
    from distpad.gradients import clip_by_global_norm as clip_by_global_norm
    from distpad.gradients import global_value as global_value
    from distpad.gradients import gradient as gradient
    from distpad.gradients import scale_regularization as scale_regularization
    from distpad.losses import CTC as CTC
    from distpad.losses import Counts as Counts
    from distpad.losses import DistributedLoss as DistributedLoss
    from distpad.losses import WeightedCounts as WeightedCounts
    from distpad.padding import Buckets as Buckets
    from distpad.padding import Padded as Padded
    from distpad.padding import pad as pad
    from distpad.padding import pad_sequences as pad_sequences
    from distpad.padding import unpad as unpad
    from distpad.saving import Checkpoints as Checkpoints
    from distpad.saving import Preemption as Preemption
