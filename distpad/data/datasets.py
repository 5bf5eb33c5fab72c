"""Datasets: the examples of each step from a tf.data.Dataset, which batches them in C++."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.data import readers, structure
from distpad.data.chunks import Chunk
from distpad.data.readers import Step
from distpad.data.schema import Features, Pad
from distpad.data.structure import Name
from distpad.padding.columns import Column

_NAME = "PaddedBatches"
_HEAD = 16  # examples that are checked for being batches
_TENSORS = (tf.TensorSpec, tf.RaggedTensorSpec, tf.SparseTensorSpec)


def batched(dataset: tf.data.Dataset, size: int) -> tf.data.Dataset | None:
    """Return the dataset of ``size`` elements each; None if tf.data cannot make it, as for elements of unknown rank."""
    specs = tf.nest.flatten(dataset.element_spec)
    if not all(isinstance(spec, _TENSORS) and spec.shape.rank is not None for spec in specs):
        return None
    if any(isinstance(spec, tf.SparseTensorSpec) for spec in specs):
        structure_of = dataset.element_spec
        dataset = dataset.map(lambda *element: tf.nest.pack_sequence_as(structure_of, [*map(_dense, _flat(element))]))
    given, options = dataset.options(), tf.data.Options()
    if given.autotune.enabled is None:
        # The tuning thread may sleep for a minute after an iterator was dropped, while the garbage collector, which
        # destroys the iterator, waits for it and holds the interpreter lock. AUTOTUNE then means one call per core.
        options.autotune.enabled = False
    # ragged_batch maps each element: scheduling that in parallel takes longer, and a map of the user may join it.
    for name, value in {"map_and_batch_fusion": False, "map_fusion": True}.items():
        if getattr(given.experimental_optimization, name) is None:
            setattr(options.experimental_optimization, name, value)
    return dataset.ragged_batch(size).with_options(options)


def features_of(dataset: tf.data.Dataset, padding: Mapping[Name, Pad]) -> Features | None:
    """The features of the elements; None if a rank is unknown. A fixed size that tf.data does not know is None."""
    skeleton = structure.skeleton_of(dataset.element_spec)
    specs = structure.leaves_of(dataset.element_spec, skeleton)
    if any(spec.shape.rank is None for spec in specs):
        return None
    arrays = [(np.dtype(spec.dtype.as_numpy_dtype), tuple(spec.shape)) for spec in specs]
    return Features.of_shapes(skeleton, arrays, padding)


def read(
    dataset: tf.data.Dataset,
    batches: tf.data.Dataset | None,
    steps: Iterator[Step],
    size: int,
    tokens: Sequence[Name],
    *,
    skips: bool,
) -> Iterator[Step]:
    """Yield steps with the next elements of one iteration, batched by tf.data.

    Args:
      batches: the result of ``batched``, which is made once for all epochs; None to read the elements one by one.
      size: the examples of a step.
      tokens: the counted features.
      skips: see ``readers.read_iterable``.

    Raises: ValueError: elements that look like batches.
    """
    count = int(dataset.cardinality())
    if batches is None:
        yield from readers.read_iterable(dataset.as_numpy_iterator(), steps, size, 1, skips=skips, count=count)
        return
    chunks: Iterator[Chunk] = map(_chunk, batches)
    shapes = [spec.shape for spec in tf.nest.flatten(dataset.element_spec)]
    # Batches have an unknown batch size or an unknown padded length; examples of one size have neither.
    if all(shape.rank and shape[0] is None for shape in shapes) or any(None in shape[1:] for shape in shapes):
        chunks = _single(chunks, -(-_HEAD // size), tokens)
    yield from readers.paired(_groups(chunks, size, count), steps, size)


def _groups(chunks: Iterator[Chunk], size: int, count: int) -> Iterator[tuple[Chunk, int, bool]]:
    """Yield each chunk, its examples, and whether it is the last. Without a count, below 0, a chunk is read ahead."""
    if count < 0:
        yield from ((chunk, chunk.num_examples, is_last) for (chunk,), is_last in readers.grouped(chunks, 1))
        return
    for at, chunk in enumerate(chunks, 1):
        is_last = at * size >= count
        if is_last and next(chunks, None) is not None:  # assert_cardinality raises here
            rule = f"{count}, its cardinality"
            raise ValueError(errors.sentence(_NAME, "the number of elements of source", "higher", rule))
        yield chunk, chunk.num_examples, is_last


def _dense(leaf: Any) -> Any:
    return tf.sparse.to_dense(leaf) if isinstance(leaf, tf.SparseTensor) else leaf


def _flat(element: Any) -> list[Any]:
    """The tensors of an element, composite ones whole."""
    flat: list[Any] = tf.nest.flatten(element)
    return flat


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
        remedy = "Write dataset.unbatch(), since PaddedBatches makes the batches. Single examples of one length: "
        remedy += "give the axis its size by tf.ensure_shape."
        raise ValueError(errors.sentence(_NAME, "source", text, "a dataset of single examples", remedy))
