"""Measures of a step: the sizes of its examples, what its losses count, and fingerprints of its examples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distpad import errors
from distpad.data.config import Config
from distpad.data.schema import Features
from distpad.data.structure import Name
from distpad.padding.columns import Column

_NAME = "PaddedBatches"
_MOST = 2**16  # elements of a column that are hashed: they tell one order of the examples from another


def truncated(features: Features, given: list[Column], indices: np.ndarray) -> tuple[list[Column], np.ndarray]:
    """Cut the examples that are longer than the ``max_length`` of their feature.

    Returns: the columns, and the positions that each example lost, ``[rows]``.

    Raises: ValueError: a longer example where ``truncating`` is "error", with the example index.
    """
    found, lost = [*given], np.zeros(len(indices), np.int64)
    for i, feature in enumerate(features.features if given else ()):
        pad = feature.pad
        if pad is None or pad.max_length is None:
            continue
        axis = pad.axes[0]
        longer = np.maximum(given[i].sizes()[:, axis] - pad.max_length, 0)
        if not longer.any():
            continue
        if pad.truncating == "error":
            row = int(np.flatnonzero(longer)[0])
            where = f"the length of {feature.name!r} of example {indices[row]}"
            remedy = "Write Pad(..., truncating='pre' or 'post') to cut, or filter the examples."
            size, rule = longer[row] + pad.max_length, f"at most max_length={pad.max_length}"
            raise ValueError(errors.sentence(_NAME, where, size, rule, remedy))
        begins = longer if pad.truncating == "pre" else np.zeros_like(longer)
        found[i] = given[i].cut(axis, begins, pad.max_length)
        lost += longer
    return found, lost


def sizes_of(config: Config, columns: Mapping[Name, Column], indices: np.ndarray) -> dict[Name, np.ndarray]:
    """Return the sizes of each padded feature's ragged axes, ``[rows, axes]``.

    Raises: ValueError: a size above the last boundary of the buckets, with the example index.
    """
    if not columns:
        return {name: np.zeros([0, len(pad.axes)], np.int64) for name, pad in config.padding.items()}
    found = {}
    for name, pad in config.padding.items():
        sizes = columns[name].sizes()
        found[name] = sizes if pad.axes == (0,) and sizes.shape[1] == 1 else sizes[:, list(pad.axes)]
    for (name, axis), buckets in zip(config.axes, config.axis_buckets or ()):
        sizes = found[name][:, config.padding[name].axes.index(axis)]
        for row in np.flatnonzero(sizes > buckets.boundaries[-1])[:1]:
            try:
                buckets.index(sizes[row])
            except ValueError as error:
                raise ValueError(f"{_NAME}: axis {axis} of {name!r}: {error} (example {indices[row]})") from None
    return found


def longest(sizes: Mapping[Name, np.ndarray]) -> list[int]:
    """The longest sizes of all ragged axes, 0 without rows."""
    return [size for table in sizes.values() for size in table.max(axis=0, initial=0).tolist()]


def counts_of(
    config: Config,
    columns: Mapping[Name, Column],
    sizes: Mapping[Name, np.ndarray],
    indices: np.ndarray,
    bounds: Sequence[tuple[int, int]],
) -> np.ndarray:
    """Return each replica's tokens, or the sum of their weights, and its rows that have any.

    Args:
      columns: of the features; empty without rows.
      sizes: the result of ``sizes_of``.
      indices: the example indices, for errors.
      bounds: the first row of each replica, and the row after its last.

    Returns: ``[replicas, losses, 2]`` float64.

    Raises: ValueError: weights of another shape, below 0 or not finite, with the example index.
    """
    counted = np.zeros([len(bounds), len(config.tokens), 2])
    for i, (loss, name) in enumerate(config.tokens.items() if columns else ()):
        axes, column = config.counted_axes[name], columns[name]
        totals = sizes[name][:, 0] if len(axes) == 1 else np.diff(column.bounds()[len(axes)])
        weights = config.weights.get(loss)
        if weights is not None:
            totals = _weights(columns[weights], column, axes, totals, weights, indices)
        for replica, (begin, end) in enumerate(bounds):
            counted[replica, i] = totals[begin:end].sum(), np.count_nonzero(totals[begin:end])
    return counted


def _weights(
    weights: Column, counted: Column, axes: Sequence[int], positions: np.ndarray, name: Name, indices: np.ndarray
) -> np.ndarray:
    """The sum of each example's weights over its positions."""
    is_scalar = not weights.splits and weights.values.ndim == 1
    if is_scalar:
        bounds, totals = np.arange(len(indices) + 1), weights.values * positions.astype(np.float64)
    else:
        weights = weights.partitioned(len(weights.splits) + weights.values.ndim - 1)
        _check_shapes(weights.sizes(), counted.sizes()[:, axes], name, indices)
        bounds = weights.bounds()[-1]
        filled, totals = np.flatnonzero(np.diff(bounds)), np.zeros(len(indices))
        if len(filled):  # reduceat has no empty segments
            totals[filled] = np.add.reduceat(weights.values.astype(np.float64), bounds[filled])
    wrong = ~np.isfinite(totals)
    negative = np.flatnonzero(weights.values < 0)
    wrong[np.searchsorted(bounds, negative, side="right") - 1] = True
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        found = f"of sum {totals[row]:g} in example {indices[row]}"
        raise ValueError(errors.sentence(_NAME, f"weights {name!r}", found, "finite, non-negative numbers"))
    return totals


def _check_shapes(given: np.ndarray, wanted: np.ndarray, name: Name, indices: np.ndarray) -> None:
    differ = np.flatnonzero((given != wanted).any(axis=1))
    if len(differ):
        row = differ[0]
        found = f"of shape {tuple(given[row].tolist())} in example {indices[row]}"
        rule = f"{tuple(wanted[row].tolist())}, the shape of the counted feature"
        raise ValueError(errors.sentence(_NAME, f"weights {name!r}", found, rule))


def check_counted(features: Features, config: Config) -> None:
    """Check that weights are features of numbers, with one value per position or per example."""
    known = {feature.name: feature for feature in features.features}
    for loss, name in config.weights.items():
        errors.require(
            _NAME, name in known, "weights", errors.shown(name), f"a feature of an example: {features.names}"
        )
        feature, axes = known[name], config.counted_axes[config.tokens[loss]]
        fits = len(feature.shape) in (0, len(axes)) and feature.dtype.kind in "fiub"
        found, rule = f"of shape {feature.shape} and {feature.dtype}", "numbers, one per position or one per example"
        errors.require(_NAME, fits, f"weights {name!r}", found, rule)


class Fingerprints:
    """The fingerprints of an epoch's first steps, and a hash of a worker's first examples.

    Args:
      worker: this worker, whose examples count in their order. None with a sampler: then the order does not count,
        because it depends on the number of workers.
      steps: the number of steps that have fingerprints.
      compares: whether workers compare their first examples.

    Attributes:
      begins: the fingerprints of the first step, of the first two steps, and so on.
    """

    def __init__(self, worker: int | None, steps: int, compares: bool) -> None:
        self.steps, self.begins = steps, list[float]()
        self._worker, self._compares, self._rows = worker, compares, 0
        self._hashed = hashlib.blake2b(str(worker).encode(), digest_size=4)
        self._compared = hashlib.blake2b(digest_size=6)

    def add(self, columns: Sequence[Column], indices: np.ndarray, *, compares: bool) -> None:
        """Add the next step; ``compares``: to the examples that workers compare, too."""
        if compares and self._compares:
            self._rows += len(indices)
            _update(self._compared, columns)
        if len(self.begins) == self.steps:
            return
        if self._worker is not None:
            _update(self._hashed, columns)
            total = int.from_bytes(self._hashed.digest(), "big")
        else:
            total = 0
            for row, index in enumerate(indices):
                hashed = hashlib.blake2b(str(index).encode(), digest_size=4)
                _update(hashed, [column.between(row, row + 1) for column in columns])
                total += int.from_bytes(hashed.digest(), "big")
        self.begins.append(float(total))

    def at(self, step: int) -> float:
        """The fingerprint of the steps up to this one; of fewer if the epoch has no more; 0 without any."""
        return self.begins[min(step, len(self.begins) - 1)] if self.begins else 0.0

    @property
    def digest(self) -> float:
        """The hash of the first examples, 48 bits, which a float64 holds exactly; 0 without, or if not compared."""
        return float(int.from_bytes(self._compared.digest(), "big")) if self._rows else 0.0


def _update(hashed: Any, columns: Sequence[Column]) -> None:
    """Hash columns, equal numbers alike: the dtype of a list depends on the examples that were read before it."""
    for values, splits in columns:
        hashed.update(repr((len(values), values.shape[1:])).encode())
        for each in splits:
            hashed.update(np.diff(each))
        if values.dtype == object:
            leaves = values.ravel()[:_MOST].tolist()
            hashed.update(repr([leaf.encode() if isinstance(leaf, str) else leaf for leaf in leaves]).encode())
        else:
            head = np.ascontiguousarray(values).reshape(-1)[:_MOST]
            hashed.update(
                np.ascontiguousarray(head.astype(np.float64) if head.dtype == np.int64 else head).view(np.uint8)
            )
