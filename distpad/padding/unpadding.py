"""Unpadding in NumPy: the sequences of a padded batch, by its lengths and its mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from distpad import errors


def check_padded(shape: tuple[int, ...], lengths: Any, mask: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return lengths and mask as arrays. Raises if they do not match values of ``shape`` or contradict each other."""
    if len(shape) < 2:
        raise ValueError(errors.sentence("unpad", "values", f"of shape {shape}", "[batch, length, ...]"))
    if lengths is not None:
        lengths = np.asarray(lengths)
        if lengths.dtype.kind not in "iu" and lengths.size:
            raise TypeError(errors.sentence("unpad", "lengths", f"of dtype {lengths.dtype}", "integers"))
        if lengths.shape != shape[:1]:
            raise ValueError(errors.sentence("unpad", "lengths", f"of shape {lengths.shape}", f"of shape {shape[:1]}"))
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype != bool:
            raise TypeError(
                errors.sentence("unpad", "mask", f"of dtype {mask.dtype}", "bool", "Write mask.astype(bool).")
            )
        if mask.ndim < 2 or mask.shape != shape[: mask.ndim]:
            rule = f"of the first two or more axes of values, {shape}"
            raise ValueError(errors.sentence("unpad", "mask", f"of shape {mask.shape}", rule))
    if lengths is not None:
        _check_lengths(shape, lengths, mask)
    return lengths, mask


def _check_lengths(shape: tuple[int, ...], lengths: np.ndarray, mask: np.ndarray | None) -> None:
    """Check that, along at least one axis, lengths lie between the length in the mask and the padded size."""
    least = (
        [np.zeros(1, np.int64)] if mask is None else [_shown(mask, axis).sum(axis=1) for axis in range(1, mask.ndim)]
    )
    valid = [(low <= lengths) & (lengths <= most) for low, most in zip(least, shape[1:])]
    if mask is not None and mask.ndim == 2:
        valid = [least[0] == lengths]
    if not any(each.all() for each in valid):
        index = int(np.flatnonzero(~valid[0])[0])
        rule = f"from 0 to {shape[1]}" if mask is None else f"{least[0][index]}, as in the mask"
        raise ValueError(errors.sentence("unpad", f"lengths[{index}]", lengths[index], rule))


def _shown(mask: np.ndarray, axis: int) -> np.ndarray:
    """Whether an index along ``axis`` of each row holds a real element: ``[batch, size]``."""
    others = tuple(other for other in range(1, mask.ndim) if other != axis)
    return np.asarray(mask.any(axis=others))


def unpad(values: np.ndarray, lengths: np.ndarray | None, mask: np.ndarray | None) -> list[Any]:
    """Return the sequences of a padded batch, with lengths and mask from ``check_padded``."""
    if mask is None:
        assert lengths is not None
        return [row[:length].copy() for row, length in zip(values, lengths)]
    if mask.ndim == 2:
        return [row[real] for row, real in zip(values, mask)]
    shown = _shown(mask, 1)
    windows = _windows(shown, lengths) if lengths is not None else _spans(shown)
    return [_take(*row) for row in zip(values, mask, windows)]


def _spans(shown: np.ndarray) -> np.ndarray:
    """True from the first to the last true of the last axis."""
    return np.logical_or.accumulate(shown, -1) & np.logical_or.accumulate(shown[..., ::-1], -1)[..., ::-1]


def _windows(shown: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """True on the first or on the last ``lengths`` indices of axis 1; if neither matches the mask, its spans."""
    indices, padded = np.arange(shown.shape[1]), shown.shape[1]
    post_padded = indices < lengths[:, None]
    pre_padded = indices >= padded - lengths[:, None]
    for window in (post_padded, pre_padded):
        if not (shown & ~window).any() and (lengths <= padded).all():
            return window
    return _spans(shown)


def _take(values: np.ndarray, mask: np.ndarray, window: np.ndarray) -> Any:
    """One sequence: an array if its ``mask`` within the ``window`` of axis 0 is rectangular, else a list of rows."""
    if mask.ndim == 1:
        return values[mask]
    others = [mask.any(axis=tuple(o for o in range(mask.ndim) if o != axis)) for axis in range(1, mask.ndim)]
    if mask.sum() == window.sum() * np.prod([real.sum() for real in others]):
        return values[np.ix_(window, *others)]
    rows = np.flatnonzero(window)
    inner = [_spans(mask[row].any(axis=tuple(range(1, mask.ndim - 1)))) for row in rows]
    return [_take(values[row], mask[row], span) for row, span in zip(rows, inner)]
