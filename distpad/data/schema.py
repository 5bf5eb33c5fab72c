"""Features of an example: names, dtypes, shapes and ragged axes."""

from __future__ import annotations

import collections
import collections.abc
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import tensorflow as tf

from distpad import errors

Name = Union[str, int]  # a key of a dict, an index of a tuple, or "0/image" for a nested feature


class TupleIndex(int):
    """An index of a tuple as a key that sorts before strings, since TensorFlow sorts the keys of a mapping.

    >>> sorted(["1/x", TupleIndex(0)])[0] == 0
    True
    """

    def __lt__(self, other: Any) -> bool:
        return True if isinstance(other, str) else int(self) < other

    def __gt__(self, other: Any) -> bool:
        return False if isinstance(other, str) else int(self) > other


_NAMED_TUPLES: dict[str, type] = {}  # classes of examples, by module and name
Row = list  # an example's arrays, in the order of Features.features


@dataclass(frozen=True)
class Pad:
    """The ragged axes of a feature, and the value of its padding.

    Args:
      axis: one axis of an example (not counting the batch axis), or several; positions lie along the first.
      value: the padding value: a number that the feature's dtype can hold, or a string; for strings, 0 is the empty
        string.

    Raises:
      ValueError: no axes, a negative axis, or an axis twice.
      TypeError: an axis that is not an integer, or a ``value`` that is not a scalar.

    >>> Pad(axis=(0, 1)).axes, Pad(value=-1).axes
    ((0, 1), (0,))
    """

    axis: int | Sequence[int] = 0
    value: Any = 0

    def __post_init__(self) -> None:
        for axis in self._given:
            errors.integer("Pad", "axis", axis, least=0)
        if not self.axes or len(set(self.axes)) < len(self.axes):
            raise ValueError(errors.sentence("Pad", "axis", self.axis, "one axis or several different ones"))
        if not np.isscalar(self.value):
            raise TypeError(errors.sentence("Pad", "value", repr(self.value), "one number or string"))

    @property
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

    def sizes(self, array: np.ndarray) -> list[int]:
        """The sizes of an array's ragged axes."""
        return [array.shape[axis] for axis in self.pad.axes] if self.pad else []

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
        skeleton = _skeleton(examples[0])
        rows = [_leaves(example, skeleton) for example in examples if _skeleton(example) == skeleton]
        names = _names(skeleton)
        _check_named(padding, names)
        features = []
        for name, column in zip(names, zip(*rows)):
            typed = next((item for item in column if not _is_untyped(item)), None)
            if typed is None and not guess:
                return None
            array = _as_array(column[0] if typed is None else typed, repr(name))
            if array.dtype == np.int64 and _is_python(typed):
                array = next((np.array(item, np.float64) for item in column if _is_float(item)), array)
            pad = padding.get(name)
            if pad and max(pad.axes) >= array.ndim:
                rank = f"axes of an array of rank {array.ndim}" if array.ndim else "no padding for a scalar"
                raise ValueError(_sentence(f"padding[{name!r}]", f"Pad(axis={pad.axis})", rank))
            shape = tuple(None if pad and axis in pad.axes else size for axis, size in enumerate(array.shape))
            features.append(Feature(name, array.dtype, shape, pad))
            _check_dtype(features[-1])
        return cls(skeleton, features)

    def row(self, example: Any, index: int) -> Row:
        """Return an example's arrays. ValueError names the example index and a feature that differs from the others."""
        if _skeleton(example) != self.skeleton:
            found = f"with {_names(_skeleton(example))}"
            raise ValueError(_sentence(f"example {index}", found, f"the same features as the others, {self.names}"))
        row = []
        for feature, item in zip(self.features, _leaves(example, self.skeleton)):
            where = f"{feature.name!r} of example {index}"
            array = _as_array(item, where)
            if _is_untyped(item):
                rest = tuple(size or 0 for size in feature.shape[array.ndim :])
                array = np.zeros(array.shape + rest, feature.dtype)
            if array.dtype == np.int64 and feature.dtype == np.float64 and _is_python(item):
                array = array.astype(np.float64)
            if array.dtype != feature.dtype:
                remedy = "Write 1.0 for 1, or np.float32 arrays." if _is_python(item) else "Cast one of them."
                found = f"of dtype {array.dtype}"
                raise ValueError(_sentence(where, found, f"{feature.dtype}, as in the first example", remedy))
            has_shape = array.ndim == len(feature.shape) and all(
                want in (None, have) for want, have in zip(feature.shape, array.shape)
            )
            if not has_shape:
                remedy = "" if feature.pad else f"Ragged? Add {feature.name!r} to padding."
                wanted = f"{feature.shape} (None is ragged)"
                raise ValueError(_sentence(where, f"of shape {array.shape}", wanted, remedy))
            row.append(array)
        return row

    @property
    def names(self) -> list[Name]:
        return [feature.name for feature in self.features]

    def blank_row(self) -> Row:
        """Zeros (or empty strings) of length 1, for a replica that never had an example."""
        return [
            np.full([1 if size is None else size for size in f.shape], b"" if f.dtype == object else 0, f.dtype)
            for f in self.features
        ]

    def pack(self, leaves: Sequence[Any]) -> Any:
        """Pack leaves into the structure of an example."""
        return _packed(self.skeleton, dict(zip(self.names, leaves)))

    def named(self, name: Name) -> Any:
        """Return the name of a feature, or a nest of the names in a part of an example. KeyError for another name."""
        at = self.skeleton
        if name in self.names:
            return name
        for part in str(name).split("/"):
            at = {str(key): child for key, child in (_children(at) if isinstance(at, dict) else {}).items()}[part]
        return _packed(at, {leaf: leaf for leaf in _names(at)})

    def by_name(self, packed: Any) -> dict[Name, Any]:
        """Return the leaves of a packed structure by name."""
        return dict(zip(self.names, _leaves(packed, self.skeleton)))

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


def _skeleton(example: Any, path: tuple[Name, ...] = ()) -> Any:
    """The structure of an example as JSON, with names as leaves. A list, as of labels, is a leaf."""
    if isinstance(example, Mapping):
        kinds = {type(key) for key in example}
        if not (kinds <= {str} or kinds <= {int}):
            raise TypeError(_sentence("an example", f"a mapping with keys {[*example]}", "strings, or integers"))
        return {"dict": [[key, _skeleton(example[key], (*path, key))] for key in sorted(example)]}
    if isinstance(example, tuple):
        if hasattr(example, "_fields"):
            kind = f"{type(example).__module__}:{type(example).__qualname__}"
            _NAMED_TUPLES[kind] = type(example)
            children = [[name, _skeleton(getattr(example, name), (*path, name))] for name in example._fields]
            return {"named": children, "type": kind}
        return {"tuple": [_skeleton(item, (*path, i)) for i, item in enumerate(example)]}
    return (path[0] if path else 0) if len(path) < 2 else "/".join(map(str, path))


def _names(skeleton: Any) -> list[Name]:
    if not isinstance(skeleton, dict):
        return [skeleton]
    return [name for child in _children(skeleton).values() for name in _names(child)]


def _children(skeleton: Any) -> dict[Name, Any]:
    """The parts of an example by their keys, fields or indices."""
    return (
        dict(enumerate(skeleton["tuple"])) if "tuple" in skeleton else dict(skeleton.get("dict") or skeleton["named"])
    )


def named_arrays(example: Any) -> dict[Name, np.ndarray]:
    """An example's features by their names."""
    skeleton = _skeleton(example)
    return dict(zip(_names(skeleton), map(np.asarray, _leaves(example, skeleton))))


def _leaves(example: Any, skeleton: Any) -> list[Any]:
    if not isinstance(skeleton, dict):
        return [example]
    if "dict" in skeleton:
        return [leaf for key, child in skeleton["dict"] for leaf in _leaves(example[key], child)]
    return [leaf for item, child in zip(example, _children(skeleton).values()) for leaf in _leaves(item, child)]


def _packed(skeleton: Any, leaves: Mapping[Name, Any]) -> Any:
    if not isinstance(skeleton, dict):
        return leaves[skeleton]
    if "dict" in skeleton:
        return {key: _packed(child, leaves) for key, child in skeleton["dict"]}
    if "named" in skeleton:
        fields = {name: _packed(child, leaves) for name, child in skeleton["named"]}
        return _named_tuple(skeleton["type"], [*fields])(**fields)
    return tuple(_packed(child, leaves) for child in skeleton["tuple"])


def _named_tuple(kind: str, fields: Sequence[str]) -> type:
    """The class of this module and name; a similar class if this worker never had an example of it."""
    if kind not in _NAMED_TUPLES:
        _NAMED_TUPLES[kind] = collections.namedtuple(kind.rpartition(":")[2].rpartition(".")[2], fields)
    return _NAMED_TUPLES[kind]


def _is_untyped(item: Any) -> bool:
    """Whether an item is an empty list, or a list of empty lists, which have no dtype."""
    return isinstance(item, list) and all(map(_is_untyped, item))


def _is_python(item: Any) -> bool:
    """Whether an item is a Python number or a list, in which 1 may mean 1.0."""
    return isinstance(item, (int, float, list))


def _is_float(item: Any) -> bool:
    if isinstance(item, list):
        return any(map(_is_float, item))
    return isinstance(item, float)


def _as_array(item: Any, where: str) -> np.ndarray:
    """The item as an array, copied if writeable: a source may reuse its buffers while a window is read ahead."""
    try:
        array = np.array(item) if isinstance(item, np.ndarray) and item.flags.writeable else np.asarray(item)
        if array.dtype.kind in "US":  # objects, since NumPy's strings have a fixed length and lose trailing zeros
            array = array.astype(object) if isinstance(item, np.ndarray) else np.array(item, object)
    except ValueError as error:
        remedy = "Pad it first, or make it an array of equal rows."
        raise ValueError(
            _sentence(where, f"a list with rows of different sizes ({error})", "an array", remedy)
        ) from None
    if array.dtype.kind == "O" and not all(isinstance(leaf, (str, bytes)) for leaf in array.flat):
        remedy = "Map each ragged axis to a feature of its own, or to a tensor." * (array.ndim > 0)
        raise TypeError(_sentence(where, f"of {type(item).__name__}", "numbers or strings, in arrays or lists", remedy))
    return array


def _check_dtype(feature: Feature) -> None:
    """Check that TensorFlow has the dtype, and that the dtype can hold the padding value."""
    dtype, value = feature.dtype, feature.padding_value
    try:
        tf.as_dtype(dtype)
    except TypeError:
        raise TypeError(_sentence(repr(feature.name), f"of dtype {dtype}", "a dtype of TensorFlow")) from None
    if dtype.kind == "O" or isinstance(value, (str, bytes)):
        can_hold = dtype.kind == "O" and isinstance(value, (str, bytes))
    elif dtype.kind in "iub":
        least, largest = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        can_hold = bool(np.isreal(value)) and least <= value <= largest and value == int(value)
    else:
        with np.errstate(over="ignore"):
            can_hold = bool(np.isfinite(np.array(value).astype(dtype))) == bool(np.isfinite(value))
    if feature.pad and not can_hold:
        found = f"Pad(value={feature.pad.value!r})"
        raise ValueError(_sentence(f"padding[{feature.name!r}]", found, f"a value that {dtype} can hold"))


def _check_named(padding: Mapping[Name, Pad], names: Sequence[Name]) -> None:
    if len(set(names)) < len(names):
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        raise ValueError(_sentence("an example", f"with {twice} twice, nested and not nested", "different names"))
    for name in padding:
        if name not in names:
            raise ValueError(_sentence("padding", f"for {name!r}", f"features of an example: {names}"))


def _sentence(argument: str, value: Any, rule: str, *more: str) -> str:
    return errors.sentence("PaddedBatches", argument, value, rule, *more)
