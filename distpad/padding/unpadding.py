"""Unpadding on NumPy: what a padded batch, its lengths and its mask say the sequences were."""

from __future__ import annotations

from typing import Any

import numpy as np

from distpad import errors


def check_padded(shape: tuple[int, ...], lengths: Any, mask: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Lengths and mask as arrays, refused where they do not fit values of ``shape`` or contradict each other."""
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
        _check_agreement(shape, lengths, mask)
    return lengths, mask


def _check_agreement(shape: tuple[int, ...], lengths: np.ndarray, mask: np.ndarray | None) -> None:
    """Lengths fit where they lie between what the mask shows and what there is, along one axis at least."""
    least = (
        [np.zeros(1, np.int64)] if mask is None else [_shown(mask, axis).sum(axis=1) for axis in range(1, mask.ndim)]
    )
    fits = [(low <= lengths) & (lengths <= most) for low, most in zip(least, shape[1:])]
    if mask is not None and mask.ndim == 2:
        fits = [least[0] == lengths]
    if not any(fit.all() for fit in fits):
        index = int(np.flatnonzero(~fits[0])[0])
        rule = f"from 0 to {shape[1]}" if mask is None else f"those of the mask ({least[0][index]} here)"
        raise ValueError(errors.sentence("unpad", f"lengths[{index}]", lengths[index], rule))


def _shown(mask: np.ndarray, axis: int) -> np.ndarray:
    """Where anything is real along ``axis`` of each row: ``[batch, size]``."""
    others = tuple(other for other in range(1, mask.ndim) if other != axis)
    return np.asarray(mask.any(axis=others))


def unpad(values: np.ndarray, lengths: np.ndarray | None, mask: np.ndarray | None) -> list[Any]:
    """The sequences of a padded batch; lengths and mask have been checked."""
    if mask is None:
        assert lengths is not None
        return [row[:length].copy() for row, length in zip(values, lengths)]
    if mask.ndim == 2:
        return [row[real] for row, real in zip(values, mask)]
    shown = _shown(mask, 1)
    windows = _windows(shown, lengths) if lengths is not None else _spans(shown)
    return [_take(*row) for row in zip(values, mask, windows)]


def _spans(shown: np.ndarray) -> np.ndarray:
    """From the first to the last true of the last axis."""
    return np.logical_or.accumulate(shown, -1) & np.logical_or.accumulate(shown[..., ::-1], -1)[..., ::-1]


def _windows(shown: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places that ``lengths`` mean along axis 1; where they cannot mean that axis, all that is shown."""
    places, padded = np.arange(shown.shape[1]), shown.shape[1]
    behind = places < lengths[:, None]
    in_front = places >= padded - lengths[:, None]
    for window in (behind, in_front):
        if not (shown & ~window).any() and (lengths <= padded).all():
            return window
    return _spans(shown)


def _take(values: np.ndarray, mask: np.ndarray, window: np.ndarray) -> Any:
    """One sequence: a box of ``values`` if ``mask`` is one within the ``window`` of axis 0, else a list of its rows."""
    if mask.ndim == 1:
        return values[mask]
    others = [mask.any(axis=tuple(o for o in range(mask.ndim) if o != axis)) for axis in range(1, mask.ndim)]
    if mask.sum() == window.sum() * np.prod([real.sum() for real in others]):
        return values[np.ix_(window, *others)]
    rows = np.flatnonzero(window)
    inner = [_spans(mask[row].any(axis=tuple(range(1, mask.ndim - 1)))) for row in rows]
    return [_take(values[row], mask[row], span) for row, span in zip(rows, inner)]
