"""Readers: the examples of each step from an indexable or an iterable."""

from __future__ import annotations

import array
import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np

from distpad import errors
from distpad.data import steps as planned
from distpad.data.chunks import Rows
from distpad.data.columns import Columns
from distpad.data.steps import Step

_NAME = "PaddedBatches"


def read_indexed(source: Any, steps: Iterable[Step], num_parallel_reads: int) -> Iterator[Step]:
    """Yield steps with the examples of their indices, in order.

    Several threads read parts of a step, and the steps after it, so that all threads have work.
    """
    read = fetch(source)
    if num_parallel_reads == 1 or isinstance(source, Columns):
        for step in steps:
            yield step._replace(rows=read(_joined(step.indices)))
        return
    whole = hasattr(source, "__getitems__")  # asked once a step
    pool = ThreadPool(num_parallel_reads)
    pending: collections.deque[tuple[Step, list[Any]]] = collections.deque()
    try:
        for step in steps:
            indices = _joined(step.indices)
            parts = [indices] if whole else np.array_split(indices, max(1, min(num_parallel_reads, len(indices))))
            pending.append((step, [pool.apply_async(_or_error, (read, part)) for part in parts]))
            if sum(len(results) for _, results in pending) > 2 * num_parallel_reads:
                yield _with_rows(*pending.popleft())
        while pending:
            yield _with_rows(*pending.popleft())
    finally:
        pool.terminate()


def _joined(indices: list[np.ndarray]) -> np.ndarray:
    return indices[0] if len(indices) == 1 else np.concatenate(indices)


def fetch(source: Any) -> Callable[[np.ndarray], Rows]:
    """A function from indices to their examples."""
    if isinstance(source, Columns):
        return source.take
    if hasattr(source, "__getitems__"):
        return lambda indices: _of_indices(source.__getitems__(indices.tolist()), indices)
    if isinstance(source, list):
        return lambda indices: [source[index] for index in indices.tolist()]
    return lambda indices: [_item(source, index) for index in indices.tolist()]


def _item(source: Any, index: int) -> Any:
    try:
        return _own(source[index])
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


def _or_error(read: Callable[[np.ndarray], Rows], indices: np.ndarray) -> Any:
    try:
        return read(indices)
    except BaseException as error:  # also SystemExit, which would end a thread of the pool without a result
        return error


def _with_rows(step: Step, results: list[Any]) -> Step:
    rows: list[Any] = []
    for result in results:
        read = result.get()
        if isinstance(read, BaseException):
            raise read
        rows += read
    return step._replace(rows=rows)


def read_iterable(source: Any, steps: Iterable[Step], opened: int) -> Iterator[Step]:
    """Yield steps with the next examples of one iteration; examples that lie between two steps are left out.

    Args:
      opened: how often the source was iterated, this time included.
    """
    examples = iter(source)
    if examples is source and opened > 1:
        remedy = "Give a list, a tf.data.Dataset, or an object whose __iter__ begins again."
        found = f"an iterator ({type(source).__name__}), used up by the first epoch"
        raise ValueError(errors.sentence(_NAME, "source", found, "a source that can be iterated again", remedy))
    rows = _owned(examples)
    at = 0
    following: list[Any] = []  # the first example of the next step, if it was read
    for step in steps:
        size, first = sum(map(len, step.indices)), int(step.indices[0][0])
        taken, following, failed = following, [], None
        try:
            collections.deque(itertools.islice(rows, max(0, first - at)), 0)
            for row in itertools.islice(rows, size - len(taken)):
                taken.append(row)
            if not step.is_check:
                following = [*itertools.islice(rows, len(taken) // size)]
        except BaseException as error:  # raised after the examples that were read before it
            failed = error
        if len(taken) == size or (taken and failed is None):
            is_last = not (step.is_check or following or failed)
            yield planned.cut(step, len(taken))._replace(rows=taken, is_last=is_last)
        if failed is not None:
            raise failed
        if not (step.is_check or following):
            return
        at = first + size


def _owned(examples: Iterator[Any]) -> Iterator[Any]:
    """Yield the examples of an iterator, without another call of its ``__iter__``, which may restart it."""
    while True:
        try:
            example = next(examples)
        except StopIteration:
            return
        yield _own(example)


def _own(example: Any) -> Any:
    """The example with copies of what may change or is memory-mapped, since a source may use its buffers again."""
    kind = type(example)
    if kind in _IMMUTABLE or isinstance(example, np.generic):
        return example
    if isinstance(example, Mapping):
        return {key: _own(item) for key, item in example.items()}
    if isinstance(example, tuple):
        items = map(_own, example)
        return kind(*items) if hasattr(example, "_fields") else tuple(items)
    if kind is list:
        return [*example] if {*map(type, example)} <= _IMMUTABLE else [*map(_own, example)]
    if isinstance(example, np.ma.MaskedArray):
        return example.copy()
    if hasattr(example, "__array__") or isinstance(example, (array.array, bytearray, memoryview)):
        return np.array(example)
    return example


_IMMUTABLE = {int, float, bool, complex, str, bytes}
