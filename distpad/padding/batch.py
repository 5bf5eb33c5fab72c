"""pad and unpad: sequences of different lengths to one batch, and back. No communication.

The type of the input selects NumPy (``on_numpy``) or TensorFlow operations (``on_tensorflow``). This file never imports
TensorFlow: an input can be a tensor only if the user's process has imported it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, Union

import numpy as np

from distpad import errors
from distpad.padding import arguments, on_numpy

Axes = Union[int, Iterable[int]]


class Padded(NamedTuple):
    """A padded batch, the result of ``pad`` and the argument of ``unpad``.

    Attributes:
      values: ``[batch, *padded shape of a sequence]``.
      lengths: ``[batch]`` int32, along the first ragged axis.
      mask: bool, true on real elements; the shape of ``values`` up to and including the last ragged axis. None with
        ``mask=False``.

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
    """Pad sequences of different sizes to one batch, with their lengths and a mask of the real elements.

    With x_i the sequences, ``values[i, t] = x_i[t]`` for t < n_i and ``value`` elsewhere. Lengths and mask, not values,
    decide what is padding: ``value`` may also occur among the real labels. Sequences are cut only if ``truncating``
    allows it.

    Any number of axes may be ragged. Positions lie along the first ragged axis, to which ``length``, ``padding`` and
    ``truncating`` apply. Further ragged axes, such as height and width of images, are padded to the largest size in the
    batch, always at their end.

    Args:
      sequences: the batch: a list of arrays ``[n_i, *inner]`` or of nested lists, whose inner lists may be ragged and
        may hold arrays; a ``tf.RaggedTensor`` ``[batch, n_i, ...]``; a list of tensors; an array or tensor.
      length: the padded length of the first ragged axis, at least 0; default: the longest sequence's.
      value: the padding value: a scalar, or an array that broadcasts to the shape of one position (the axes after the
        last ragged axis), such as a one-hot vector ``[classes]``. ``dtype`` must be able to hold it.
      padding: ``"post"`` pads after the sequences, ``"pre"`` before them.
      truncating: for sequences longer than ``length``: ``"error"`` raises, ``"pre"`` cuts at the front, ``"post"`` cuts
        at the end. Elements that are cut do not affect the sizes of other axes.
      dtype: dtype of ``values``; default: the common dtype of all sequences with elements (without elements, that of
        ``value``). String dtypes widen to hold ``value``. Elements may not change, except for the rounding of floats.
      ragged_axes: the ragged axes of *one sequence*: with them the rank of the mask does not depend on the batch.
        Default: axis 0 and all axes whose sizes differ in this batch. Default for tensors: axis 0 and all axes of
        unknown size (a list of eager tensors is treated as arrays).
      mask: False returns None for the mask.

    Returns:
      ``Padded(values, lengths, mask)``: NumPy arrays for NumPy and lists, tensors for tensors. ``values`` is
      ``[batch, *padded]``, ``lengths`` ``[batch]`` int32, along the first ragged axis and after truncating, ``mask``
      bool of the shape of ``values`` up to and including the last ragged axis. Each replica pads its own batch: shapes
      are not equal on all replicas (``pad_to_global_max`` makes them equal).

    Raises:
      TypeError: ``sequences`` is not a list, array or tensor; a wrong type of ``length``, ``mask``, ``dtype`` or
        ``ragged_axes``.
      ValueError: an unknown ``padding`` or ``truncating``; a negative ``length``; a sequence longer than ``length``
        (in a graph, ``tf.errors.InvalidArgumentError`` when it runs); elements that are not sequences; different ranks;
        different sizes along an axis that is not ragged; ``ragged_axes`` out of range, repeated or empty; a ``value``
        that does not broadcast or that ``dtype`` cannot hold; no common dtype; lists with None or other objects, unless
        ``dtype=object``; integers above 2**53 beside floats; elements that ``dtype`` cannot hold; tensors of unknown
        rank.

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
    is_bool = isinstance(mask, (bool, np.bool_))
    errors.require("pad", is_bool, "mask", f"a {type(mask).__name__}", "True or False", error=TypeError)
    axes = _check_axes(ragged_axes)
    options = arguments.Options(_check_length(length), value, padding, truncating, dtype, axes, bool(mask))
    tensorflow = _tensorflow_for(sequences)
    with errors.within_memory("pad: the batch"):
        if tensorflow is None:
            _check_sequences(sequences)
            return Padded(*on_numpy.pad(sequences, options))
        from distpad.padding import on_tensorflow

        return Padded(*on_tensorflow.pad(tensorflow, sequences, options))


def unpad(values: Any, lengths: Any = None, mask: Any = None) -> Any:
    """Remove the padding of a batch: the inverse of ``pad``, ``unpad(*pad(x)) == x``.

    The mask is required if several axes were ragged or with ``padding="pre"``: without it, lengths mean post-padding
    along the first axis. If an inner axis has size zero, the sizes of the axes around it are not restored; the lengths
    of the sequences are.

    Args:
      values: ``[batch, length, ...]``, array or tensor of any dtype.
      lengths: ``[batch]`` integers from 0 to the padded length.
      mask: bool, ``[batch, length, ...]``, true on real elements. Give ``lengths``, ``mask`` or both.

    Returns:
      For arrays, a list of one array for each sequence, copied, of the dtype of ``values``; a sequence that is not
      rectangular (nested lists that were ragged inside) is again a list of arrays. For tensors, a ``tf.RaggedTensor``.

    Raises:
      TypeError: ``values`` is not an array or tensor, such as a whole ``Padded``; ``mask`` is not bool; ``lengths`` are
        not integers.
      ValueError: neither ``lengths`` nor ``mask``; a shape that does not match ``values``; lengths out of range, or
        that contradict the mask (in a graph, lengths are not checked).

    >>> [row.tolist() for row in unpad(np.array([[1, 2], [3, 0]]), lengths=[2, 1])]
    [[1, 2], [3]]
    >>> [row.tolist() for row in unpad(*pad([["a"], ["b", "c"], []], value="", padding="pre"))]
    [['a'], ['b', 'c'], []]

    Source: ``tf.RaggedTensor.from_tensor`` and ``tf.ragged.boolean_mask``, generalised.
    """
    remedy = "Write unpad(*padded), with the result of pad."
    errors.require("unpad", not (lengths is None and mask is None), "mask", None, "lengths or a mask", remedy)
    tensorflow = None if isinstance(values, (list, tuple)) else _tensorflow_for(values)
    if tensorflow is None:
        what, rule = f"a {type(values).__name__}", "an array or a tensor"
        errors.require("unpad", isinstance(values, np.ndarray), "values", what, rule, remedy, error=TypeError)
        return on_numpy.unpad(values, *on_numpy.check_padded(values.shape, lengths, mask))
    from distpad.padding import on_tensorflow

    return on_tensorflow.unpad(tensorflow, values, lengths, mask)


def _check_length(length: Any) -> int | None:
    if length is None:
        return None
    rule = "an integer known before the graph runs, or None"  # else the padded shape would not be static
    errors.require("pad", errors.is_integer(length), "length", errors.shown(length), rule, error=TypeError)
    return errors.integer("pad", "length", length, least=0, most=2**31 - 1)  # lengths are int32


def _check_axes(ragged_axes: Any) -> list[int] | None:
    if ragged_axes is None:
        return None
    several = isinstance(ragged_axes, Iterable) and not errors.is_integer(ragged_axes)
    axes = list(ragged_axes) if several else [ragged_axes]
    are_integers, rule = all(map(errors.is_integer, axes)), "an integer or several"
    errors.require("pad", are_integers, "ragged_axes", errors.shown(ragged_axes), rule, error=TypeError)
    found = [operator.index(axis) for axis in axes]
    most = arguments.MOST_AXES
    is_low = max(found, default=0) < most
    errors.require("pad", is_low, "ragged_axes", errors.shown(ragged_axes), f"below {most}, NumPy's limit")
    return found


def _check_sequences(sequences: Any) -> None:
    unordered = isinstance(sequences, (str, bytes, Mapping, AbstractSet))
    scalar = isinstance(sequences, np.ndarray) and sequences.ndim == 0
    is_sized = hasattr(sequences, "__len__") and hasattr(sequences, "__iter__") and not (unordered or scalar)
    try:
        is_sized = is_sized and len(sequences) >= 0
    except (OverflowError, ValueError):  # Python's errors for a length above 2**63 and below 0
        is_sized = False
    what, remedy = f"a {type(sequences).__name__}", "Write pad([...])."
    errors.require("pad", is_sized, "sequences", what, "a list of sequences", remedy, error=TypeError)


def _tensorflow_for(batch: Any) -> Any:
    """Return the TensorFlow module if the batch is a tensor or holds tensors, else None. Imports nothing."""
    tensorflow = sys.modules.get("tensorflow")
    is_tensor = getattr(tensorflow, "is_tensor", None)  # None while TensorFlow itself is being imported
    if is_tensor is None or isinstance(batch, np.ndarray):
        return None
    found = is_tensor(batch)
    if not found and isinstance(batch, (list, tuple)):
        one_of_each_type = dict(zip(map(type, batch), batch)).values()
        found = any(map(is_tensor, one_of_each_type)) or is_tensor(_first_leaf(batch))
    return tensorflow if found else None


def _first_leaf(item: Any, depth: int = 32) -> Any:
    """The first item in nested lists that is not a list; None if all are empty, or nested deeper."""
    if not isinstance(item, (list, tuple)):
        return item
    leaves = (_first_leaf(child, depth - 1) for child in item if depth)
    return next((leaf for leaf in leaves if leaf is not None), None)
