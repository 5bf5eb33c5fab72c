"""Specs: the dtypes and shapes of a batch, before an epoch begins where the source shows them."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from distpad.collectives.shapes import PreLengths
from distpad.data import chunks, readers, structure
from distpad.data.collate import Batch
from distpad.data.config import Config
from distpad.data.schema import Feature, Features
from distpad.losses.counts import Counts, LossInputs, WeightedCounts

_HEAD = 8  # examples that show the features


def features_of(source: Any, config: Config) -> Features | None:
    """The features of a source's examples; None if it does not show them without an iteration, or has none.

    Raises: ValueError, TypeError: examples that differ, or that ``padding`` does not fit.
    """
    if isinstance(source, tf.data.Dataset):
        return _of_element(source.element_spec, config)
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        return None
    count = min(_HEAD, len(source))
    if not count:
        return None
    return chunks.learn([readers.fetch(source)(np.arange(count))], config.padding, guess=True)


def _of_element(element: Any, config: Config) -> Features | None:
    """The features of a dataset's elements; a fixed size that tf.data does not know is None."""
    skeleton = structure.skeleton_of(element)
    features = []
    for name, spec in zip(structure.names_of(skeleton), structure.leaves_of(element, skeleton)):
        if spec.shape.rank is None:
            return None
        pad = config.padding.get(name)
        shape = tuple(None if pad and axis in pad.axes else size for axis, size in enumerate(spec.shape))
        features.append(Feature(name, np.dtype(spec.dtype.as_numpy_dtype), shape, pad))
    return Features(skeleton, features)


def of_batch(config: Config, features: Features, rows: int | None) -> Batch:
    """The specs of one replica's batch with this number of rows."""

    def spec(feature: Feature) -> tf.TensorSpec:
        return tf.TensorSpec([rows, *feature.shape], tf.as_dtype(feature.dtype))

    scalar = tf.TensorSpec([], tf.float64)
    lengths: dict[Any, Any] = {}
    for name, pad in config.padding.items():
        of_rows = tf.TensorSpec([rows], tf.int32)
        lengths[structure.as_key(name)] = PreLengths(of_rows) if pad.side == "pre" else of_rows
    by_name = {feature.name: feature for feature in features.features}
    counts, inputs = {}, {}
    for loss, name in config.tokens.items():
        axes, weights = config.counted_axes[name], config.weights.get(loss)
        kind = WeightedCounts if weights is not None or len(axes) > 1 else Counts
        counts[loss] = kind(scalar, scalar, tf.TensorSpec([2], tf.float64), scalar)
        sample_weight: Any = () if weights is None else spec(by_name[weights])
        if len(axes) > 1:
            sample_weight = tf.TensorSpec([rows, *[None] * len(axes)], tf.float32)
        inputs[loss] = LossInputs(lengths[name], sample_weight, counts[loss])
    return Batch(
        features.pack([*map(spec, features.features)]),
        lengths,
        tf.TensorSpec([], tf.int32),
        counts.get(None, counts),
        tf.TensorSpec([rows], tf.int64),
        inputs.get(None, inputs),
    )
