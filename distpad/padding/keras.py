"""pad_sequences: Keras's function of the same name, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from distpad import errors
from distpad.padding import arguments, columns, reading


def pad_sequences(
    sequences: Any,
    maxlen: int | None = None,
    dtype: Any = "int32",
    padding: str = "pre",
    truncating: str = "pre",
    value: Any = 0.0,
) -> np.ndarray:
    """Pad sequences to one length, with the behaviour of ``keras.utils.pad_sequences``, without Keras.

    Use it to port code that calls Keras's function, and ``pad`` in new code. **The defaults pad and cut at the front**:
    ``pad_sequences([[1, 2, 3]], maxlen=2)`` silently drops the 1. Floats are truncated to int32.

    Arguments, defaults, results and errors (types and messages) are those of Keras 3. Keras 2 differs if ``value`` is a
    string: it rejects ``dtype=bytes`` and accepts ``np.dtype(object)``, where Keras 3 and this function do the
    opposite. ``dtype=object`` works in all.

    Args:
      sequences: a sized iterable of sequences, each ``[n_i, *inner]``.
      maxlen: the padded length; default: the longest sequence's.
      dtype: dtype of the result; ``object`` for strings of different lengths.
      padding: ``"pre"`` pads before the sequences, ``"post"`` after them.
      truncating: ``"pre"`` cuts longer sequences at the front, ``"post"`` at the end.
      value: the padding value: a number or a string.

    Returns:
      An array ``[len(sequences), maxlen, *inner]`` of ``dtype``.

    Raises:
      ValueError: ``sequences`` or one of them has no length; a string as ``value`` for a dtype without strings;
        different inner shapes; no sequences and no ``maxlen``; an unknown ``truncating`` or ``padding`` (only if there
        is an element to place); a ``maxlen`` below 0, or of 0 with ``truncating="pre"`` (which then cuts nothing);
        elements that NumPy cannot convert to ``dtype``.
      TypeError, OverflowError: NumPy's errors for an unknown ``dtype`` and for elements that it cannot convert.

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
    is_size = errors.is_integer(length) and 0 <= length < 2**31 and dtype is not None
    if type(value) in (int, float) and value == 0 and is_size:
        padded = columns.blank(count, (int(length), *inner), value, np.dtype(dtype))
    else:
        padded = np.full((count, length, *inner), value, dtype=dtype)
    are_known = {str} == {type(padding), type(truncating)} and {padding, truncating} <= {"pre", "post"}
    if are_known and length:
        rows = _rows(sequences, inner, padded.dtype)
        if rows is not None:
            kept = rows if maxlen is None else [_cut(row, length, truncating) for row in rows]
            columns.place(padded, kept, np.minimum(lengths, length), at_end=padding == "pre")
            return padded
    for index, sequence in enumerate(sequences):
        if not len(sequence):
            continue  # as in Keras, options are checked only if there is an element to place
        if isinstance(sequence, np.ndarray):  # broadcast arrays may be larger than the memory
            errors.check_memory("pad_sequences: a sequence", sequence.shape, sequence.dtype)
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


def _rows(sequences: Any, inner: tuple[int, ...], dtype: np.dtype) -> list[np.ndarray] | None:
    """Arrays that copy as Keras converts their elements; None where an element may change, or is an error."""
    if type(sequences) not in (list, tuple) or dtype.kind not in "biuf":
        return None
    rows, _ = reading.read_regular([*sequences]) or (None, None)
    if isinstance(rows, columns.Column):  # of Python numbers, which NumPy converts one by one
        exact = rows.values.dtype.kind == dtype.kind and len(rows.splits) == 1
        values = arguments.exact_cast(rows.values, dtype) if exact else None
        rows = None if values is None else columns.split(values, np.diff(rows.splits[0]))
    return rows if rows is not None and {row.shape[1:] for row in rows} == {inner} else None


def _check_text(value: Any, dtype: Any) -> None:
    holds_text = np.issubdtype(dtype, np.str_) or np.issubdtype(dtype, np.bytes_) or dtype is object
    if isinstance(value, str) and not holds_text:
        raise ValueError(
            f"`dtype` {dtype} is not compatible with `value`'s type: {type(value)}\n"
            "You should set `dtype=object` for variable length strings."
        )


def _cut(sequence: Any, length: int, truncating: str) -> Any:
    if truncating == "pre":
        return sequence[-length:]  # with length 0 the whole sequence, whose assignment then fails: as in Keras
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
