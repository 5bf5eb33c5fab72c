"""pad_sequences: Keras's function of that name, on NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np


def pad_sequences(
    sequences: Any,
    maxlen: int | None = None,
    dtype: Any = "int32",
    padding: str = "pre",
    truncating: str = "pre",
    value: Any = 0.0,
) -> np.ndarray:
    """Pad sequences to one length, as ``keras.utils.pad_sequences`` does in every respect, without Keras.

    It makes code that uses Keras's function move here unchanged; new code wants ``pad``. **The defaults pad and cut
    at the front**: ``pad_sequences([[1, 2, 3]], maxlen=2)`` silently drops the 1. Floats are cut to int32, too.

    Arguments, defaults, results and errors (their types and words) are those of Keras 3. Keras 2 differs where
    ``value`` is a string: it refuses ``dtype=bytes`` and takes ``np.dtype(object)``; here, as in Keras 3, it is the
    other way round, and ``object`` itself is what to write.

    Args:
      sequences: a sized iterable of sequences, each ``[n_i, *inner]``.
      maxlen: the padded length; default: that of the longest sequence.
      dtype: of the result; ``object`` for strings of different lengths.
      padding: ``"pre"`` or ``"post"``: where the filling goes.
      truncating: ``"pre"`` or ``"post"``: where sequences longer than ``maxlen`` are cut.
      value: the filling: a number or a string.

    Returns:
      An array ``[len(sequences), maxlen, *inner]`` of ``dtype``.

    Raises:
      ValueError: ``sequences`` has no length; a sequence has none; a string as ``value`` for a dtype that holds none;
        inner shapes that differ; no sequences and no ``maxlen``; an unknown ``truncating`` or ``padding`` (seen only
        where there is an element to place); a ``maxlen`` below 0, or of 0 with ``truncating="pre"`` (which cuts
        nothing then); what NumPy cannot convert to ``dtype``.
      TypeError, OverflowError: what NumPy raises for an unknown ``dtype`` and for elements it cannot convert.

    >>> pad_sequences([[1], [2, 3], [4, 5, 6]], maxlen=2).tolist()
    [[0, 1], [2, 3], [5, 6]]
    >>> pad_sequences([[1], [2, 3]], padding="post", value=-1).tolist()
    [[1, -1], [2, 3]]

    Source: the documentation of ``keras.utils.pad_sequences``.
    """
    if not hasattr(sequences, "__len__"):
        raise ValueError("`sequences` must be iterable.")
    count = len(sequences)
    lengths, inner = _measure(sequences)
    length = np.max(lengths) if maxlen is None else maxlen
    _check_text(value, dtype)
    padded = np.full((count, length, *inner), value, dtype=dtype)
    for index, sequence in enumerate(sequences):
        if not len(sequence):
            continue  # the options are looked at only where there is something to place: Keras does so too
        elements = np.asarray(_cut(sequence, length, truncating), dtype=dtype)
        if elements.shape[1:] != inner:
            raise ValueError(
                f"Shape of sample {elements.shape[1:]} of sequence at position {index} "
                f"is different from expected shape {inner}"
            )
        _place(padded[index], elements, padding)
    return padded


def _measure(sequences: Any) -> tuple[list[int], tuple[int, ...]]:
    """The length of every sequence, and the inner shape of the first that has elements."""
    lengths: list[int] = []
    inner: tuple[int, ...] | None = None
    for sequence in sequences:
        try:
            lengths.append(len(sequence))
            if inner is None and lengths[-1]:
                inner = np.asarray(sequence).shape[1:]
        except TypeError as error:
            raise ValueError(f"`sequences` must be a list of iterables. Found non-iterable: {sequence!s}") from error
    return lengths, inner or ()


def _check_text(value: Any, dtype: Any) -> None:
    holds_text = np.issubdtype(dtype, np.str_) or np.issubdtype(dtype, np.bytes_) or dtype is object
    if isinstance(value, str) and not holds_text:
        raise ValueError(
            f"`dtype` {dtype} is not compatible with `value`'s type: {type(value)}\n"
            "You should set `dtype=object` for variable length strings."
        )


def _cut(sequence: Any, length: int, truncating: str) -> Any:
    if truncating == "pre":
        return sequence[-length:]  # of length 0 this is all of it, which then does not fit: as in Keras
    if truncating == "post":
        return sequence[:length]
    raise ValueError(f'Truncating type "{truncating}" not understood')


def _place(row: np.ndarray, elements: np.ndarray, padding: str) -> None:
    if padding == "post":
        row[: len(elements)] = elements
    elif padding == "pre":
        row[-len(elements) :] = elements
    else:
        raise ValueError(f'Padding type "{padding}" not understood')
