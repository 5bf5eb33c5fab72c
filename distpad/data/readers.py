"""Readers: which examples each step of a worker has, and the examples themselves from an indexable or an iterable."""

from __future__ import annotations

import array
import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distpad import errors
from distpad.data import threads
from distpad.data.chunks import Chunk, Rows
from distpad.data.columns import Columns
from distpad.data.sampler import LengthSampler

_NAME = "PaddedBatches"
_REASON = 256  # characters of an error that are kept with a skipped example


class Unread(NamedTuple):
    """Stands for an example that could not be read, where examples are skipped."""

    error: Exception


class Step(NamedTuple):
    """One micro-batch of a source, for all replicas of this worker.

    Attributes:
      batch_size: rows of a replica.
      indices: the example indices, one replica's after the other's.
      counts: the examples of each replica.
      rows: the examples.
      is_check: whether the step lies before the loaded position, and only its fingerprint is compared.
      is_last: whether the source is known to have no further step.
      skipped: the examples that were left out: the index of each, and the reason.
    """

    batch_size: int
    indices: np.ndarray
    counts: list[int]
    rows: Rows = ()
    is_check: bool = False
    is_last: bool = False
    skipped: tuple[tuple[int, str], ...] = ()

    def only(self, kept: Sequence[int]) -> Step:
        """The step with some of its examples, in their order."""
        counts = np.diff(np.searchsorted(kept, [0, *itertools.accumulate(self.counts)])).tolist()
        rows = self.rows.take(kept) if isinstance(self.rows, Chunk) else [self.rows[row] for row in kept]
        return self._replace(indices=self.indices[[*kept]], counts=counts, rows=rows)

    def without(self, failed: Mapping[int, Exception]) -> Step:
        """The step without the rows that failed, which it has skipped."""
        if not failed:
            return self
        texts = {row: f"{type(error).__name__}: {error}"[:_REASON] for row, error in failed.items()}
        skipped = [(int(self.indices[row]), text) for row, text in texts.items()]
        rest = self.only([row for row in range(len(self.indices)) if row not in failed])
        return rest._replace(skipped=(*self.skipped, *skipped))

    def without_unread(self) -> Step:
        """The step without the examples that could not be read."""
        rows = () if isinstance(self.rows, Chunk) else self.rows
        return self.without({row: each.error for row, each in enumerate(rows) if isinstance(each, Unread)})


def in_order(batch_size: int, replicas: int, checks: int, step: int, count: int | None = None) -> Iterator[Step]:
    """Yield a worker's steps in the order of its source: the first ``checks`` steps, then the steps from ``step`` on.

    Without a ``count`` of examples the steps do not end. The replicas share the examples of the last step evenly.
    """
    size = batch_size * replicas
    for number in itertools.chain(range(checks), itertools.count(step)):
        begin = number * size
        end = begin + size if count is None else min(begin + size, count)
        if begin < end:
            shares, is_last = _shares(end - begin, replicas), end == count and number >= step
            yield Step(batch_size, np.arange(begin, end), shares, is_check=number < step, is_last=is_last)
        elif number >= checks:
            return


def _shares(count: int, replicas: int) -> list[int]:
    """The examples of each replica, as evenly as possible."""
    return [count // replicas + (replica < count % replicas) for replica in range(replicas)]


def sampled(
    sampler: LengthSampler, replicas: Sequence[int], num_replicas: int, epoch: int, step: int
) -> Iterator[Step]:
    """Yield the steps of this worker's replicas by a sampler's plan, from ``step`` on.

    If ``step`` is not 0, the first step of the epoch precedes them, and is compared.

    Args:
      replicas: the indices of this worker's replicas among ``num_replicas``.
    """
    plan = sampler.of_epoch(epoch)
    for number in [0] * bool(step) + [*range(step, len(plan.steps))]:
        batches = plan.deal(number, num_replicas, replicas)
        indices = [batch[batch >= 0] for batch in batches]
        is_check, is_last = number < step, step <= number == len(plan.steps) - 1
        yield Step(len(batches[0]), np.concatenate(indices), [*map(len, indices)], is_check=is_check, is_last=is_last)


def read_indexed(source: Any, steps: Iterable[Step], num_parallel_reads: int, *, skips: bool) -> Iterator[Step]:
    """Yield steps with the examples of their indices, in order; ``skips``: with Unread for errors.

    Several threads read parts of a step, and the steps after it, so that all threads have work.
    """
    read = fetch(source, skips=skips)
    if num_parallel_reads == 1 or isinstance(source, Columns):
        for step in steps:
            yield step._replace(rows=read(step.indices))
        return
    whole = hasattr(source, "__getitems__")  # asked once a step
    pool = threads.Pool(num_parallel_reads)
    pending: collections.deque[tuple[Step, list[Callable[[], Any]]]] = collections.deque()
    try:
        for step in steps:
            parts = np.array_split(step.indices, 1 if whole else max(1, min(num_parallel_reads, len(step.indices))))
            pending.append((step, [pool.call(read, part) for part in parts]))
            if sum(len(results) for _, results in pending) > 2 * num_parallel_reads:
                yield _with_rows(*pending.popleft())
        while pending:
            yield _with_rows(*pending.popleft())
    finally:
        pool.close()


def fetch(source: Any, *, skips: bool = False) -> Callable[[np.ndarray], Rows]:
    """A function from indices to their examples; ``skips``: with Unread in place of an error."""
    if isinstance(source, Columns):
        return source.take
    if skips:
        return functools.partial(_or_unread, fetch(source))
    if hasattr(source, "__getitems__"):
        return lambda indices: _of_indices(source.__getitems__(indices.tolist()), indices)
    if type(source) is list:
        return lambda indices: [source[index] for index in indices.tolist()]
    return lambda indices: [_item(source, index) for index in indices.tolist()]


def _item(source: Any, index: int) -> Any:
    try:
        return _own(source[index])
    except IndexError as error:
        found, rule = f"of length {len(source)}, but source[{index}] raised {error!r}", "an example at each index"
        raise ValueError(errors.sentence(_NAME, "source", found, rule)) from error
    except StopIteration as error:  # which would end the generator that calls this
        raise RuntimeError(f"{_NAME}: source[{index}] raised StopIteration, expected an example.") from error


def _of_indices(rows: Any, indices: np.ndarray) -> list[Any]:
    kind = type(rows).__name__
    if isinstance(rows, (Mapping, tuple)) or not isinstance(rows, Iterable):  # a tuple may hold columns
        rows, found = [], f"a {kind}"
    else:
        rows = [*rows]
        found = f"{len(rows)} examples"
    if len(rows) != len(indices):
        raise ValueError(errors.sentence(_NAME, "source.__getitems__", found, f"a list of {len(indices)} examples"))
    return [_own(row) for row in rows]


def _or_unread(read: Callable[[np.ndarray], Any], indices: np.ndarray) -> list[Any]:
    """The examples, read one by one if reading all fails."""
    try:
        return [*read(indices)]
    except MemoryError:
        raise
    except Exception as error:
        if len(indices) == 1:
            return [Unread(error)]
    return [row for at in range(len(indices)) for row in _or_unread(read, indices[at : at + 1])]


def _with_rows(step: Step, results: list[Callable[[], Any]]) -> Step:
    rows: list[Any] = []
    for result in results:
        rows += result()
    return step._replace(rows=rows)


def read_iterable(
    source: Any, steps: Iterable[Step], size: int, opened: int, *, skips: bool, count: int | None
) -> Iterator[Step]:
    """Yield steps with the next examples of one iteration; examples that lie between two steps are left out.

    Args:
      size: the examples of a step.
      opened: how often the source was iterated, this time included.
      skips: whether Unread stands for an example whose reading raises.
      count: the examples of the source, if they are known.
    """
    examples = iter(source)
    if examples is source and opened > 1:
        remedy = "Give a list, a tf.data.Dataset, or an object whose __iter__ begins again."
        found = f"an iterator ({type(source).__name__}), used up by the first epoch"
        raise ValueError(errors.sentence(_NAME, "source", found, "a source that can be iterated again", remedy))
    owned = _owned(examples, skips, count)
    yield from paired(((rows, len(rows), last) for rows, last in grouped(owned, size)), steps, size)


def grouped(items: Iterator[Any], size: int) -> Iterator[tuple[list[Any], bool]]:
    """Yield the next ``size`` items, and whether they are the last. An error comes after the groups before it."""
    following: list[Any] = []  # the first item of the next group
    failed = None
    while failed is None:
        taken, following = following, []
        try:
            for item in itertools.islice(items, size - len(taken)):
                taken.append(item)
            following = [*itertools.islice(items, len(taken) // size)]
        except BaseException as error:
            failed = error
        if len(taken) == size or (taken and failed is None):
            yield taken, not following and failed is None
        if not following and failed is None:
            return
    raise failed


def paired(groups: Iterator[tuple[Rows, int, bool]], steps: Iterable[Step], size: int) -> Iterator[Step]:
    """Yield each step with its group of rows; groups that lie between two steps are left out.

    Args:
      groups: rows, their number, and whether they are the last, for ``size`` examples each.
    """
    at = 0
    for step in steps:
        number = int(step.indices[0]) // size
        rows, count, is_last = next(itertools.islice(groups, number - at, None), ((), 0, True))
        at = number + 1
        is_last = is_last and not step.is_check
        if count:
            if count < len(step.indices):
                step = step._replace(indices=step.indices[:count], counts=_shares(count, len(step.counts)))
            yield step._replace(rows=rows, is_last=is_last)
        if is_last:
            return


def _owned(examples: Iterator[Any], skips: bool, count: int | None) -> Iterator[Any]:
    """Yield the examples of an iterator, without another call of its ``__iter__``, which may restart it.

    With ``skips``, an error gives Unread. An iterator that ends after an error, as a generator does, may have lost the
    examples after it: that is an error, unless the error was that of the last of ``count`` examples.
    """
    failed: Exception | None = None
    for at in itertools.count():
        error, example = None, None
        try:
            example = next(examples)
        except StopIteration:
            if failed is None or at == count:
                return
            remedy = "Give an object with __getitem__ and __len__, or handle the error in the source."
            found, rule = f"an iterator that ended with the error of example {at - 1}", "one that continues"
            raise ValueError(errors.sentence(_NAME, "source", found, rule, remedy)) from failed
        except MemoryError:
            raise
        except Exception as raised:
            if not skips:
                raise
            error = raised
        failed = error
        yield Unread(error) if error else _own(example)


def _own(example: Any) -> Any:
    """The example with copies of what may change or is memory-mapped, since a source may use its buffers again.

    Raises: ValueError: an example that is nested too deep, or larger than the memory.
    """
    try:
        return _copied(example)
    except RecursionError:
        found = "nested deeper than Python can follow"
        raise ValueError(errors.sentence(_NAME, "an example", found, "a short nest of features")) from None


def _copied(example: Any) -> Any:
    kind = type(example)
    if kind in _IMMUTABLE or isinstance(example, np.generic):
        return example
    if isinstance(example, Mapping):
        return {key: _copied(item) for key, item in example.items()}
    if isinstance(example, tuple):
        items = map(_copied, example)
        return kind(*items) if hasattr(example, "_fields") else tuple(items)
    if kind is list:
        return [*example] if {*map(type, example)} <= _IMMUTABLE else [*map(_copied, example)]
    if isinstance(example, np.ma.MaskedArray):
        return example.copy()
    if isinstance(example, np.ndarray):  # of broadcast arrays a copy may be larger than the memory
        errors.check_memory("an example", example.shape, example.dtype)
    if hasattr(example, "__array__") or isinstance(example, (array.array, bytearray, memoryview)):
        return np.array(example)
    return example


_IMMUTABLE = {int, float, bool, complex, str, bytes}
