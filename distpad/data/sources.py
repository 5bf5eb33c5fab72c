"""Sources of examples, and their distribution over a worker's replicas, step by step."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.data.sampler import LengthSampler
from distpad.data.schema import Name, named_arrays

_NAME = "PaddedBatches"
_HEAD = 4  # examples that are checked for being batches


class Step(NamedTuple):
    """One micro-batch of a source: for each replica of this worker, its examples and their example indices.

    Attributes:
      is_check: whether the step lies before the loaded position, and only its fingerprint is compared.
    """

    batch_size: int
    examples: list[list[Any]]
    indices: list[np.ndarray]
    is_check: bool = False


def checked(source: Any, batch_size: Any, drop_remainder: bool) -> tuple[Any, LengthSampler | None]:
    """Return the checked source of examples, and its sampler or None."""
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], LengthSampler):
        indexable, sampler = _rows_of(source[0]), source[1]
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
    source = _rows_of(source)
    if not hasattr(source, "__iter__"):
        remedy = "Wrap a generator function in a class with __iter__." if callable(source) else ""
        kinds = "a tf.data.Dataset, an iterable, an object with __getitem__ and __len__, or (indexable, LengthSampler)"
        raise TypeError(errors.sentence(_NAME, "source", type(source).__name__, kinds, remedy))
    if batch_size is None:
        raise ValueError(errors.sentence(_NAME, "batch_size", None, "examples per replica, without a sampler"))
    return source, None


class _InOrder:
    """Makes an object with ``__getitem__`` and ``__len__`` iterable."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._source[index]

    def __iter__(self) -> Iterator[Any]:
        return (self._source[index] for index in range(len(self)))


class _Rows:
    """The rows of a pandas.DataFrame as dicts."""

    def __init__(self, frame: Any) -> None:
        self._columns = {name: frame[name].to_numpy() for name in frame.columns}
        self._count = len(frame)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[Any, Any]:
        return {name: column[index] for name, column in self._columns.items()}


def _rows_of(source: Any) -> Any:
    """Return the source as an iterable of examples."""
    pandas = sys.modules.get("pandas")  # a source is a DataFrame only if pandas is imported
    if pandas is not None and isinstance(source, pandas.DataFrame):
        return _InOrder(_Rows(source))
    is_indexed = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    return _InOrder(source) if is_indexed and not hasattr(source, "__iter__") else source


def _refuse_batches(examples: Sequence[Any], tokens: Sequence[Name]) -> None:
    """Raise ValueError if the first elements of a tf.data.Dataset look like batches.

    In batches all features have a leading axis of one size, the same in all elements but for a smaller last one.
    """
    sizes, ranks = [], set()
    for example in examples:
        arrays = named_arrays(example)
        sizes.append({array.shape[:1] for array in arrays.values()})
        ranks |= {array.ndim for name, array in arrays.items() if name in tokens}
    if (
        len(examples) < 2
        or () in set().union(*sizes)
        or any(len(each) > 1 for each in sizes)
        or min(ranks, default=0) < 2
    ):
        return
    first, *others = [size for each in sizes for (size,) in each]
    if first > 1 and all(size == first for size in others[:-1]) and others[-1] <= first:
        found = f"a tf.data.Dataset whose elements hold {first} rows of every feature"
        remedy = "Write dataset.unbatch(), since PaddedBatches makes the batches."
        raise ValueError(errors.sentence(_NAME, "source", found, "a dataset of single examples", remedy))


def examples_of(source: Any, checked: int, first: int, opened: int, tokens: Sequence[Name]) -> Iterator[Any]:
    """Yield the first ``checked`` examples of a source, then the examples from ``first`` on.

    Both come from one iteration, since another iteration may have another order.

    Args:
      opened: how often the source was iterated, this time included.
      tokens: the counted features.
    """
    if isinstance(source, tf.data.Dataset):
        if first:
            kept = source.enumerate().filter(lambda index, _: (index < checked) | (index >= first))
            source = kept.map(lambda _, example: example)
        examples = iter(source.as_numpy_iterator())
        head = [*itertools.islice(examples, _HEAD)]
        shapes = [spec.shape for spec in tf.nest.flatten(source.element_spec) if isinstance(spec, tf.TensorSpec)]
        # Batches have an unknown batch size or an unknown padded length; examples of one size have neither.
        if all(shape.rank and shape[0] is None for shape in shapes) or any(None in shape[1:] for shape in shapes):
            _refuse_batches(head, tokens)
        return itertools.chain(head, examples)
    examples = iter(source)
    if examples is source and opened > 1:
        remedy = "Give a list, a tf.data.Dataset, or an object whose __iter__ begins again."
        found = f"an iterator ({type(source).__name__}), used up by the first epoch"
        raise ValueError(errors.sentence(_NAME, "source", found, "a source that can be iterated again", remedy))
    return itertools.chain(itertools.islice(examples, checked), itertools.islice(examples, first - checked, None))


def count_of(source: Any) -> int | None:
    """The number of examples; None if it is unknown."""
    if isinstance(source, tf.data.Dataset):
        count = int(source.cardinality())
        return count if count >= 0 else None
    return len(source) if hasattr(source, "__len__") else None


def steps_of_examples(
    examples: Iterator[Any], batch_size: int, replicas: int, checks: int, step: int
) -> Iterator[Step]:
    """Yield a worker's steps: the first ``checks`` steps, which are compared, then the steps from ``step`` on.

    The replicas share the examples of the last step evenly.
    """
    for number in itertools.chain(range(checks), itertools.count(step)):
        is_check, first = number < step, number * batch_size * replicas
        taken: list[Any] = []
        failed: BaseException | None = None
        try:
            for example in itertools.islice(examples, batch_size * replicas):
                taken.append(example)
        except BaseException as error:  # raised after the examples that were read before it
            failed = error
        if failed is None and not taken:
            return
        if failed is None or len(taken) == batch_size * replicas:
            parts = np.array_split(np.arange(len(taken)), replicas)
            examples_of_replicas = [[taken[i] for i in part] for part in parts]
            yield Step(batch_size, examples_of_replicas, [first + part for part in parts], is_check)
        if failed is not None:
            raise failed


def steps_of_sampler(
    indexable: Any, sampler: LengthSampler, replicas: Sequence[int], num_replicas: int, epoch: int, step: int
) -> Iterator[Step]:
    """Yield the steps of this worker's replicas by a sampler's plan, from ``step`` on.

    If ``step`` is not 0, the first step of the epoch precedes them, and is compared.

    Args:
      replicas: the indices of this worker's replicas among ``num_replicas``.
    """
    shards = [sampler.shard(replica, num_replicas) for replica in replicas]
    for number in [0] * bool(step) + [*range(step, len(sampler.plan(epoch)))]:
        batches = [shard.batch(epoch, number) for shard in shards]
        indices = [batch[batch >= 0] for batch in batches]
        examples = [[indexable[int(i)] for i in batch] for batch in indices]
        yield Step(len(batches[0]), examples, indices, is_check=number < step)
