"""Sources of examples: which kinds there are, and how the steps of each are read."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors
from distpad.data import chunks, datasets, measures, reader, readers
from distpad.data.columns import Columns
from distpad.data.config import Config
from distpad.data.readers import Step
from distpad.data.sampler import LengthSampler
from distpad.data.schema import Features
from distpad.padding.buckets import Buckets

_NAME = "PaddedBatches"
_HEAD = 8  # examples that show the features
_BEGINNING = 8  # steps whose fingerprints identify a source
_BOUNDARIES = 8  # of the buckets that "auto" computes from a sampler's lengths


class Cursor(NamedTuple):
    """A position in the data: consumed steps of an epoch, and the fingerprints of its first steps, by which a source is
    recognised."""

    epoch: int = 0
    step: int = 0
    begins: tuple[int, ...] = ()


class Source:
    """The source of a ``PaddedBatches``, checked, and what its steps are on this worker.

    Attributes:
      given: the source of examples.
      sampler: the sampler that picks from it, or None.
      is_indexed: whether examples are read by indices from 0 to the length, instead of being iterated.
    """

    def __init__(self, source: Any, backend: backends.Backend, config: Config) -> None:
        self.backend, self.config = backend, config
        self._size = (config.batch_size or 1) * backend.replicas_here  # examples of a step without a sampler
        self._opened = 0  # iterations of an iterable
        self._ahead: dict[Any, reader.Reader] = {}  # of the next epoch
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
            kinds = "a tf.data.Dataset, an iterable, an object with __getitem__ and __len__"
            rule = f"{kinds}, or (indexable, LengthSampler)"
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
        try:
            return len(self.given) if hasattr(self.given, "__len__") else None
        except OverflowError as error:
            raise ValueError(errors.sentence(_NAME, "the length of source", "above 2**63", "one of int64")) from error

    def features(self) -> Features | None:
        """The features of the examples; None if the source does not show them without an iteration, or has none.

        Raises: ValueError, TypeError: examples that differ, or that ``padding`` does not fit.
        """
        if isinstance(self.given, tf.data.Dataset):
            return datasets.features_of(self.given, self.config.padding)
        count = min(_HEAD, self.count or 0) if hasattr(self.given, "__getitem__") else 0
        indices, skips = np.arange(count), self.config.skips
        rows = readers.fetch(self.given, skips=skips)(indices) if count else []
        rows = readers.Step(count, indices, [count], rows).without_unread().rows
        return chunks.learn([rows], self.config.padding, guess=True, skips=skips)

    def steps(self, epoch: int, step: int, checks: int) -> Callable[[], Iterator[Step]]:
        """A function to this worker's steps of an epoch, beginning at ``step``, after the first ``checks`` steps, which
        are compared. The thread of the reader calls it.
        """
        given, reads, here = self.given, self.config.num_parallel_reads, self.backend.replicas_here
        skips = self.config.skips
        if self.sampler is not None:
            replicas = range(self.backend.worker_index * here, (self.backend.worker_index + 1) * here)
            planned = readers.sampled(self.sampler, replicas, self.backend.num_replicas, epoch, step)
            return lambda: readers.read_indexed(given, planned, reads, skips=skips)
        in_order = functools.partial(readers.in_order, self.config.batch_size or 1, here, checks, step)
        if self.is_indexed:
            return lambda: readers.read_indexed(given, in_order(len(given)), reads, skips=skips)
        if isinstance(given, tf.data.Dataset):
            tokens = [*self.config.tokens.values()]
            # the batch of an element that fails would be lost with it
            batches = None if skips else self._batched
            return lambda: datasets.read(given, batches, in_order(self.count), self._size, tokens, skips=skips)
        self._opened += 1
        opened = self._opened
        return lambda: readers.read_iterable(given, in_order(None), self._size, opened, skips=skips, count=self.count)

    @functools.cached_property
    def _batched(self) -> tf.data.Dataset | None:
        return datasets.batched(self.given, self._size)

    def open_reader(self, cursor: Cursor, features: Features | None) -> reader.Reader:
        """The reader of the epoch that begins at the cursor: the one that has read ahead, or a new one."""
        ahead = self._ahead.pop((cursor, self.count), None)
        self.close_ahead()
        return ahead or self._reader(cursor, features, waits=False)

    def read_ahead(self, epoch: int, features: Features | None) -> None:
        """Read the beginning of the next epoch while the last steps of the running one are consumed.

        A list or an iterable may change between two epochs; reading a list takes no time.
        """
        cursor = Cursor(epoch)
        if isinstance(self.given, tf.data.Dataset) or (self.is_indexed and not isinstance(self.given, list)):
            key = cursor, self.count  # a source that grows is read again
            self._ahead[key] = self._reader(cursor, features, waits=True)

    def close_ahead(self, limit_s: float = 5.0) -> None:
        """Close the reader of the next epoch. With 0 seconds in any thread: the garbage collector may call this."""
        while self._ahead:
            self._ahead.popitem()[1].close(limit_s)

    def _reader(self, cursor: Cursor, features: Features | None, *, waits: bool) -> reader.Reader:
        (epoch, step, begins), samples, backend = cursor, self.sampler is not None, self.backend
        checked = 1 if samples else min(step, len(begins)) if step else _BEGINNING
        compares = not (samples or self.config.replicated or backend.num_workers == 1)
        prints = measures.Fingerprints(None if samples else backend.worker_index, checked, compares)
        steps = self.steps(epoch, step, checked if step else 0)
        return reader.Reader(steps, self.config, features, prints, waits=waits)

    def identity(self) -> dict[str, Any]:
        """What a saved position belongs to: a sampler's plan, or the numbers that decide which examples a step has."""
        if self.sampler is not None:
            return {"sampler": self.sampler.fingerprint()}
        workers, replicas = self.backend.num_workers, self.backend.num_replicas
        return {"batch_size": self.config.batch_size, "workers": workers, "replicas": replicas}

    @property
    def rows(self) -> int | None:
        """A replica's rows of every batch; None if the number varies."""
        if self.sampler is not None and self.sampler.global_batch_size:
            return -(-self.sampler.global_batch_size // self.backend.num_replicas)
        return self.config.batch_size

    def length(self, epoch: int | None) -> int | None:
        """The steps of an epoch, or of every epoch; None if the number is unknown or varies."""
        count, size = self.count, (self.config.batch_size or 1) * self.backend.num_replicas
        if self.sampler is not None:
            varies = epoch is None and self.sampler.max_tokens
            count, size = None if varies else len(self.sampler.of_epoch(epoch or 0).steps), 1
        elif self.backend.num_workers > 1:
            return None
        group = self.config.accumulation_steps
        whole = self.config.drop_remainder
        return count and (count // (size * group) if whole else -(-count // (size * group))) * group

    @functools.cached_property
    def _sampled(self) -> Buckets | None:
        """The buckets that "auto" uses for the lengths of a sampler."""
        if self.sampler is None or not len(self.sampler.lengths):
            return None
        if self.sampler.max_tokens and not self.sampler.buckets:  # more padding would exceed its budget
            return Buckets.multiples(1)
        return self.sampler.buckets or Buckets.from_lengths(self.sampler.lengths, _BOUNDARIES)

    def padded_sizes(self, epoch: int, step: int, longest: tuple[int, ...]) -> tuple[int, ...]:
        """The padded sizes of a step's axes. With "auto", an axis whose longest size is the longest sampled length of
        the step uses the sampler's buckets."""
        sampled = max(1, self.sampler.of_epoch(epoch).longest[step]) if self.sampler is not None else None
        return self.config.padded_sizes(longest, self._sampled, sampled)


def _known(source: Any) -> Any:
    """An array and a pandas.DataFrame as Columns."""
    pandas = sys.modules.get("pandas")  # a source is a DataFrame only if pandas is imported
    if pandas is not None and isinstance(source, pandas.DataFrame):
        return Columns({name: source[name].to_numpy() for name in source.columns})
    return Columns(source) if isinstance(source, np.ndarray) and source.ndim and source.dtype != object else source
