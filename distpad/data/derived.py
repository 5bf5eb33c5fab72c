"""Lengths, Mask and Indices: what a batch knows of its rows, as inputs and labels of ``for_keras``."""

from __future__ import annotations

import dataclasses

from distpad.data.structure import Name


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The lengths of a padded feature along its first ragged axis, ``[rows]`` int32, 0 in filler rows.

    A mean over positions must not divide by 0 there: see ``Mask``.

    >>> Lengths("image")
    Lengths(feature='image')
    """

    feature: Name


@dataclasses.dataclass(frozen=True)
class Mask:
    """The mask of a padded feature along its first ragged axis, ``[rows, length]`` bool, for padding on either side.

    It is true on real positions, and false in filler rows. A mean over positions must not divide by 0 there: its NaN
    gradient reaches the weights, although the row does not count. ``tf.math.divide_no_nan`` divides safely.

    >>> Mask("image")
    Mask(feature='image')
    """

    feature: Name


@dataclasses.dataclass(frozen=True)
class Indices:
    """The example index of each row, ``[rows]`` int64, -1 in filler rows.

    >>> Indices()
    Indices()
    """
