"""The options of ``pad``, and the checks of axes, values and dtypes that NumPy and TensorFlow share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from distpad import errors

MOST_AXES = 32  # NumPy's limit
EXACT = 2**53  # float64 holds integers exactly up to here


class Options(NamedTuple):
    """The options of ``pad``, after the checks that need no data."""

    length: int | None
    value: Any
    padding: str
    truncating: str
    dtype: Any
    ragged_axes: list[int] | None
    mask: bool


def resolve_axes(axes: list[int], rank: int) -> list[int]:
    """Return the sorted, non-negative axes of a sequence of ``rank`` axes."""
    are_axes = axes and all(-rank <= axis < rank for axis in axes)
    rule = f"one or several axes of a sequence, from 0 to {rank - 1}"
    evidence = f"The sequences have {rank} {'axis' if rank == 1 else 'axes'} each (the batch axis is not counted)."
    errors.require("pad", are_axes, "ragged_axes", axes, rule, evidence)
    resolved = sorted({axis % rank for axis in axes})
    errors.require("pad", len(resolved) == len(axes), "ragged_axes", axes, "different axes")
    return resolved


def check_lengths(lengths: np.ndarray, limit: int | None) -> None:
    """Raise ValueError if sequences are longer than ``limit``, naming the first."""
    if limit is not None and (lengths > limit).any():
        longer = np.flatnonzero(lengths > limit)
        found = f"sequences[{longer[0]}] has length {lengths[longer[0]]} (of {len(lengths)}, {len(longer)} are longer)."
        remedy = "Give a larger length, or truncating='pre' or 'post' to cut sequences."
        raise ValueError(errors.sentence("pad", "length", limit, f"at least {lengths.max()}", found, remedy))


def uneven_axis(axis: int, evidence: str, axes: list[int]) -> ValueError:
    """The error for sizes that differ along an axis that ``ragged_axes`` leaves out."""
    remedy = f"Write ragged_axes={tuple(sorted({*axes, axis}))}."
    return ValueError(errors.sentence("pad", "ragged_axes", tuple(axes), f"to contain axis {axis}", evidence, remedy))


def uneven_lengths(axis: int, evidence: str) -> ValueError:
    """The error for a first ragged axis whose length varies within a sequence."""
    found, rule = f"from axis {axis} on", "a first ragged axis with one length in each sequence"
    remedy = "Let ragged_axes begin earlier."
    return ValueError(errors.sentence("pad", "ragged_axes", found, rule, evidence, remedy))


def as_value(value: Any) -> np.ndarray:
    """The ``value`` argument as an array."""
    if isinstance(value, np.ndarray):
        errors.check_memory("pad: value", value.shape, value.dtype)
    try:
        return np.asarray(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise ValueError(errors.sentence("pad", "value", errors.shown(value), "a scalar or an array")) from None


def padding_value(wanted: np.ndarray, dtype: np.dtype, inner: tuple[int, ...] | None) -> np.ndarray:
    """Return ``wanted`` in ``dtype``.

    Raises ValueError if the cast changes the value, or if it does not broadcast to the ``inner`` shape.
    """
    value = exact_cast(wanted, dtype)
    if not isinstance(value, np.ndarray):  # None, or an element of a record
        remedy = "Write value=''." if dtype.kind in "US" else "Give another value, or a dtype that can hold this one."
        raise ValueError(
            errors.sentence("pad", "value", errors.shown(wanted.tolist()), f"a value that {dtype} can hold", remedy)
        )
    while inner is not None and value.ndim > len(inner) and value.shape[0] == 1:
        value = value.reshape(value.shape[1:])  # the user wrote the ragged axes too, with size 1
    with contextlib.suppress(ValueError, RuntimeError):  # RuntimeError: of more than 32 axes
        if inner is None or np.broadcast_shapes(value.shape, inner) == inner:
            return value
    rule = f"a scalar, or an array that broadcasts to the shape of one position, {inner}"
    raise ValueError(errors.sentence("pad", "value", f"of shape {value.shape}", rule))


def exact_cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """Return ``array`` in ``dtype``, or None if an element would change. Floats may be rounded, but stay finite."""
    kinds = {array.dtype.kind, dtype.kind}
    text_and_other = len(kinds) == 2 and kinds & set("US") and "O" not in kinds
    if text_and_other or (array.dtype.kind == "c" and dtype.kind not in "cO"):
        return None
    if np.can_cast(array.dtype, dtype, "safe"):
        return array.astype(dtype, copy=False)
    try:
        with np.errstate(all="ignore"):
            cast = array.astype(dtype)
            rounded = _has_fractions(dtype) and array.dtype.kind != "O"
            same = np.isfinite(cast) == np.isfinite(array) if rounded else cast == array
        return cast if np.all(same) else None
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None


def _has_fractions(dtype: np.dtype) -> bool:
    # NumPy gives bfloat16 and similar dtypes the kind "V", which records have too
    return dtype.kind in "fc" or (dtype.kind == "V" and dtype.names is None and bool(np.asarray(0.5).astype(dtype)))


def is_object(dtype: Any) -> bool:
    """Whether ``dtype`` is that of Python objects, which ``pad`` does not convert."""
    return dtype is not None and numpy_dtype(dtype).kind == "O"


def numpy_dtype(dtype: Any) -> np.dtype:
    """Return the NumPy dtype of a name, or of a dtype of NumPy or TensorFlow."""
    try:
        return np.dtype(getattr(dtype, "as_numpy_dtype", dtype))
    except Exception:  # of any kind, for example of a dict's objects
        raise TypeError(errors.sentence("pad", "dtype", errors.shown(dtype), "a dtype")) from None


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Return the dtype that holds all ``dtypes``. ValueError if it would change the kind of their elements."""
    found = sorted(set(dtypes), key=str)
    kinds = {dtype.kind for dtype in found}
    try:
        common = np.result_type(*found)
    except TypeError:
        common = None
    mixes_text = len(kinds) > 1 and bool(kinds & set("US")) and "O" not in kinds
    loses_integers = common is not None and common.kind == "f" and kinds <= set("iub")
    if common is None or mixes_text or loses_integers:
        names, remedy = "of dtypes " + ", ".join(map(str, found)), "Convert them, or give dtype=."
        raise ValueError(errors.sentence("pad", "sequences", names, "one common dtype", remedy))
    return common
