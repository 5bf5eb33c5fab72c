"""Chunks: the examples of a step as one column for each feature, made from examples or from columns of a source."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Union

import numpy as np

from distpad import errors
from distpad.data import schema, structure
from distpad.data.schema import Feature, Features, Pad
from distpad.data.structure import Name
from distpad.padding import columns, reading
from distpad.padding.columns import Column

_NAME = "PaddedBatches"


class Chunk(NamedTuple):
    """Examples as a source by columns has them: any axes may be partitioned.

    Attributes:
      skeleton: the structure of an example.
      columns: of each feature, in the order of the structure.
    """

    skeleton: Any
    columns: list[Column]

    @property
    def num_examples(self) -> int:
        return self.columns[0].num_examples

    def take(self, rows: Sequence[int]) -> Chunk:
        """Some of the examples."""
        return self._replace(columns=[column.take(np.asarray(rows, np.int64)) for column in self.columns])


Rows = Union[Sequence[Any], Chunk]  # examples, one by one or by columns


def learn(parts: Sequence[Rows], padding: Mapping[Name, Pad], *, guess: bool, skips: bool) -> Features | None:
    """Learn the features from the rows of a few steps.

    Returns None if the rows do not show all dtypes and shapes, unless ``guess``. With ``skips``, the first example that
    is possible decides.

    Raises: ValueError, TypeError: features that ``padding`` or TensorFlow do not fit.
    """
    examples: list[Any] = []
    for part in parts:
        if not isinstance(part, Chunk):
            examples += part
        elif guess or all(map(_shows_sizes, part.columns, map(padding.get, structure.names_of(part.skeleton)))):
            arrays = []
            for column in part.columns:
                sizes = [int(splits[1] - splits[0]) if len(splits) > 1 else 0 for splits in column.splits]
                arrays.append((column.values.dtype, (*sizes, *column.values.shape[1:])))
            return Features.of_shapes(part.skeleton, arrays, padding)
    for begin in range(len(examples)):
        try:
            return Features.learn(examples[begin:], padding, guess=guess)
        except (ValueError, TypeError):
            if not skips or begin == len(examples) - 1:
                raise
    return None


def _shows_sizes(column: Column, pad: Pad | None) -> bool:
    """Whether a row shows the size of each axis that must be known."""
    ragged = pad.axes if pad else ()
    return all(len(splits) > 1 or axis in ragged for axis, splits in enumerate(column.splits))


def columns_of(features: Features, rows: Rows, indices: np.ndarray) -> list[Column]:
    """Return a column for each feature, partitioned on all axes up to its last ragged one.

    Args:
      rows: the examples of a step.
      indices: their example indices, for errors.

    Raises: ValueError, TypeError: an example that differs from the features, with its index.
    """
    if isinstance(rows, Chunk):
        found, rule = f"with {structure.names_of(rows.skeleton)}", f"the same features as before, {features.names}"
        errors.require(_NAME, rows.skeleton == features.skeleton, "the source", found, rule)
        return [_fitted(feature, column, indices) for feature, column in zip(features.features, rows.columns)]
    items = structure.leaves_of_all(rows, features.skeleton) or []
    fast = [_fast(feature, each) for feature, each in zip(features.features, items)]
    known = [column for column in fast if column is not None]
    if known and len(known) == len(fast):
        return known
    single = [_columns_of_one(features, example, int(index)) for example, index in zip(rows, indices)]
    return [columns.concatenate(each) for each in zip(*single)]


def _fast(feature: Feature, items: Sequence[Any]) -> Column | None:
    """The column of items that are alike; None for others, which are looked at one by one."""
    kinds = set(map(type, items))
    if len(kinds) > 1 and not kinds <= {int, float}:
        return None
    kind = next(iter(kinds))
    try:
        if kind is np.ndarray and feature.dtype != object:
            if {(array.dtype, array.ndim) for array in items} != {(feature.dtype, len(feature.shape))}:
                return None
            return _checked(feature, columns.of_arrays(items, feature.depth))
        if kind is list and feature.shape == (None,):
            leaves = [*itertools.chain.from_iterable(items)]
            array = _numbers(feature, leaves, set(map(type, leaves)))
            return None if array is None else Column(array, (columns.offsets([*map(len, items)]),))
        if kind is list and feature.depth > 1:
            regular = reading.read_regular([*items])
            if regular is None or not isinstance(regular[0], Column) or regular[1] != feature.dtype:
                return None
            values = regular[0].values.astype(feature.dtype, copy=False)
            return _fitted(feature, regular[0]._replace(values=values), np.arange(len(items)))
        if feature.shape == ():
            array = _numbers(feature, items, kinds)
            return None if array is None else Column(array)
    except (ValueError, TypeError, OverflowError):  # the look at single examples words the error
        pass
    return None


def _numbers(feature: Feature, leaves: Sequence[Any], kinds: set[type]) -> np.ndarray | None:
    """Python's numbers or strings, or NumPy's scalars of one kind, as an array."""
    if feature.dtype == object:
        return np.array(leaves, object) if kinds <= {str, bytes} else None
    if kinds <= {int} if feature.dtype == np.int64 else kinds <= {int, float} and feature.dtype == np.float64:
        return np.array(leaves, feature.dtype)
    if len(kinds) == 1 and all(issubclass(kind, np.generic) for kind in kinds):
        array = np.array(leaves)
        return array if array.dtype == feature.dtype else None
    return None


def _checked(feature: Feature, column: Column) -> Column | None:
    """The column, or None if a fixed axis has another size."""
    fits = column.values.shape[1:] == feature.shape[feature.depth :] and all(
        size is None or (np.diff(splits) == size).all() for size, splits in zip(feature.shape, column.splits)
    )
    return column if fits else None


def _fitted(feature: Feature, column: Column, indices: np.ndarray) -> Column:
    """The column of a chunk, partitioned as the feature is. Raises: ValueError."""
    if column.values.dtype != feature.dtype:
        where, rule = f"{feature.name!r} of example {indices[0]}", f"{feature.dtype}, as in the first example"
        raise ValueError(errors.sentence(_NAME, where, f"of dtype {column.values.dtype}", rule))
    fitted: Column | None = None
    if len(column.splits) + column.values.ndim - 1 == len(feature.shape):
        fitted = column.partitioned(feature.depth)
    while fitted is not None and len(fitted.splits) > feature.depth:
        fitted = fitted.stacked(feature.shape[len(fitted.splits) - 1] or 0)
    fitted = fitted and _checked(feature, fitted)
    if fitted is None or not (feature.pad is None or feature.pad.axes[0] == 0 or fitted.is_rectangular()):
        raise _misfit(feature, column, indices)
    return fitted


def _misfit(feature: Feature, column: Column, indices: np.ndarray) -> ValueError:
    """The error for the first example of a column that does not have the feature's shape."""
    sizes, inner = column.sizes() if column.splits else np.zeros([column.num_examples, 0], int), column.values.shape[1:]
    shapes = [(*row, *inner) for row in sizes.tolist()]
    for shape, index in zip(shapes, indices):
        if not _matches(feature, shape):
            return shape_error(feature, shape, int(index))
    rule, remedy = "arrays, or positions along axis 0", "Write Pad(axis=(0, ...))."
    return ValueError(errors.sentence(_NAME, errors.shown(feature.name), "ragged within examples", rule, remedy))


def _matches(feature: Feature, shape: Sequence[int]) -> bool:
    """Whether an example of this shape is one of the feature."""
    return len(shape) == len(feature.shape) and all(want in (None, n) for want, n in zip(feature.shape, shape))


def shape_error(feature: Feature, shape: tuple[int, ...], index: int) -> ValueError:
    """The error for an example of another shape."""
    remedy = "" if feature.pad else f"Ragged? Add {feature.name!r} to padding."
    where, wanted = f"{feature.name!r} of example {index}", f"{feature.shape} (None is ragged)"
    return ValueError(errors.sentence(_NAME, where, f"of shape {shape}", wanted, remedy))


def _columns_of_one(features: Features, example: Any, index: int) -> list[Column]:
    """An example's columns. ValueError names the example index and a feature that differs from the others."""
    skeleton = structure.skeleton_of(example)
    found, rule = f"with {structure.names_of(skeleton)}", f"the same features as the others, {features.names}"
    errors.require(_NAME, skeleton == features.skeleton, f"example {index}", found, rule)
    leaves = structure.leaves_of(example, skeleton)
    return [_column_of_one(feature, item, index) for feature, item in zip(features.features, leaves)]


def _column_of_one(feature: Feature, item: Any, index: int) -> Column:
    where, shape = f"{feature.name!r} of example {index}", feature.shape
    if not schema.is_uneven(item, feature.pad):
        array = _typed(feature, item, shape, where)
        if not _matches(feature, array.shape):
            raise shape_error(feature, array.shape, index)
        return columns.of_arrays([array], feature.depth)
    splits, rows = schema.rows_of(item, feature.depth - 1, where)
    arrays = [_typed(feature, row, shape[feature.depth - 1 :], where) for row in rows]
    wrong = next((array for array in arrays if array.ndim != len(shape) - feature.depth + 1), None)
    if wrong is not None:
        raise shape_error(feature, (*(int(each[1]) for each in splits), *wrong.shape), index)
    last = columns.of_arrays(arrays, 1)
    return _fitted(feature, Column(last.values, (*splits, *last.splits)), np.array([index]))


def _typed(feature: Feature, item: Any, shape: tuple[int | None, ...], where: str) -> np.ndarray:
    """An item as an array of the feature's dtype; of an empty list, with the inner ``shape``. Raises: ValueError."""
    array = schema.as_array(item, where)
    if schema.is_untyped(item):
        array = np.zeros(array.shape + tuple(size or 0 for size in shape[array.ndim :]), feature.dtype)
    if array.dtype == np.int64 and feature.dtype == np.float64 and schema.is_python(item):
        array = array.astype(np.float64)
    if array.dtype != feature.dtype:
        remedy = "Write 1.0 for 1, or np.float32 arrays." if schema.is_python(item) else "Cast one of them."
        found = f"of dtype {array.dtype}"
        raise ValueError(errors.sentence(_NAME, where, found, f"{feature.dtype}, as in the first example", remedy))
    return array
