"""Masks of different ranks and sources brought to one shape, also where shapes are known only when a step runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from distpad.collectives.checked import Check


class Source(NamedTuple):
    """Something that says which positions are valid; where it ``stretches``, axes of size one but the first do."""

    name: str
    mask: Any
    stretches: bool = False


def widen(tensor: tf.Tensor, rank: int) -> tf.Tensor:
    """Add trailing axes of size one up to ``rank``, so that a prefix of a shape broadcasts to all of it."""
    missing = rank - tensor.shape.rank
    return tf.reshape(tensor, tf.concat([tf.shape(tensor), [1] * missing], 0)) if missing > 0 else tensor


def all_of(sources: list[Source]) -> tuple[tf.Tensor | None, Any]:
    """The AND of masks, each a prefix of the largest, and whether they fit together.

    Raises ValueError where it is known beforehand that they do not.
    """
    sources = [source for source in sources if source.mask is not None]
    if not sources:
        return None, True
    rank = max(source.mask.shape.rank for source in sources)
    sizes = [
        _largest([sizes_of(s.mask, s.mask.shape.rank)[i] for s in sources if s.mask.shape.rank > i])
        for i in range(rank)
    ]
    result, is_broadcastable = None, True
    for source in sources:
        mask, fit = broadcast(source, sizes)
        mask = widen(mask, rank)
        result = mask if result is None else tf.logical_and(result, mask)
        is_broadcastable = fit if is_broadcastable is True else tf.logical_and(is_broadcastable, fit)
    return result, is_broadcastable


def broadcast(source: Source, sizes: list[Any]) -> tuple[tf.Tensor, Any]:
    """A mask (or weight) brought to the leading ``sizes`` where it has others, and whether it had them.

    A shape that does not fit is an error on all replicas, which only the exchange can raise: until then the wrong one
    must not fail by itself.

    Raises ValueError where it is known beforehand that the mask does not fit.
    """
    mask = source.mask
    targets, good = [], []
    for axis, (have, want) in enumerate(zip(sizes_of(mask, mask.shape.rank), sizes)):
        if source.stretches and axis > 0 and isinstance(have, int) and have == 1:
            targets.append(1)
        elif isinstance(have, int) and isinstance(want, int):
            if have != want:
                raise ValueError(f"{source.name} has shape {tuple(mask.shape)}, expected size {want} on axis {axis}")
            targets.append(have)
        else:
            equal = tf.equal(have, want)
            if source.stretches and axis > 0:
                want = tf.where(tf.equal(have, 1), 1, want)
                equal = tf.logical_or(equal, tf.equal(have, 1))
            targets.append(want)
            good.append(equal)
    if not good:
        return mask, True
    have, want = tf.shape(mask), tf.stack(targets)
    longer = tf.pad(mask, tf.stack([tf.zeros_like(have), tf.maximum(want - have, 0)], axis=1))
    return tf.slice(longer, tf.zeros_like(have), want), tf.reduce_all(good)


def sizes_of(tensor: tf.Tensor, rank: int) -> list[Any]:
    """The leading sizes, an int where it is known beforehand."""
    dynamic = tf.shape(tensor)
    return [dynamic[axis] if size is None else size for axis, size in enumerate(tensor.shape[:rank])]


def _largest(sizes: list[Any]) -> Any:
    return max(sizes) if all(isinstance(size, int) for size in sizes) else tf.reduce_max(tf.stack(sizes))


def check_lengths(lengths: Any) -> tf.Tensor:
    """``[batch]`` integers."""
    if isinstance(lengths, (tf.RaggedTensor, tf.SparseTensor)):
        raise TypeError(f"lengths are a {type(lengths).__name__}, expected [batch] integers")
    lengths = tf.convert_to_tensor(lengths, tf.int32 if is_empty(lengths) else None)
    if not lengths.dtype.is_integer:
        raise TypeError(f"lengths have dtype {lengths.dtype.name}, expected integers")
    if lengths.shape.rank != 1:
        raise ValueError(f"lengths have shape {tuple(lengths.shape)}, expected [batch]")
    return lengths


def is_empty(given: Any) -> bool:
    """A list of nothing, which TensorFlow takes for floats: what an empty replica may hand over."""
    return isinstance(given, (list, tuple)) and not given


def length_checks(lengths: tf.Tensor | None = None, limit: Any = None) -> list[Check]:
    """Lengths are 0 to ``limit``. Always two checks, since all replicas must report alike; no lengths: both hold."""
    lengths = tf.zeros([0], tf.int64) if lengths is None else tf.cast(lengths, tf.int64)
    lowest = tf.reduce_min(tf.concat([lengths, [0]], 0))
    longest = tf.reduce_max(tf.concat([lengths, [0]], 0))
    limit = longest if limit is None else tf.cast(limit, tf.int64)
    return [
        Check("lengths hold a value below 0, expected at least 0", lowest, lowest >= 0),
        Check("lengths hold a value above the size of axis 1, expected at most that", longest, longest <= limit),
    ]
