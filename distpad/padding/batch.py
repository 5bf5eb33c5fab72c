"""Padding on the host: lists of sequences of different lengths to one batch, and back. Pure, no communication.

The work is done on NumPy (``on_numpy``) or in TensorFlow operations (``on_tensorflow``), after the kind of
the input; this file holds what both share. TensorFlow is never imported here: an input can only be a tensor where the
user's process has imported it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, Union

import numpy as np

from distpad import errors
from distpad.padding import arguments, on_numpy, unpadding

Axes = Union[int, Iterable[int]]


class Padded(NamedTuple):
    """A padded batch: what ``pad`` returns and ``unpad`` takes.

    Attributes:
      values: ``[batch, *padded shape of a sequence]``.
      lengths: ``[batch]`` int32, of the first ragged axis.
      mask: bool, true on real elements; the shape of ``values`` up to and including the last ragged axis. None where
        it was not asked for.

    >>> Padded(values=[[1, 0]], lengths=[1]).mask is None
    True
    """

    values: Any
    lengths: Any
    mask: Any = None


def pad(
    sequences: Any,
    *,
    length: int | None = None,
    value: Any = 0,
    padding: str = "post",
    truncating: str = "error",
    dtype: Any = None,
    ragged_axes: Axes | None = None,
    mask: bool = True,
) -> Padded:
    """Pad sequences of different sizes to one batch, with their lengths and a mask of what is real.

    With x_i the sequences, ``values[i, t] = x_i[t]`` for t < n_i and ``value`` elsewhere. Lengths and mask decide what
    is padding, never the values: ``value`` may well occur among the real labels. Nothing is cut unless asked for.

    Any number of axes may be ragged. The first of them is the axis of positions: ``length``, ``padding`` and
    ``truncating`` are about it alone. Further ragged axes (height and width of images) grow to the largest of the
    batch and are always padded at their end, so that images stay in their corner.

    Args:
      sequences: the batch: a list of arrays ``[n_i, *inner]`` or of nested lists, whose inner lists may be ragged and
        may hold arrays; a ``tf.RaggedTensor`` ``[batch, n_i, ...]``; a list of tensors; an array or tensor.
      length: the padded length of the first ragged axis, at least 0; default: that of the longest sequence.
      value: the filling: a scalar, or an array that broadcasts to the shape of one position (the axes behind the last
        ragged one), such as a one-hot vector ``[classes]``. ``dtype`` must be able to hold it.
      padding: ``"post"`` fills behind the sequences, ``"pre"`` in front of them.
      truncating: of sequences longer than ``length``: ``"error"`` refuses them, ``"pre"`` cuts at their front,
        ``"post"`` at their end. What is cut off has no say in the sizes of other axes.
      dtype: of ``values``; default: the common one of all sequences that have elements (``value`` decides where none
        has). Strings grow to hold ``value``. Elements that would change are refused, but for the rounding of floats.
      ragged_axes: the axes of *one sequence* that are ragged, whatever the batch looks like: so the rank of the mask
        is the same for all batches. Default: axis 0 and all whose sizes differ in this batch; for tensors, whose type
        tells it, axis 0 and all of unknown size (a list of eager tensors is looked at like arrays).
      mask: False leaves None for the mask, where it is not needed.

    Returns:
      ``Padded(values, lengths, mask)``: NumPy arrays for NumPy and lists, tensors for tensors. ``values`` is
      ``[batch, *padded]``, ``lengths`` ``[batch]`` int32, of the first ragged axis and after truncating, ``mask`` bool
      of the shape of ``values`` up to and including the last ragged axis. Each replica pads its own: shapes are not
      equal on all replicas (``pad_to_global_max`` makes them so).

    Raises:
      TypeError: ``sequences`` is no sequence; ``length``, ``mask``, ``dtype`` or ``ragged_axes`` are of a wrong type.
      ValueError: an unknown ``padding`` or ``truncating``; a negative ``length``; a sequence longer than ``length``
        (``tf.errors.InvalidArgumentError`` where a graph can only see it when it runs); elements that are no
        sequences; ranks that differ; sizes that differ along an axis that is not ragged; ``ragged_axes`` out of range,
        doubled or empty; a ``value`` that does not broadcast or that ``dtype`` cannot hold; dtypes without a common
        one; lists with None or other objects, unless ``dtype=object``; integers above 2**53 beside floats; elements
        that ``dtype`` cannot hold; tensors of unknown rank.

    >>> batch = pad([[1, 2, 3], [4]])
    >>> batch.values.tolist(), batch.lengths.tolist()
    ([[1, 2, 3], [4, 0, 0]], [3, 1])
    >>> batch.mask.tolist()
    [[True, True, True], [True, False, False]]
    >>> images = [np.ones([2, 5, 4, 3]), np.ones([1, 6, 2, 3])]   # frames, height, width, channels
    >>> batch = pad(images)
    >>> batch.values.shape, batch.mask.shape
    ((2, 2, 6, 4, 3), (2, 2, 6, 4))

    Source: the usual host padding (``keras.utils.pad_sequences``, ``tf.RaggedTensor.to_tensor``), generalised.
    """
    errors.choice("pad", "padding", padding, ("pre", "post"))
    errors.choice("pad", "truncating", truncating, ("error", "pre", "post"))
    if not isinstance(mask, (bool, np.bool_)):
        raise TypeError(errors.sentence("pad", "mask", f"a {type(mask).__name__}", "True or False"))
    options = arguments.Options(
        _check_length(length), value, padding, truncating, dtype, _check_axes(ragged_axes), bool(mask)
    )
    tensorflow = _tensorflow_for(sequences)
    if tensorflow is None:
        _check_sequences(sequences)
        return Padded(*on_numpy.pad(sequences, options))
    from distpad.padding import on_tensorflow

    return Padded(*on_tensorflow.pad(tensorflow, sequences, options))


def unpad(values: Any, lengths: Any = None, mask: Any = None) -> Any:
    """Take the padding off a batch again: the inverse of ``pad``, ``unpad(*pad(x)) == x``.

    The mask is needed where several axes were ragged or ``padding="pre"``: lengths alone are read as those of a batch
    that was padded behind along its first axis, and nothing in them could tell otherwise. What has no elements leaves
    no trace: of an inner axis of size zero, the sizes around it are not restored (the lengths of the sequences are).

    Args:
      values: ``[batch, length, ...]``, array or tensor of any dtype.
      lengths: ``[batch]`` integers from 0 to the padded length.
      mask: bool, ``[batch, length, ...]``, true on real elements. At least one of ``lengths`` and ``mask`` is given.

    Returns:
      For arrays, a list of one array for each sequence, of the dtype of ``values``, copied; a sequence that is no box
      (nested lists that were ragged inside) is a list of arrays in turn. For tensors, a ``tf.RaggedTensor``.

    Raises:
      TypeError: ``values`` is no array or tensor, such as a whole ``Padded``; ``mask`` is not bool; ``lengths`` are no
        integers.
      ValueError: neither ``lengths`` nor ``mask``; shapes that do not fit ``values``; lengths out of range, or that
        contradict the mask (inside a graph, lengths are not checked).

    >>> [row.tolist() for row in unpad(np.array([[1, 2], [3, 0]]), lengths=[2, 1])]
    [[1, 2], [3]]
    >>> [row.tolist() for row in unpad(*pad([["a"], ["b", "c"], []], value="", padding="pre"))]
    [['a'], ['b', 'c'], []]

    Source: ``tf.RaggedTensor.from_tensor`` and ``tf.ragged.boolean_mask``, generalised.
    """
    if lengths is None and mask is None:
        raise ValueError(
            errors.sentence("unpad", "mask", None, "lengths or a mask", "Write unpad(*padded) with the result of pad.")
        )
    tensorflow = None if isinstance(values, (list, tuple)) else _tensorflow_for(values)
    if tensorflow is None:
        if not isinstance(values, np.ndarray):
            what = f"a {type(values).__name__}"
            raise TypeError(errors.sentence("unpad", "values", what, "an array or a tensor", "Write unpad(*padded)."))
        return unpadding.unpad(values, *unpadding.check_padded(values.shape, lengths, mask))
    from distpad.padding import on_tensorflow

    return on_tensorflow.unpad(tensorflow, values, lengths, mask)


def _check_length(length: Any) -> int | None:
    if length is None:
        return None
    if not errors.is_integer(length):  # a symbolic tensor neither: the padded shape would not be static
        raise TypeError(
            errors.sentence("pad", "length", repr(length), "an integer known before the graph runs, or None")
        )
    return errors.integer("pad", "length", length, least=0)


def _check_axes(ragged_axes: Any) -> list[int] | None:
    if ragged_axes is None:
        return None
    several = (
        isinstance(ragged_axes, Iterable)
        and not isinstance(ragged_axes, (str, bytes))
        and not errors.is_integer(ragged_axes)
    )
    axes = list(ragged_axes) if several else [ragged_axes]
    if not all(map(errors.is_integer, axes)):
        raise TypeError(errors.sentence("pad", "ragged_axes", repr(ragged_axes), "an integer or several"))
    return [operator.index(axis) for axis in axes]


def _check_sequences(sequences: Any) -> None:
    unordered = isinstance(sequences, (str, bytes, Mapping, AbstractSet))
    scalar = isinstance(sequences, np.ndarray) and sequences.ndim == 0
    if unordered or scalar or not (hasattr(sequences, "__len__") and hasattr(sequences, "__iter__")):
        what = f"a {type(sequences).__name__}"
        raise TypeError(errors.sentence("pad", "sequences", what, "a list of sequences", "Write pad([...])."))


def _tensorflow_for(batch: Any) -> Any:
    """TensorFlow, where the batch or what it holds are tensors; else None. Imports nothing."""
    tensorflow = sys.modules.get("tensorflow")
    is_tensor = getattr(tensorflow, "is_tensor", None)  # None while TensorFlow itself is being imported
    if is_tensor is None or isinstance(batch, np.ndarray):
        return None
    found = is_tensor(batch)
    if not found and isinstance(batch, (list, tuple)):
        one_of_each_type = {type(item): item for item in batch}.values()
        found = any(map(is_tensor, one_of_each_type)) or is_tensor(_first_leaf(batch))
    return tensorflow if found else None


def _first_leaf(item: Any) -> Any:
    """The first thing in nested lists that is no list itself; None where all are empty."""
    if not isinstance(item, (list, tuple)):
        return item
    leaves = (_first_leaf(child) for child in item)
    return next((leaf for leaf in leaves if leaf is not None), None)
