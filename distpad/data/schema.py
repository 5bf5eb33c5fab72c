"""Features of an example: names, dtypes, shapes and ragged axes."""

from __future__ import annotations

import collections.abc
import functools
import itertools
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.data import structure
from distpad.data.structure import Name
from distpad.padding import arguments, columns
from distpad.padding.columns import Column

_NAME = "PaddedBatches"


@dataclass(frozen=True)
class Pad:
    """The ragged axes of a feature, the value and the side of its padding, and the longest example.

    Args:
      axis: one axis of an example (not counting the batch axis), or several; positions lie along the first. Rows along
        further axes may differ within an example too, as the characters of words: ``[[1, 2], [3]]``.
      value: the padding value: a number that the feature's dtype can hold, or a string; for strings, 0 is the empty
        string.
      side: "post" pads after the positions, "pre" before them; along further axes padding always follows. Lengths of a
        pre-padded feature are ``PreLengths``.
      max_length: the largest number of positions; a batch is padded to no more.
      truncating: for longer examples: "error" raises and names the example, "pre" cuts positions at the front, "post"
        at the end. ``PaddedBatches.stats`` counts what is cut. A feature of ``weights`` is cut as the one it weighs.

    Raises:
      ValueError: no axes, a negative axis, or an axis twice; an unknown ``side`` or ``truncating``; ``max_length``
        below 1, or missing beside ``truncating``.
      TypeError: an axis or a ``max_length`` that is not an integer, or a ``value`` that is not a scalar.

    >>> Pad(axis=(0, 1)).axes, Pad(value=-1).axes
    ((0, 1), (0,))
    """

    axis: int | Sequence[int] = 0
    value: Any = 0
    side: str = "post"
    max_length: int | None = None
    truncating: str = "error"

    def __post_init__(self) -> None:
        for axis in self._given:
            errors.integer("Pad", "axis", axis, least=0)
        are_different = len(self.axes) == len(set(self.axes)) > 0
        errors.require("Pad", are_different, "axis", self.axis, "one axis or several different ones")
        is_scalar = np.isscalar(self.value)
        errors.require("Pad", is_scalar, "value", errors.shown(self.value), "one number or string", error=TypeError)
        errors.choice("Pad", "side", self.side, ("pre", "post"))
        errors.choice("Pad", "truncating", self.truncating, ("error", "pre", "post"))
        if self.max_length is not None or self.truncating != "error":
            errors.require("Pad", self.max_length is not None, "max_length", None, "a length to which truncating cuts")
            errors.integer("Pad", "max_length", self.max_length, least=1)

    def placed(self, column: Column, size: int) -> tuple[Column, bool]:
        """A column as ``columns.fill`` and ``columns.mask`` take it, and their argument ``at_end``.

        Args:
          size: the padded size along the first ragged axis.
        """
        first = self.axes[0]
        if self.side == "pre" and first < len(column.splits) - 1:
            return column.moved_to_end(first, size), False
        return column, self.side == "pre"

    @functools.cached_property
    def axes(self) -> tuple[int, ...]:
        """The ragged axes; positions lie along the first."""
        return tuple(map(operator.index, self._given))

    @property
    def _given(self) -> tuple[Any, ...]:
        return tuple(self.axis) if isinstance(self.axis, collections.abc.Sequence) else (self.axis,)


@dataclass(frozen=True)
class Feature:
    """The name, dtype and shape of one array of each example; ``shape`` is None on ragged axes."""

    name: Name
    dtype: np.dtype
    shape: tuple[int | None, ...]
    pad: Pad | None

    @functools.cached_property
    def depth(self) -> int:
        """The partitioned axes of its column: all axes up to the last ragged one."""
        return max(self.pad.axes) + 1 if self.pad else 0

    @property
    def padding_value(self) -> Any:
        """The value at padded positions."""
        value = self.pad.value if self.pad else 0
        return b"" if self.dtype == object and value == 0 else value


class Features:
    """The structure and the features of all examples. Text carries them to workers without examples."""

    def __init__(self, skeleton: Any, features: Sequence[Feature]) -> None:
        self.skeleton = skeleton
        self.features = list(features)

    @classmethod
    def learn(cls, examples: Sequence[Any], padding: Mapping[Name, Pad], *, guess: bool) -> Features | None:
        """Learn the features from a few examples.

        An empty list has no dtype of its own: another example decides. Returns None if a feature is an empty list in
        all examples, unless ``guess`` allows NumPy's default dtype.
        """
        skeleton = structure.skeleton_of(examples[0])
        rows = [
            structure.leaves_of(example, skeleton) for example in examples if structure.skeleton_of(example) == skeleton
        ]
        arrays = []
        for name, items in zip(structure.names_of(skeleton), zip(*rows)):
            typed = next((item for item in items if not is_untyped(item)), None)
            if typed is None and not guess:
                return None
            dtype, shape = _shown(items[0] if typed is None else typed, padding.get(name), errors.shown(name))
            if dtype == np.int64 and is_python(typed) and any(map(_is_float, items)):
                dtype = np.dtype(np.float64)
            arrays.append((dtype, shape))
        return cls.of_shapes(skeleton, arrays, padding)

    @classmethod
    def of_shapes(
        cls, skeleton: Any, arrays: Sequence[tuple[np.dtype, tuple[int, ...]]], padding: Mapping[Name, Pad]
    ) -> Features:
        """The features of examples with arrays of these dtypes and shapes. Raises: ValueError, TypeError."""
        names = structure.names_of(skeleton)
        _check_named(padding, names)
        features = []
        for name, (dtype, shape) in zip(names, arrays):
            pad = padding.get(name)
            if pad and max(pad.axes) >= len(shape):
                rank = f"axes of an array of rank {len(shape)}" if shape else "no padding for a scalar"
                raise ValueError(errors.sentence(_NAME, f"padding[{name!r}]", f"Pad(axis={pad.axis})", rank))
            known = tuple(None if pad and axis in pad.axes else size for axis, size in enumerate(shape))
            features.append(Feature(name, dtype, known, pad))
            _check_dtype(features[-1])
        return cls(skeleton, features)

    @functools.cached_property
    def names(self) -> list[Name]:
        return [feature.name for feature in self.features]

    def pack(self, leaves: Sequence[Any]) -> Any:
        """Pack leaves into the structure of an example."""
        return structure.packed(self.skeleton, dict(zip(self.names, leaves)))

    def named(self, name: Name) -> Any:
        """Return the name of a feature, or a nest of the names in a part of an example. KeyError for another name."""
        at = self.skeleton
        if name in self.names:
            return name
        for part in str(name).split("/"):
            at = {str(key): child for key, child in (at["parts"] if isinstance(at, dict) else ())}[part]
        return structure.packed(at, {leaf: leaf for leaf in structure.names_of(at)})

    def by_name(self, packed: Any) -> dict[Name, Any]:
        """Return the leaves of a packed structure by name."""
        return dict(zip(self.names, structure.leaves_of(packed, self.skeleton)))

    def to_text(self) -> str:
        """JSON for comparison and for other workers, without the padding, which all workers have."""
        features = [[f.name, tf.as_dtype(f.dtype).name, f.shape] for f in self.features]
        return json.dumps({"structure": self.skeleton, "features": features}, sort_keys=True)

    @classmethod
    def from_text(cls, text: str, padding: Mapping[Name, Pad]) -> Features:
        read = json.loads(text)
        features = [
            Feature(name, np.dtype(tf.as_dtype(dtype).as_numpy_dtype), tuple(shape), padding.get(name))
            for name, dtype, shape in read["features"]
        ]
        return cls(read["structure"], features)


def _shown(item: Any, pad: Pad | None, where: str) -> tuple[np.dtype, tuple[int, ...]]:
    """The dtype and the shape that an example shows; of rows of different sizes, the first one's."""
    if not is_uneven(item, pad):
        array = as_array(item, where)
        return array.dtype, array.shape
    splits, rows = rows_of(item, max(pad.axes) if pad else 0, where)
    typed: Any = next((row for row in rows if not is_untyped(row)), [])
    array = as_array(typed, where)
    return array.dtype, (*(int(each[1]) for each in splits), *array.shape)


def is_uneven(item: Any, pad: Pad | None) -> bool:
    """Whether an item of several ragged axes is a list with rows of different sizes: a text of words of characters."""
    if pad is None or max(pad.axes) == 0 or not isinstance(item, (list, np.ndarray)):
        return False
    if isinstance(item, np.ndarray):
        return item.dtype == object and item.ndim == 1 and any(isinstance(row, (list, np.ndarray)) for row in item)
    try:
        np.asarray(item)
    except ValueError:
        return True
    except MemoryError:  # as_array refuses it
        pass
    return False


def rows_of(item: Any, axes: int, where: str) -> tuple[list[np.ndarray], list[Any]]:
    """The splits of the first ``axes`` axes of an example, and the rows after them. Raises: ValueError."""
    rows, splits = [item], []
    for axis in range(axes):
        scalar = next((row for row in rows if not (isinstance(row, list) or np.ndim(row))), None)
        if scalar is not None:
            rule = f"lists of {axes + 1} axes, as padding says"
            raise ValueError(errors.sentence(_NAME, where, f"a list with {scalar!r} on axis {axis}", rule))
        splits.append(columns.offsets([*map(len, rows)]))
        rows = [*itertools.chain.from_iterable(rows)]
    return splits, rows


def is_untyped(item: Any) -> bool:
    """Whether an item is an empty list, or a list of empty lists, which have no dtype."""
    return isinstance(item, list) and all(map(is_untyped, item))


def is_python(item: Any) -> bool:
    """Whether an item is a Python number or a list, in which 1 may mean 1.0."""
    return isinstance(item, (int, float, list))


def _is_float(item: Any) -> bool:
    if isinstance(item, list):
        return any(map(_is_float, item))
    return isinstance(item, float)


def as_array(item: Any, where: str) -> np.ndarray:
    """The item as an array. Raises: ValueError, TypeError."""
    rule, remedy = "one without masked elements", "Fill them, or leave them out."
    errors.require(_NAME, not np.ma.is_masked(item), where, "a masked array", rule, remedy)
    try:
        array = np.asarray(item)
        if array.dtype.kind in "US":  # objects, since NumPy's strings have a fixed length and lose trailing zeros
            array = array.astype(object) if isinstance(item, np.ndarray) else np.array(item, object)
    except MemoryError as error:
        raise ValueError(errors.sentence(_NAME, where, "larger than the memory", "an array")) from error
    except ValueError as error:
        remedy = "Ragged? Write Pad(axis=(0, 1)), or make it an array of equal rows."
        found = f"a list with rows of different sizes ({error})"
        raise ValueError(errors.sentence(_NAME, where, found, "an array", remedy)) from None
    is_known = array.dtype.kind != "O" or all(isinstance(leaf, (str, bytes)) for leaf in array.flat)
    found, rule = f"of {type(item).__name__}", "numbers or strings, in arrays or lists"
    remedy = "Map each ragged axis to a feature of its own, or to a tensor." * (array.ndim > 0)
    errors.require(_NAME, is_known, where, found, rule, remedy, error=TypeError)
    return array


def _check_dtype(feature: Feature) -> None:
    """Check that TensorFlow has the dtype, and that the dtype can hold the padding value."""
    dtype, name, value = feature.dtype, feature.name, np.asarray(feature.padding_value)
    try:
        tf.as_dtype(dtype)
    except TypeError:
        rule = "a dtype of TensorFlow"
        raise TypeError(errors.sentence(_NAME, errors.shown(name), f"of dtype {dtype}", rule)) from None
    can_hold = (dtype.kind == "O") == (value.dtype.kind in "US") and arguments.exact_cast(value, dtype) is not None
    if feature.pad and not can_hold:
        found = f"Pad(value={feature.pad.value!r})"
        raise ValueError(errors.sentence(_NAME, f"padding[{name!r}]", found, f"a value that {dtype} can hold"))


def _check_named(padding: Mapping[Name, Pad], names: Sequence[Name]) -> None:
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    found = f"with {twice} twice, nested and not nested"
    errors.require(_NAME, not twice, "an example", found, "different names")
    for name in padding:
        errors.require(_NAME, name in names, "padding", f"for {name!r}", f"features of an example: {names}")
