"""Lengths, Mask and Indices: what a batch knows of its rows, as inputs and labels of ``for_keras``."""

from __future__ import annotations

import dataclasses

from distpad.data.structure import Name


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The lengths of a padded feature along its first ragged axis, ``[rows]`` int32, 0 in filler rows.

    >>> Lengths("image")
    Lengths(feature='image')
    """

    feature: Name


@dataclasses.dataclass(frozen=True)
class Mask:
    """The mask of a padded feature along its first ragged axis, ``[rows, length]`` bool, for padding on either side.

    It is true on real positions, and false in filler rows.

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
