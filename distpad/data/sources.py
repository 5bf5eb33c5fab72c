"""Sources of examples: which kinds there are, and what their arguments must be."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.data.columns import Columns
from distpad.data.sampler import LengthSampler

_NAME = "PaddedBatches"


def checked(
    source: Any, batch_size: Any, drop_remainder: bool, num_parallel_reads: int
) -> tuple[Any, LengthSampler | None]:
    """Return the checked source of examples, and its sampler or None."""
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], LengthSampler):
        indexable, sampler = _known(source[0]), source[1]
        if batch_size is not None:
            raise ValueError(errors.sentence(_NAME, "batch_size", batch_size, "None with a sampler, which sets it"))
        if drop_remainder:
            raise ValueError(
                errors.sentence(_NAME, "drop_remainder", True, "False with a sampler, which drops nothing")
            )
        if not hasattr(indexable, "__getitem__"):
            raise TypeError(errors.sentence(_NAME, "source", type(indexable).__name__, "an object with __getitem__"))
        count = len(indexable) if hasattr(indexable, "__len__") else None
        if count is not None and count != len(sampler.lengths):
            found = f"of {count} examples"
            raise ValueError(errors.sentence(_NAME, "source", found, f"{len(sampler.lengths)}, as in the sampler"))
        return indexable, sampler
    source = _known(source)
    if num_parallel_reads > 1 and isinstance(source, Iterable) and not is_indexed(source):
        if isinstance(source, tf.data.Dataset) or not _has_indices(source):
            remedy = "tf.data reads in parallel by map(..., num_parallel_calls=...)."
            rule = "1, as only an object with __getitem__ and __len__ can be read in parallel"
            raise ValueError(errors.sentence(_NAME, "num_parallel_reads", num_parallel_reads, rule, remedy))
        source = _InOrder(source)
    if not hasattr(source, "__iter__") and not is_indexed(source):
        remedy = "Wrap a generator function in a class with __iter__." if callable(source) else ""
        kinds = "a tf.data.Dataset, an iterable, an object with __getitem__ and __len__, or (indexable, LengthSampler)"
        raise TypeError(errors.sentence(_NAME, "source", type(source).__name__, kinds, remedy))
    if batch_size is None:
        raise ValueError(errors.sentence(_NAME, "batch_size", None, "examples per replica, without a sampler"))
    return source, None


def _known(source: Any) -> Any:
    """An array as Columns, and a pandas.DataFrame as an indexable of its rows."""
    pandas = sys.modules.get("pandas")  # a source is a DataFrame only if pandas is imported
    if pandas is not None and isinstance(source, pandas.DataFrame):
        return _Frame(source)
    return Columns(source) if isinstance(source, np.ndarray) and source.ndim and source.dtype != object else source


class _Frame:
    """The rows of a pandas.DataFrame as dicts."""

    def __init__(self, frame: Any) -> None:
        self._columns = {name: frame[name].to_numpy() for name in frame.columns}
        self._count = len(frame)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[Any, Any]:
        return {name: column[index] for name, column in self._columns.items()}


class _InOrder:
    """An indexable that is not iterated, although it can be."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._source[index]


def _has_indices(source: Any) -> bool:
    is_keyed = isinstance(source, (Mapping, Set)) or hasattr(source, "iloc")
    return hasattr(source, "__getitem__") and hasattr(source, "__len__") and not is_keyed


def is_indexed(source: Any) -> bool:
    """Whether a source is read by indices from 0 to its length, instead of being iterated."""
    if isinstance(source, tf.data.Dataset) or not _has_indices(source):
        return False
    return isinstance(source, (list, Columns)) or hasattr(source, "__getitems__") or not hasattr(source, "__iter__")


def can_be_read_ahead(source: Any) -> bool:
    """Whether the next epoch may be read before it begins.

    A list or an iterable may change between two epochs; reading a list takes no time.
    """
    return isinstance(source, tf.data.Dataset) or (is_indexed(source) and not isinstance(source, list))


def count_of(source: Any) -> int | None:
    """The number of examples; None if it is unknown."""
    if isinstance(source, tf.data.Dataset):
        count = int(source.cardinality())
        return count if count >= 0 else None
    return len(source) if hasattr(source, "__len__") else None
