"""Padding in NumPy: split the batch into rectangular blocks, compute the padded shape, and copy each block."""

from __future__ import annotations

import itertools
import reprlib
from typing import Any, NamedTuple, Optional

import numpy as np

from distpad import errors
from distpad.padding import arguments

_UNKNOWN = -1  # in a table of sizes: this block does not have this axis
_LARGEST = np.iinfo(np.int64).max
_Arrays = tuple[np.ndarray, np.ndarray, Optional[np.ndarray]]


class Block(NamedTuple):
    """A rectangular part of the batch.

    Attributes:
      path: the indices that lead to the array, the sequence's index first.
      rank: the rank of a sequence, as this block shows it.
      typed: False for empty lists, which have no dtype.
    """

    path: tuple[int, ...]
    array: np.ndarray
    rank: int
    typed: bool = True

    @property
    def is_open(self) -> bool:
        """Whether the block ends in an empty list, which may be of numbers, of vectors or of images."""
        return not self.array.size and self.array.shape[-1:] == (0,)


class Branch(NamedTuple):
    """A list that is not rectangular: it has ``size`` children with blocks of their own."""

    path: tuple[int, ...]
    size: int


class Sizes(NamedTuple):
    """The sizes of blocks and branches: one row each, and in ``owners`` the index of its sequence."""

    owners: np.ndarray
    table: np.ndarray


def pad(sequences: Any, options: arguments.Options) -> _Arrays:
    """Pad arrays and nested lists to ``(values, lengths, mask)``, as ``distpad.pad`` describes it."""
    if isinstance(sequences, np.ndarray) and sequences.dtype != object and sequences.shape[0] == 0 < sequences.ndim - 1:
        one = np.zeros((1, *sequences.shape[1:]), sequences.dtype)  # a batch without rows has a known shape
        values, lengths, mask = pad(one, options._replace(truncating="post"))
        return values[:0], lengths[:0], None if mask is None else mask[:0]
    options = options._replace(value=arguments.as_value(options.value))
    reader = _Reader(as_objects=arguments.is_object(options.dtype))
    reader.read_batch(sequences)
    blocks, branches = reader.blocks, reader.branches
    rank = _rank(blocks, options)
    wanted = None if options.ragged_axes is None else arguments.resolve_axes(options.ragged_axes, rank)
    first = wanted[0] if wanted else 0
    sizes = _sizes(blocks, branches, rank)
    lengths = _lengths(sizes, first, len(sequences))
    dtype, is_shapeless = _dtype(blocks, options), _is_shapeless(blocks)
    if options.truncating == "error":
        arguments.check_lengths(lengths, options.length)
    elif options.length is not None and (lengths > options.length).any():
        blocks, branches = _cut(blocks, branches, first, lengths, options)
        sizes = _sizes(blocks, branches, rank)
        lengths = np.minimum(lengths, options.length)
    axes = _ragged_axes(sizes, wanted)
    shape = sizes.table.max(axis=0, initial=0)
    shape[first] = lengths.max(initial=0) if options.length is None else options.length
    if is_shapeless and options.value.ndim:
        shape[-options.value.ndim :] = options.value.shape  # all sequences are empty: value has the shape of a position
    value = arguments.padding_value(options.value, dtype, tuple(shape[axes[-1] + 1 :].tolist()))
    values = np.full((len(sequences), *shape), value, dtype)
    begins = shape[first] - lengths if options.padding == "pre" else np.zeros_like(lengths)
    if axes == [0] and not branches:
        mask = _fill_rows(blocks, values, begins, lengths)
    else:
        mask = np.zeros(values.shape[: axes[-1] + 2], bool)
        _fill_each(blocks, values, mask, first + 1, begins)
    return values, lengths.astype(np.int32), mask if options.mask else None


class _Reader:
    """Splits nested data into ``blocks`` and ``branches``."""

    def __init__(self, as_objects: bool) -> None:
        self.blocks: list[Block] = []
        self.branches: list[Branch] = []
        self._dtype = object if as_objects else None

    def read_batch(self, sequences: Any) -> None:
        for index, sequence in enumerate(sequences):
            self._read(sequence, (index,))
            if not self.blocks[-1].rank:
                found, rule = reprlib.repr(sequence), "a sequence, with at least one axis"
                remedy = "Write pad([[1, 2, 3]]) for one sequence, pad([[1], [2], [3]]) for three of length 1."
                raise ValueError(errors.sentence("pad", f"sequences[{index}]", found, rule, remedy))

    def _read(self, item: Any, path: tuple[int, ...]) -> None:
        array = self._rectangle(item, path)
        if array is not None:
            typed = array.size > 0 or array.dtype != np.float64 or not isinstance(item, (list, tuple))
            self.blocks.append(Block(path, array, len(path) - 1 + array.ndim, typed))
            return
        self.branches.append(Branch(path, len(item)))
        for index, child in enumerate(item):
            self._read(child, (*path, index))

    def _rectangle(self, item: Any, path: tuple[int, ...]) -> np.ndarray | None:
        """The item as an array; None if its parts have different sizes."""
        if type(item) is np.ndarray and item.dtype != object:
            return item
        is_list = isinstance(item, (list, tuple))
        try:
            array = np.asarray(item, dtype=self._dtype if is_list else None)
        except ValueError:
            if is_list:
                return None
            raise
        if array.dtype == object and array.ndim and any(isinstance(x, (list, tuple, np.ndarray)) for x in array.flat):
            return None
        if is_list and self._dtype is None:
            _check_leaves(item, array, path[0])
        if is_list and array.dtype.kind in "US":
            text = str if array.dtype.kind == "U" else bytes
            if not all(isinstance(leaf, text) for leaf in np.asarray(item, object).flat):
                what = f"of strings and other elements in sequences[{path[0]}]"
                raise ValueError(errors.sentence("pad", "sequences", what, "one kind of element", "Give dtype=object."))
        return array


def _check_leaves(item: Any, array: np.ndarray, index: int) -> None:
    """Raise ValueError for a list that NumPy would convert to objects, or whose integers it would round to floats."""
    if array.dtype == object and not any(isinstance(part, np.ndarray) for part in item):
        leaf = next((x for x in array.flat if not isinstance(x, (bool, int, float, complex, str, bytes))), None)
        found = f"with {reprlib.repr(leaf)} in sequences[{index}]"
        if leaf is None and None not in array:
            found = f"with integers of more than 64 bits or of other kinds in sequences[{index}]"
        raise ValueError(errors.sentence("pad", "sequences", found, "numbers or text", "Or give dtype=object."))
    large = array.dtype == np.float64 and bool((np.abs(array) >= arguments.EXACT).any())
    leaves = np.asarray(item, object).flat if large else ()
    if any(isinstance(leaf, (int, np.integer)) and abs(int(leaf)) > arguments.EXACT for leaf in leaves):
        raise _rounded(index)


def _rounded(index: int) -> ValueError:
    found, remedy = (
        f"with integers above 2**53 beside other dtypes in sequences[{index}]",
        "Convert them, or give dtype=.",
    )
    return ValueError(errors.sentence("pad", "sequences", found, "integers that float64 holds exactly", remedy))


def _rank(blocks: list[Block], options: arguments.Options) -> int:
    first_of_rank = {block.rank: block for block in reversed(blocks) if not block.is_open}
    rank = max(first_of_rank or [block.rank for block in blocks] or [1])
    first_of_rank.update({block.rank: block for block in blocks if block.rank > rank})
    if len(first_of_rank) > 1:
        found = sorted((block.path, rank) for rank, block in first_of_rank.items())
        ranks = ", ".join(f"{rank} at sequences{''.join(f'[{i}]' for i in path)}" for path, rank in found)
        remedy = "Give every sequence the same number of axes."
        raise ValueError(errors.sentence("pad", "sequences", f"of ranks {ranks}", "one rank", remedy))
    if not first_of_rank:  # all sequences are empty: the options decide
        rank = max([rank, *(axis + 1 for axis in options.ragged_axes or ())])
    return rank + options.value.ndim if _is_shapeless(blocks) else rank


def _is_shapeless(blocks: list[Block]) -> bool:
    return all(block.is_open and block.rank == 1 for block in blocks)


def _sizes(blocks: list[Block], branches: list[Branch], rank: int) -> Sizes:
    pieces = [(path, array.shape, array.ndim) for path, array, *_ in blocks]
    pieces += [(path, (size,), 1) for path, size in branches]
    rows = (shape if axes == rank else _row(len(path) - 1, shape, rank) for path, shape, axes in pieces)
    table = np.fromiter(itertools.chain.from_iterable(rows), np.int64, len(pieces) * rank)
    return Sizes(np.fromiter((path[0] for path, *_ in pieces), np.int64, len(pieces)), table.reshape(-1, rank))


def _row(axis: int, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (_UNKNOWN,) * axis + shape + (_UNKNOWN,) * (rank - axis - len(shape))


def _cut(
    blocks: list[Block], branches: list[Branch], first: int, lengths: np.ndarray, options: arguments.Options
) -> tuple[list[Block], list[Branch]]:
    """The blocks and branches after cutting the sequences to ``options.length`` along axis ``first``."""
    limit, axis = int(options.length or 0), first + 1
    longer = np.maximum(lengths - limit, 0)
    begins = (longer if options.truncating == "pre" else np.zeros_like(longer)).tolist()
    kept_blocks = []
    for block, is_longer in zip(blocks, longer[[block.path[0] for block in blocks]].tolist()):
        begin = begins[block.path[0]]
        path, array = _moved(block.path, axis, begin, limit), block.array
        if is_longer and path is not None and 0 <= axis - len(path) < array.ndim:
            array = array[(slice(None),) * (axis - len(path)) + (slice(begin, begin + limit),)]
        if path is not None:
            kept_blocks.append(Block(path, array, block.rank, block.typed))
    moved = [(_moved(path, axis, begins[path[0]], limit), path, size) for path, size in branches]
    kept_branches = [
        Branch(new, min(size, limit) if len(path) == axis else size) for new, path, size in moved if new is not None
    ]
    return kept_blocks, kept_branches


def _moved(path: tuple[int, ...], axis: int, begin: int, limit: int) -> tuple[int, ...] | None:
    """The path after cutting its sequence to ``limit`` indices from ``begin`` along ``axis``; None if it is cut."""
    if axis >= len(path):
        return path
    if not 0 <= path[axis] - begin < limit:
        return None
    return (*path[:axis], path[axis] - begin, *path[axis + 1 :])


def _ragged_axes(sizes: Sizes, wanted: list[int] | None) -> list[int]:
    """The ragged axes of a sequence: found in the data, or ``wanted``. ValueError if another axis is uneven."""
    least = np.where(sizes.table == _UNKNOWN, _LARGEST, sizes.table)
    uneven = np.flatnonzero(least.min(axis=0, initial=_LARGEST) < sizes.table.max(axis=0, initial=0)).tolist()
    if wanted is None:
        return sorted({0, *uneven})
    for axis in uneven:
        if axis not in wanted:
            rows = least[:, axis].argmin(), sizes.table[:, axis].argmax()
            found = " and ".join(f"{sizes.table[row, axis]} in sequences[{sizes.owners[row]}]" for row in rows)
            raise arguments.uneven_axis(axis, f"Its size is {found}.", wanted)
    return wanted


def _lengths(sizes: Sizes, axis: int, batch: int) -> np.ndarray:
    """The length of each sequence along ``axis``, 0 if no block has the axis: ``[batch]``."""
    known = sizes.table[:, axis] != _UNKNOWN
    least, most = np.full(batch, _LARGEST), np.zeros(batch, np.int64)
    np.minimum.at(least, sizes.owners[known], sizes.table[known, axis])
    np.maximum.at(most, sizes.owners[known], sizes.table[known, axis])
    uneven = np.flatnonzero(least < most)
    if len(uneven):
        index = uneven[0]
        raise arguments.uneven_lengths(axis, f"In sequences[{index}] it is {least[index]} and {most[index]}.")
    return most


def _dtype(blocks: list[Block], options: arguments.Options) -> np.dtype:
    filled = [block for block in blocks if block.array.size]
    value_dtype = options.value.dtype
    if options.dtype is None:
        seen = filled or [block for block in blocks if block.typed]
        dtype = arguments.common_dtype([block.array.dtype for block in seen] or [value_dtype])
        for path, array, *_ in filled if dtype.kind in "fc" else ():
            if array.dtype.kind in "iu" and ((array > arguments.EXACT) | (array < -arguments.EXACT)).any():
                raise _rounded(path[0])
        return np.promote_types(dtype, value_dtype) if dtype.kind in "US" and dtype.kind == value_dtype.kind else dtype
    dtype = arguments.numpy_dtype(options.dtype)
    if dtype.kind in "US" and dtype.itemsize == 0:  # str and bytes have the length of the longest string
        text = [block.array for block in filled] + [options.value] * (value_dtype.kind == dtype.kind)
        dtype = np.result_type(dtype, *{array.astype(dtype).dtype for array in text})
    for path, array, *_ in filled:
        if arguments.exact_cast(array, dtype) is None:
            found = f"sequences[{path[0]}] ({array.dtype}) holds elements that would change."
            remedy = "Give a dtype that can hold them, or convert them first."
            raise ValueError(errors.sentence("pad", "dtype", dtype, "one that can hold all elements", found, remedy))
    return dtype


def _fill_rows(blocks: list[Block], values: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Copy one block per row into ``values``, whose first axis alone is ragged, and return the mask."""
    for row, block, begin in zip(values, blocks, begins.tolist()):
        if block.array.size:
            row[begin : begin + len(block.array)] = block.array
    positions, before = np.arange(values.shape[1]), begins[:, None]
    return np.asarray((positions >= before) & (positions < before + lengths[:, None]))


def _fill_each(blocks: list[Block], values: np.ndarray, mask: np.ndarray, axis: int, begins: np.ndarray) -> None:
    """Copy every block into ``values`` and mark it in ``mask``; rows begin at ``begins`` along ``axis`` of values."""
    for path, array, *_ in blocks:
        array = array.reshape(array.shape + (0,) * (values.ndim - len(path) - array.ndim))
        begin = int(begins[path[0]])
        index: list[Any] = [*path, *map(slice, array.shape)]
        index[axis] = index[axis] + begin if axis < len(path) else slice(begin, begin + index[axis].stop)
        mask[tuple(index[: mask.ndim])] = True
        if array.size:
            values[tuple(index)] = array
