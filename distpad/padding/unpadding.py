"""Unpadding in NumPy: the sequences of a padded batch, by its lengths and its mask."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from distpad import errors
from distpad.padding import columns

_require = functools.partial(errors.require, "unpad")


def check_padded(shape: tuple[int, ...], lengths: Any, mask: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return lengths and mask as arrays. Raises if they do not match values of ``shape`` or contradict each other."""
    _require(len(shape) >= 2, "values", f"of shape {shape}", "[batch, length, ...]")
    if lengths is not None:
        lengths = np.asarray(lengths)
        is_integer = lengths.dtype.kind in "iu" or not lengths.size
        _require(is_integer, "lengths", f"of dtype {lengths.dtype}", "integers", error=TypeError)
        _require(lengths.shape == shape[:1], "lengths", f"of shape {lengths.shape}", f"of shape {shape[:1]}")
    if mask is not None:
        mask = np.asarray(mask)
        remedy = "Write mask.astype(bool)."
        _require(mask.dtype == bool, "mask", f"of dtype {mask.dtype}", "bool", remedy, error=TypeError)
        rule = f"of the first two or more axes of values, {shape}"
        _require(mask.ndim > 1 and mask.shape == shape[: mask.ndim], "mask", f"of shape {mask.shape}", rule)
    if lengths is not None:
        _check_lengths(shape, lengths, mask)
    return lengths, mask


def _check_lengths(shape: tuple[int, ...], lengths: np.ndarray, mask: np.ndarray | None) -> None:
    """Check that, along at least one axis, lengths lie between the length in the mask and the padded size."""
    least = [np.zeros(1, np.int64)]
    if mask is not None:
        others = [tuple(other for other in range(1, mask.ndim) if other != axis) for axis in range(1, mask.ndim)]
        least = [mask.any(axis=axes).sum(axis=1) for axes in others]
    valid = [(low <= lengths) & (lengths <= most) for low, most in zip(least, shape[1:])]
    if mask is not None and mask.ndim == 2:
        valid = [least[0] == lengths]
    if not any(each.all() for each in valid):
        index = int(np.flatnonzero(~valid[0])[0])
        rule = f"from 0 to {shape[1]}" if mask is None else f"{least[0][index]}, as in the mask"
        _require(False, f"lengths[{index}]", lengths[index], rule)


def unpad(values: np.ndarray, lengths: np.ndarray | None, mask: np.ndarray | None) -> list[Any]:
    """Return the sequences of a padded batch, with lengths and mask from ``check_padded``."""
    if mask is None:
        assert lengths is not None
        return [row[:length].copy() for row, length in zip(values, lengths)]
    parts = windows(np, mask, lengths)
    sizes = [window.sum(axis=-1) for window in parts]
    splits = [sizes[0], *(size[window] for size, window in zip(sizes[1:], parts))]
    column = columns.Column(values[mask], tuple(map(columns.offsets, splits)))
    return [column.example(index) for index in range(len(values))]


def windows(xp: Any, mask: Any, lengths: Any) -> list[Any]:
    """For each axis of a sequence, which indices along it belong to the sequence: ``[batch, ..., size]`` each.

    Args:
      xp: NumPy, or TensorFlow's functions of the same names.
    """
    axes = len(mask.shape)
    shown = [xp.any(mask, axis=tuple(range(axis + 1, axes))) for axis in range(1, axes - 1)]
    found = [*(_span(xp, each) for each in shown), mask]
    if lengths is not None and shown:
        # the first or the last ``lengths`` indices of axis 1; if neither matches the mask, its span
        before = xp.cumsum(xp.where(shown[0], 1, 1), axis=1)
        padded, rows = before[:, -1:], lengths[:, np.newaxis]
        for candidate in (padded - before < rows, before <= rows):  # the last match wins: post-padded
            matches = xp.all(candidate | ~shown[0]) & xp.all(rows <= padded)
            found[0] = xp.where(matches, candidate, found[0])
    return found


def _span(xp: Any, shown: Any) -> Any:
    """True from the first to the last true of the last axis."""
    numbers = xp.where(shown, 1, 0)
    before = xp.cumsum(numbers, axis=-1)
    return (before > 0) & (before - numbers < before[..., -1:])
