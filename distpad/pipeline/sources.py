"""Sources: what examples are read from, and how a worker's are dealt to its replicas step by step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.sampling import LengthSampler

_NAME = "PaddedBatches"


class Step(NamedTuple):
    """One micro-batch as a source gives it: for each replica of this worker its examples and their places.

    ``is_check``: it was trained on before the position that was loaded, and is only compared with what was read then.
    """

    batch_size: int
    examples: list[list[Any]]
    places: list[np.ndarray]
    is_check: bool = False


def checked(source: Any, batch_size: Any, drop_remainder: bool) -> tuple[Any, LengthSampler | None]:
    """The examples, and the sampler that picks from them."""
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], LengthSampler):
        indexable, sampler = source
        if batch_size is not None:
            raise ValueError(errors.sentence(_NAME, "batch_size", batch_size, "None: the sampler decides"))
        if drop_remainder:
            raise ValueError(
                errors.sentence(_NAME, "drop_remainder", True, "False with a sampler, which drops nothing")
            )
        if not hasattr(indexable, "__getitem__"):
            raise TypeError(errors.sentence(_NAME, "source", type(indexable).__name__, "examples to be had by index"))
        count = len(indexable) if hasattr(indexable, "__len__") else None
        if count is not None and count != len(sampler.lengths):
            found = f"of {count} examples"
            raise ValueError(errors.sentence(_NAME, "source", found, f"{len(sampler.lengths)}, as the sampler has"))
        return indexable, sampler
    if not hasattr(source, "__iter__"):
        remedy = "A function that makes a generator? Wrap it in a class with __iter__." if callable(source) else ""
        kinds = "a tf.data.Dataset, an iterable, or (indexable, LengthSampler)"
        raise TypeError(errors.sentence(_NAME, "source", type(source).__name__, kinds, remedy))
    if batch_size is None:
        raise ValueError(errors.sentence(_NAME, "batch_size", None, "examples per replica; only a sampler decides it"))
    return source, None


def examples_of(source: Any, checked: int, first: int, opened: int) -> Iterator[Any]:
    """The first ``checked`` examples of a source and those from ``first`` on, in one iteration, since the next may have
    another order; ``opened`` counts the iterations."""
    if isinstance(source, tf.data.Dataset):
        if first:
            kept = source.enumerate().filter(lambda place, _: (place < checked) | (place >= first))
            source = kept.map(lambda _, example: example)
        return iter(source.as_numpy_iterator())
    examples = iter(source)
    if examples is source and opened > 1:
        remedy = "Give a list, a tf.data.Dataset, or an object whose __iter__ begins anew."
        found = f"an iterator ({type(source).__name__}), used up by the first epoch"
        raise ValueError(errors.sentence(_NAME, "source", found, "something to be iterated again", remedy))
    return itertools.chain(itertools.islice(examples, checked), itertools.islice(examples, first - checked, None))


def count_of(source: Any) -> int | None:
    """How many examples there are, where that is known."""
    if isinstance(source, tf.data.Dataset):
        count = int(source.cardinality())
        return count if count >= 0 else None
    return len(source) if hasattr(source, "__len__") else None


def steps_of_examples(
    examples: Iterator[Any], batch_size: int, replicas: int, checks: int, step: int
) -> Iterator[Step]:
    """Deal a worker's examples to its replicas, evenly where they end: the first ``checks`` steps, to be compared, and
    then those from ``step`` on."""
    for number in itertools.chain(range(checks), itertools.count(step)):
        is_check, first = number < step, number * batch_size * replicas
        taken: list[Any] = []
        failed: BaseException | None = None
        try:
            for example in itertools.islice(examples, batch_size * replicas):
                taken.append(example)
        except BaseException as error:  # what was read before it still counts; the training raises it
            failed = error
        if failed is None and not taken:
            return
        if failed is None or len(taken) == batch_size * replicas:
            parts = np.array_split(np.arange(len(taken)), replicas)
            dealt = [[taken[i] for i in part] for part in parts]
            yield Step(batch_size, dealt, [first + part for part in parts], is_check)
        if failed is not None:
            raise failed


def steps_of_sampler(
    indexable: Any, sampler: LengthSampler, replicas: Sequence[int], num_replicas: int, epoch: int, step: int
) -> Iterator[Step]:
    """The examples that a sampler deals to this worker's replicas, which are ``replicas`` of ``num_replicas``: those of
    the first step, to be compared, where another is the first to be trained on."""
    shards = [sampler.shard(replica, num_replicas) for replica in replicas]
    for number in [0] * bool(step) + [*range(step, len(sampler.plan(epoch)))]:
        dealt = [shard.batch(epoch, number) for shard in shards]
        places = [part[part >= 0] for part in dealt]
        examples = [[indexable[int(i)] for i in part] for part in places]
        yield Step(len(dealt[0]), examples, places, is_check=number < step)
