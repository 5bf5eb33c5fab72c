"""Sources of examples, read step by step: indexables, iterables and tf.data, by rows or by columns."""

from __future__ import annotations

import collections
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.data import structure
from distpad.data.chunks import Chunk, Rows
from distpad.data.columns import Columns
from distpad.data.sampler import LengthSampler
from distpad.data.structure import Name
from distpad.padding.columns import Column

_NAME = "PaddedBatches"
_HEAD = 4  # examples that are checked for being batches


class Step(NamedTuple):
    """One micro-batch of a source, for all replicas of this worker.

    Attributes:
      batch_size: rows of a replica.
      indices: the example indices of each replica.
      rows: the examples, one replica's after the other's.
      is_check: whether the step lies before the loaded position, and only its fingerprint is compared.
      is_last: whether the source is known to have no further step.
    """

    batch_size: int
    indices: list[np.ndarray]
    rows: Rows = ()
    is_check: bool = False
    is_last: bool = False


# -- which kind a source is of ----------------------------------------------------------------------------------------


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


# -- the steps of an epoch, without their examples --------------------------------------------------------------------


def in_order(batch_size: int, replicas: int, checks: int, step: int, count: int | None = None) -> Iterator[Step]:
    """Yield a worker's steps in the order of its source: the first ``checks`` steps, then the steps from ``step`` on.

    Without a ``count`` of examples the steps do not end. The replicas share the examples of the last step evenly.
    """
    size = batch_size * replicas
    for number in itertools.chain(range(checks), itertools.count(step)):
        begin = number * size
        end = begin + size if count is None else min(begin + size, count)
        if begin < end:
            indices = [np.arange(begin, end)]
            indices = indices if replicas == 1 else np.array_split(indices[0], replicas)
            yield Step(batch_size, indices, is_check=number < step, is_last=end == count and number >= step)
        elif number >= checks:
            return


def sampled(
    sampler: LengthSampler, replicas: Sequence[int], num_replicas: int, epoch: int, step: int
) -> Iterator[Step]:
    """Yield the steps of this worker's replicas by a sampler's plan, from ``step`` on.

    If ``step`` is not 0, the first step of the epoch precedes them, and is compared.

    Args:
      replicas: the indices of this worker's replicas among ``num_replicas``.
    """
    shards, steps = [sampler.shard(replica, num_replicas) for replica in replicas], len(sampler.plan(epoch))
    for number in [0] * bool(step) + [*range(step, steps)]:
        batches = [shard.batch(epoch, number) for shard in shards]
        indices = [batch[batch >= 0] for batch in batches]
        yield Step(len(batches[0]), indices, is_check=number < step, is_last=number >= step and number + 1 == steps)


# -- reading them -----------------------------------------------------------------------------------------------------


def read_indexed(source: Any, steps: Iterable[Step], num_parallel_reads: int) -> Iterator[Step]:
    """Yield steps with the examples of their indices, in order.

    Several threads read parts of a step, and the steps after it, so that all threads have work.
    """
    read = _fetch(source)
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


def _fetch(source: Any) -> Callable[[np.ndarray], Rows]:
    """A function from indices to their examples."""
    if isinstance(source, Columns):
        return source.take
    if hasattr(source, "__getitems__"):
        return lambda indices: _of_indices(source.__getitems__(indices.tolist()), indices)
    if isinstance(source, list):
        return lambda indices: [source[index] for index in indices.tolist()]
    return lambda indices: [_own(source[index]) for index in indices.tolist()]


def _of_indices(rows: Any, indices: np.ndarray) -> list[Any]:
    if isinstance(rows, Mapping) or len(rows) != len(indices):
        found = "a mapping" if isinstance(rows, Mapping) else f"{len(rows)} examples"
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
    at = 0
    following: list[Any] = []  # the first example of the next step, if it was read
    for step in steps:
        size, first = sum(map(len, step.indices)), int(step.indices[0][0])
        taken, following, failed = following, [], None
        try:
            collections.deque(itertools.islice(examples, max(0, first - at)), 0)
            for example in itertools.islice(examples, size - len(taken)):
                taken.append(_own(example))
            if not step.is_check:
                following = [_own(example) for example in itertools.islice(examples, len(taken) // size)]
        except BaseException as error:  # raised after the examples that were read before it
            failed = error
        if len(taken) == size or (taken and failed is None):
            is_last = not (step.is_check or following or failed)
            yield _cut(step, len(taken))._replace(rows=taken, is_last=is_last)
        if failed is not None:
            raise failed
        if not (step.is_check or following):
            return
        at = first + size


def _cut(step: Step, count: int) -> Step:
    """The step with the first ``count`` of its examples, shared evenly by the replicas."""
    if count == sum(map(len, step.indices)):
        return step
    return step._replace(indices=np.array_split(np.concatenate(step.indices)[:count], len(step.indices)))


def _own(example: Any) -> Any:
    """The example with copies of its writeable arrays, since a source may use its buffers again."""
    if isinstance(example, np.ndarray):
        return example.copy() if example.flags.writeable else example
    if type(example) is dict:
        return {key: _own(item) for key, item in example.items()}
    if type(example) is tuple:
        return tuple(map(_own, example))
    if isinstance(example, tuple) and hasattr(example, "_fields"):
        return type(example)(*map(_own, example))
    return example


# -- tf.data ----------------------------------------------------------------------------------------------------------


def batched(dataset: tf.data.Dataset, size: int) -> tf.data.Dataset | None:
    """Return the dataset of ``size`` elements each; None if tf.data cannot make it, as for elements of unknown rank."""
    specs = tf.nest.flatten(dataset.element_spec)
    if not all(isinstance(spec, _TENSORS) and spec.shape.rank is not None for spec in specs):
        return None
    if any(isinstance(spec, tf.SparseTensorSpec) for spec in specs):
        dataset = dataset.map(_dense)
    return dataset.ragged_batch(size)


def read_dataset(
    dataset: tf.data.Dataset,
    size: int,
    batches: tf.data.Dataset | None,
    steps: Iterator[Step],
    tokens: Sequence[Name],
) -> Iterator[Step]:
    """Yield steps with the next elements of one iteration, batched by tf.data.

    Args:
      size: the examples of a step.
      batches: the result of ``batched``, which is made once for all epochs.
      tokens: the counted features.

    Raises: ValueError: elements that look like batches.
    """
    if batches is None:
        yield from read_iterable(_AsNumPy(dataset), steps, 1)
        return
    chunks: Iterator[Chunk] = map(_chunk, batches)
    shapes = [spec.shape for spec in tf.nest.flatten(dataset.element_spec)]
    # Batches have an unknown batch size or an unknown padded length; examples of one size have neither.
    if all(shape.rank and shape[0] is None for shape in shapes) or any(None in shape[1:] for shape in shapes):
        chunks = _single(chunks, -(-_HEAD // size), tokens)
    yield from _paired(chunks, steps, size, count_of(dataset) is not None)


_TENSORS = (tf.TensorSpec, tf.RaggedTensorSpec, tf.SparseTensorSpec)


class _AsNumPy:
    """Elements of other kinds, or of unknown rank, one by one."""

    def __init__(self, dataset: tf.data.Dataset) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self._dataset.as_numpy_iterator())


def _dense(*element: Any) -> Any:
    dense = lambda leaf: tf.sparse.to_dense(leaf) if isinstance(leaf, tf.SparseTensor) else leaf
    mapped = tf.nest.map_structure(dense, element)
    return mapped if len(mapped) > 1 else mapped[0]


def _paired(chunks: Iterator[Chunk], steps: Iterator[Step], size: int, is_counted: bool) -> Iterator[Step]:
    """Yield each step with its chunk. Without a count, a chunk is read ahead, to know the last step as such."""
    at = 0
    following: Chunk | None = None
    for step in steps:
        number, failed = int(step.indices[0][0]) // size, None
        while at <= number:
            chunk, following, at = following or next(chunks, None), None, at + 1
        if chunk is None:
            return
        if not (is_counted or step.is_check):
            try:
                following = next(chunks, None)
            except BaseException as error:  # of the next step
                failed = error
            step = step._replace(is_last=following is None and failed is None)
        yield _cut(step, chunk.columns[0].num_examples)._replace(rows=chunk)
        if failed is not None:
            raise failed
        if step.is_last:
            return


def _chunk(batch: Any) -> Chunk:
    """A batch of tf.data as a chunk."""
    skeleton = structure.skeleton_of(batch)
    return Chunk(skeleton, [_column(leaf) for leaf in structure.leaves_of(batch, skeleton)])


def _column(leaf: Any) -> Column:
    if isinstance(leaf, tf.RaggedTensor):
        return Column(np.asarray(leaf.flat_values), tuple(np.asarray(each) for each in leaf.nested_row_splits))
    return Column(np.asarray(leaf))


def _single(chunks: Iterator[Chunk], head: int, tokens: Sequence[Name]) -> Iterator[Chunk]:
    """Yield the chunks, after a look at the first ``head``. Raises: ValueError: elements that look like batches."""
    first, failed = [], None
    try:
        for chunk in itertools.islice(chunks, head):
            first.append(chunk)
    except BaseException as error:  # raised after the chunks before it
        failed = error
    _refuse_batches(first, tokens)
    yield from first
    if failed is not None:
        raise failed
    yield from chunks


def _refuse_batches(chunks: Sequence[Chunk], tokens: Sequence[Name]) -> None:
    """Raise ValueError if the first elements of a tf.data.Dataset look like batches.

    In batches all features have a leading axis of one size, the same in all elements but for a smaller last one.
    """
    found: list[set[int]] = []
    ranks: set[int] = set()
    for chunk in chunks:
        sizes = []
        for name, column in zip(structure.names_of(chunk.skeleton), chunk.columns):
            rank = len(column.splits) + column.values.ndim - 1
            if not rank:
                return
            ranks |= {rank} if name in tokens else set()
            sizes.append(np.diff(column.splits[0]) if column.splits else [column.values.shape[1]] * len(column.values))
        found += map(set, zip(*sizes))
    found = found[:_HEAD]
    if len(found) < 2 or any(len(each) > 1 for each in found) or min(ranks, default=0) < 2:
        return
    first, *others = [int(size) for (size,) in found]
    if first > 1 and all(size == first for size in others[:-1]) and others[-1] <= first:
        text = f"a tf.data.Dataset whose elements hold {first} rows of every feature"
        remedy = "Write dataset.unbatch(), since PaddedBatches makes the batches."
        raise ValueError(errors.sentence(_NAME, "source", text, "a dataset of single examples", remedy))
