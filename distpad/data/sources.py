"""Sources of examples: which kinds there are, and how the steps of each are read."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.data import chunks, datasets, readers
from distpad.data.columns import Columns
from distpad.data.config import Config
from distpad.data.readers import Step
from distpad.data.sampler import LengthSampler
from distpad.data.schema import Features

_NAME = "PaddedBatches"
_HEAD = 8  # examples that show the features


class Source:
    """The source of a ``PaddedBatches``, checked.

    Args:
      replicas: of this worker.

    Attributes:
      given: the source of examples.
      sampler: the sampler that picks from it, or None.
      is_indexed: whether examples are read by indices from 0 to the length, instead of being iterated.
    """

    def __init__(self, source: Any, config: Config, replicas: int) -> None:
        self._config, self._replicas = config, replicas
        self._opened = 0  # iterations of an iterable
        self.sampler: LengthSampler | None = None
        if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], LengthSampler):
            source, self.sampler = source
        self.given = _known(source)
        given, size, reads = self.given, config.batch_size, config.num_parallel_reads
        is_keyed = isinstance(given, (tf.data.Dataset, Mapping, Set)) or hasattr(given, "iloc")
        has_indices = hasattr(given, "__getitem__") and hasattr(given, "__len__") and not is_keyed
        at_once = isinstance(given, (list, Columns)) or hasattr(given, "__getitems__")
        self.is_indexed = has_indices and (at_once or reads > 1 or not hasattr(given, "__iter__"))
        if self.sampler is not None:
            errors.require(_NAME, size is None, "batch_size", size, "None with a sampler, which sets it")
            drops, rule = config.drop_remainder, "False with a sampler, which drops nothing"
            errors.require(_NAME, not drops, "drop_remainder", drops, rule)
            kind, rule = type(given).__name__, "an object with __getitem__"
            errors.require(_NAME, hasattr(given, "__getitem__"), "source", kind, rule, error=TypeError)
            count, wanted = self.count, len(self.sampler.lengths)
            rule = f"{wanted}, as in the sampler"
            errors.require(_NAME, count in (None, wanted), "source", f"of {count} examples", rule)
            return
        if not self.is_indexed and not hasattr(given, "__iter__"):
            remedy = "Wrap a generator function in a class with __iter__." if callable(given) else ""
            rule = (
                "a tf.data.Dataset, an iterable, an object with __getitem__ and __len__, or (indexable, LengthSampler)"
            )
            raise TypeError(errors.sentence(_NAME, "source", type(given).__name__, rule, remedy))
        remedy = "tf.data reads in parallel by map(..., num_parallel_calls=...)."
        rule = "1, as only an object with __getitem__ and __len__ can be read in parallel"
        errors.require(_NAME, reads == 1 or self.is_indexed, "num_parallel_reads", reads, rule, remedy)
        errors.require(_NAME, size is not None, "batch_size", None, "examples per replica, without a sampler")

    @property
    def count(self) -> int | None:
        """The number of examples; None if it is unknown."""
        if isinstance(self.given, tf.data.Dataset):
            count = int(self.given.cardinality())
            return count if count >= 0 else None
        return len(self.given) if hasattr(self.given, "__len__") else None

    @property
    def can_be_read_ahead(self) -> bool:
        """Whether the next epoch may be read before it begins.

        A list or an iterable may change between two epochs; reading a list takes no time.
        """
        return isinstance(self.given, tf.data.Dataset) or (self.is_indexed and not isinstance(self.given, list))

    def features(self) -> Features | None:
        """The features of the examples; None if the source does not show them without an iteration, or has none.

        Raises: ValueError, TypeError: examples that differ, or that ``padding`` does not fit.
        """
        if isinstance(self.given, tf.data.Dataset):
            return datasets.features_of(self.given, self._config.padding)
        count = min(_HEAD, self.count or 0) if hasattr(self.given, "__getitem__") else 0
        return (
            chunks.learn([readers.fetch(self.given)(np.arange(count))], self._config.padding, guess=True)
            if count
            else None
        )

    def steps(
        self, epoch: int, step: int, checks: int, replicas: Sequence[int], num_replicas: int
    ) -> Callable[[], Iterator[Step]]:
        """A function to this worker's steps of an epoch, beginning at ``step``, after the first ``checks`` steps, which
        are compared. The thread of the reader calls it.

        Args:
          replicas: the indices of this worker's replicas among ``num_replicas``.
        """
        given, reads = self.given, self._config.num_parallel_reads
        if self.sampler is not None:
            planned = readers.sampled(self.sampler, replicas, num_replicas, epoch, step)
            return lambda: readers.read_indexed(given, planned, reads)
        in_order = functools.partial(readers.in_order, self._size, len(replicas), checks, step)
        if self.is_indexed:
            return lambda: readers.read_indexed(given, in_order(len(given)), reads)
        if isinstance(given, tf.data.Dataset):
            tokens = [*self._config.tokens.values()]
            return lambda: datasets.read(given, self._batched, in_order(self.count), self._rows, tokens)
        self._opened += 1
        opened = self._opened
        return lambda: readers.read_iterable(given, in_order(None), self._rows, opened)

    @property
    def _size(self) -> int:
        return self._config.batch_size or 1

    @property
    def _rows(self) -> int:
        return self._size * self._replicas

    @functools.cached_property
    def _batched(self) -> tf.data.Dataset | None:
        return datasets.batched(self.given, self._rows)


def _known(source: Any) -> Any:
    """An array and a pandas.DataFrame as Columns."""
    pandas = sys.modules.get("pandas")  # a source is a DataFrame only if pandas is imported
    if pandas is not None and isinstance(source, pandas.DataFrame):
        return Columns({name: source[name].to_numpy() for name in source.columns})
    return Columns(source) if isinstance(source, np.ndarray) and source.ndim and source.dtype != object else source
