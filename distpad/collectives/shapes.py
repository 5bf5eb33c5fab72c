"""Lengths and their masks; and masks broadcast to one shape, with static and dynamic shapes alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from distpad import precision
from distpad.collectives.checked import Check

_MISUSED = (
    "lengths are those of a pre-padded feature, Pad(side='pre'), expected those of post-padded rows, since the real "
    "positions stand at the end. lengths.mask(size) is their mask, lengths.values are the numbers."
)


class PreLengths(NamedTuple):
    """The lengths of a pre-padded feature, ``Pad(side="pre")``, whose rows end with their real positions.

    ``DistributedLoss``, metrics and ``layers.BatchNormalization`` take them as ``lengths``. They are no tensor, and
    TensorFlow and NumPy refuse them: ``tf.sequence_mask`` would mark the padding as real.

    Attributes:
      values: ``[batch]`` int32, the numbers.

    >>> lengths = PreLengths(tf.constant([1, 3]))
    >>> lengths.mask(3).numpy().astype(int).tolist()
    [[0, 0, 1], [1, 1, 1]]
    """

    values: Any

    def mask(self, size: Any) -> tf.Tensor:
        """Return bool ``[batch, size]``, true on the real positions."""
        lengths = tf.cast(self.values, tf.int64)[:, tf.newaxis]
        size = tf.cast(size, tf.int64)
        return tf.range(size) >= size - lengths

    def numpy(self) -> Any:
        """Return the numbers as an array, outside of graphs."""
        return self.values.numpy()

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise TypeError(_MISUSED)


def _refuse(*args: Any, **options: Any) -> Any:
    raise TypeError(_MISUSED)


tf.register_tensor_conversion_function(PreLengths, _refuse, priority=50)  # before those of tuples


class Source(NamedTuple):
    """A mask (or weight) with the name of its argument.

    Attributes:
      name: the argument, for messages.
      mask: leading axes of a tensor.
      stretches: whether axes of size 1, other than the first, broadcast.
    """

    name: str
    mask: Any
    stretches: bool = False


def widen(tensor: tf.Tensor, rank: int) -> tf.Tensor:
    """Add trailing axes of size 1 up to ``rank``, so that leading axes broadcast to the whole shape."""
    missing = rank - tensor.shape.rank
    return tf.reshape(tensor, tf.concat([tf.shape(tensor), [1] * missing], 0)) if missing > 0 else tensor


def all_of(sources: list[Source]) -> tuple[tf.Tensor | None, Any]:
    """Return the AND of masks, each of leading axes of the largest, and whether their shapes agree.

    Raises: ValueError: static shapes that do not agree.
    """
    sources = [source for source in sources if source.mask is not None]
    if len(sources) < 2:
        return (sources[0].mask if sources else None), True
    rank = max(source.mask.shape.rank for source in sources)
    sizes = _largest([source.mask for source in sources], rank)
    result, is_broadcastable = None, True
    for source in sources:
        mask, fit = broadcast(source, sizes)
        mask = widen(mask, rank)
        result = mask if result is None else tf.logical_and(result, mask)
        is_broadcastable = fit if is_broadcastable is True else tf.logical_and(is_broadcastable, fit)
    return result, is_broadcastable


class Sizes:
    """The sizes of leading axes, static and as a tensor.

    Attributes:
      static: the size of each axis, None where tracing does not know it.
    """

    def __init__(self, static: Sequence[int | None], dynamic: Callable[[], tf.Tensor]) -> None:
        self.static = list(static)
        self._dynamic = functools.cache(dynamic)

    def dynamic(self, rank: int) -> tf.Tensor:
        """Return the first ``rank`` sizes, int32."""
        sizes = self._dynamic()
        return sizes if rank == sizes.shape[0] else sizes[:rank]


def sizes_of(tensor: tf.Tensor, rank: int) -> Sizes:
    """Return the first ``rank`` sizes of a tensor."""
    return Sizes(tensor.shape[:rank], lambda: tf.shape(tensor))


def sizes_with_rows(like: tf.Tensor, tensor: tf.Tensor) -> Sizes:
    """Return the sizes of a tensor, with the number of rows of ``like``."""
    static = [like.shape[0], *tensor.shape[1:]]
    return Sizes(static, lambda: tf.concat([tf.shape(like)[:1], tf.shape(tensor)[1:]], axis=0))


def broadcast(source: Source, sizes: Sizes) -> tuple[tf.Tensor, Any]:
    """Return a mask (or weight) of the leading ``sizes``, cut or padded if necessary, and whether it had them.

    A dynamic shape that differs is an error on all replicas, which the checked all-gather raises. Until then, no
    operation may fail on this replica alone.

    Raises: ValueError: a static shape that differs.
    """
    mask, is_known = source.mask, True
    for axis, (have, want) in enumerate(zip(mask.shape, sizes.static)):
        if have == 1 and source.stretches and axis > 0:
            continue
        if have is None or want is None:
            is_known = False
        elif have != want:
            raise ValueError(f"{source.name} has shape {tuple(mask.shape)}, expected size {want} on axis {axis}")
    if is_known:
        return mask, True
    have = tf.shape(mask)
    want = sizes.dynamic(mask.shape.rank)
    if source.stretches:
        want = tf.where(tf.logical_and(have == 1, tf.range(mask.shape.rank) > 0), 1, want)
    longer = tf.pad(mask, tf.stack([tf.zeros_like(have), tf.maximum(want - have, 0)], axis=1))
    return tf.slice(longer, tf.zeros_like(have), want), tf.reduce_all(have == want)


def _largest(tensors: Sequence[tf.Tensor], rank: int) -> Sizes:
    """Return the largest size of each axis."""
    known = [[t.shape[axis] for t in tensors if t.shape.rank > axis] for axis in range(rank)]
    static = [None if None in sizes else max(sizes) for sizes in known]

    def dynamic() -> tf.Tensor:
        return tf.reduce_max(tf.stack([tf.pad(tf.shape(t), [[0, rank - t.shape.rank]]) for t in tensors]), axis=0)

    return Sizes(static, dynamic)


def read_lengths(lengths: Any) -> tuple[tf.Tensor, Callable[[Any], tf.Tensor]]:
    """Return lengths as a tensor, and the function from a size to their mask ``[batch, size]``.

    Raises: TypeError, ValueError.
    """
    if isinstance(lengths, PreLengths):
        values = check_lengths(lengths.values)
        return values, PreLengths(values).mask
    values = check_lengths(lengths)
    return values, functools.partial(tf.sequence_mask, values)


def check_lengths(lengths: Any) -> tf.Tensor:
    """Return post-padded lengths as a tensor, ``[batch]`` integers. Raises: TypeError, ValueError."""
    if isinstance(lengths, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(f"lengths are a {type(lengths).__name__}, expected [batch] integers")
    lengths = precision.to_tensor(lengths, "lengths", tf.int32 if is_empty(lengths) else None)
    if not lengths.dtype.is_integer:
        raise TypeError(f"lengths have dtype {lengths.dtype.name}, expected integers")
    if lengths.shape.rank != 1:
        raise ValueError(f"lengths have shape {tuple(lengths.shape)}, expected [batch]")
    return lengths


def is_empty(given: Any) -> bool:
    """Return whether an argument is an empty list, as of an empty replica. TensorFlow makes floats of it."""
    return isinstance(given, (list, tuple)) and not given


def length_checks(lengths: tf.Tensor | None, limit: Any = None) -> list[Check]:
    """Return the checks that lengths are 0 to ``limit``; none without lengths."""
    if lengths is None:
        return []
    lengths = tf.cast(lengths, tf.int64)
    lowest, longest = tf.reduce_min(lengths), tf.reduce_max(lengths)  # without rows: the largest and the smallest int64
    checks = [Check("lengths hold a value below 0, expected at least 0", lowest, lowest >= 0)]
    if limit is not None:
        text = "lengths hold a value above the size of axis 1, expected at most that"
        checks.append(Check(text, longest, longest <= tf.cast(limit, tf.int64)))
    return checks
