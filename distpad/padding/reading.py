"""Reading the argument of ``pad``: arrays and nested lists as arrays of one rank, or as a column."""

from __future__ import annotations

import itertools
import marshal
from collections.abc import Iterator
from typing import Any, NamedTuple, Union

import numpy as np

from distpad import errors
from distpad.padding import arguments, columns

_LISTS = {list, tuple}
Rows = Union[list[np.ndarray], columns.Column]


class Piece(NamedTuple):
    """A rectangular part of the batch, or a list that is not rectangular.

    Attributes:
      path: the indices that lead to it, the sequence's index first.
      array: None for a list that is not rectangular; pieces of its own follow.
      shape: that of the array, or the number of the list's children.
      typed: False for empty lists, which have no dtype.
    """

    path: tuple[int, ...]
    array: Any
    shape: tuple[int, ...]
    typed: bool = True

    @property
    def rank(self) -> int:
        """The rank of a sequence, as this piece shows it."""
        return len(self.path) - 1 + len(self.shape)

    @property
    def is_open(self) -> bool:
        """Whether the piece ends in an empty list, which may be of numbers, of vectors or of images."""
        return not self.array.size and self.shape[-1:] == (0,)


def read(sequences: list[Any], options: arguments.Options) -> tuple[Rows, np.dtype]:
    """Return sequences of one rank, and the dtype of the batch, which may be wider than that of the sequences.

    Returns: one array a sequence; or, for lists that are not rectangular, a column of scalars whose splits are all axes
      of a sequence.

    Raises: TypeError, ValueError, as ``distpad.pad`` describes them.
    """
    regular = None if arguments.is_object(options.dtype) else read_regular(sequences)
    dtype = None if regular is None else _regular_dtype(*regular, options)
    return _read_any(sequences, options) if regular is None or dtype is None else (regular[0], dtype)


# Regular batches: one type, dtype and rank throughout. No Python runs for single elements.


def read_regular(sequences: list[Any]) -> tuple[Rows, np.dtype] | None:
    """Read arrays of one dtype, or nested lists of such arrays or of Python numbers; None for all else.

    Returns: rows as of ``read``, and the dtype that NumPy gives them. The rows may hold integers in a narrower one.
    """
    rows: list[Any] = sequences
    splits: list[np.ndarray] = []
    kinds = set(map(type, rows))
    while len(splits) < arguments.MOST_AXES and kinds <= _LISTS:
        splits.append(columns.offsets([*map(len, rows)]))
        first = next((row[0] for row in rows if row), None)
        if type(first) in (bool, int, float):
            values = _numbers(rows, int(splits[-1][-1]))
            if values is None:
                return None
            dtype = np.dtype(np.int64) if values.dtype == np.int32 else values.dtype
            return columns.Column(values, tuple(splits)), dtype
        if type(first) not in (*_LISTS, np.ndarray):
            return None
        rows = [*itertools.chain.from_iterable(rows)]
        kinds = set(map(type, rows))
    if kinds != {np.ndarray}:
        return None
    dtypes, ranks = {row.dtype for row in rows}, {row.ndim for row in rows}
    if len(dtypes) > 1 or len(ranks) > 1 or ranks == {0} or rows[0].dtype.kind in "OUS":
        return None
    if not splits:
        return (rows, rows[0].dtype) if any(row.size for row in rows) else None
    if not all(row.size for row in rows):  # a column does not hold the other sizes of an empty array
        return None
    column = columns.of_arrays(rows, rows[0].ndim)
    return columns.Column(column.values, (*splits, *column.splits)), column.values.dtype


def _numbers(rows: list[Any], count: int) -> np.ndarray | None:
    """The elements of lists of Python numbers in one array; None for other elements, and integers that would change.

    Version 2 of ``marshal`` writes a list as 5 bytes, then each integer as "i" and 4 bytes, each float as "g" and 8
    bytes. So C code shows all types and all numbers at once, before Python could have looked at all types.
    """
    written = bytearray()
    try:
        for row in rows:
            written += marshal.dumps(row, 2)[5:]
    except ValueError:  # an object that marshal does not write
        return None
    for mark, number in ((b"i", "<i4"), (b"g", "<f8")):
        record = np.dtype([("mark", "S1"), ("number", number)])
        if len(written) == count * record.itemsize and written[:: record.itemsize] == mark * count:
            return np.frombuffer(written, record)["number"]
    types = set(map(type, itertools.chain.from_iterable(rows)))
    if not types <= {bool, int, float}:
        return None
    kind = float if float in types else int if int in types else bool
    try:
        values = np.fromiter(itertools.chain.from_iterable(rows), kind, count)
    except OverflowError:
        return None
    mixed = len(types) > 1 and kind is float
    return None if mixed and (np.abs(values) >= arguments.EXACT).any() else values


def _regular_dtype(rows: Rows, found: np.dtype, options: arguments.Options) -> np.dtype | None:
    """The dtype of the batch; None if it cannot hold all elements."""
    dtype = found if options.dtype is None else arguments.numpy_dtype(options.dtype)
    if dtype.kind in "US":
        return None
    if np.can_cast(found, dtype, "safe"):
        return dtype
    if isinstance(rows, list):  # broadcast arrays may be larger than the memory
        errors.check_memory("pad: the sequences", [sum(row.size for row in rows)], found)
    flat = np.concatenate([row.reshape(-1) for row in rows]) if isinstance(rows, list) else rows.values
    return None if arguments.exact_cast(flat, dtype) is None else dtype


# Irregular batches, and errors: each sequence is looked at.


def _read_any(sequences: list[Any], options: arguments.Options) -> tuple[Rows, np.dtype]:
    pieces: list[Piece] = []
    for index, sequence in enumerate(sequences):
        if isinstance(sequence, np.ndarray):
            errors.check_memory(f"pad: sequences[{index}]", sequence.shape, sequence.dtype)
        pieces += _pieces(sequence, (index,), object if arguments.is_object(options.dtype) else None)
        if not pieces[-1].rank:
            found, rule = errors.shown(sequence), "a sequence, with at least one axis"
            remedy = "Write pad([[1, 2, 3]]) for one sequence, pad([[1], [2], [3]]) for three of length 1."
            raise ValueError(errors.sentence("pad", f"sequences[{index}]", found, rule, remedy))
    blocks = [piece for piece in pieces if piece.array is not None]
    rank, dtype = _rank(blocks, options), _dtype(blocks, options)
    if len(blocks) < len(pieces):
        return _column(pieces, rank, dtype), dtype
    # an empty list takes the sizes of the others, and where all are empty, the shape of value
    inner = options.value.shape if _is_shapeless(blocks) else ()
    most = [max((b.shape[axis] for b in blocks if b.rank > axis), default=0) for axis in range(rank - len(inner))]
    shape = (*most, *inner)
    return [b.array if b.rank == rank else b.array.reshape(b.shape + shape[b.rank :]) for b in blocks], dtype


def _column(pieces: list[Piece], rank: int, dtype: np.dtype) -> columns.Column:
    """A column of scalars from pieces in the order of their elements."""
    lengths = [[np.zeros(0, np.int64)] for _ in range(rank)]
    for piece in pieces:
        rows = 1
        for axis, size in enumerate(piece.shape, len(piece.path) - 1):
            lengths[axis].append(np.full(rows, size))
            rows *= size
    values = [piece.array.astype(dtype).reshape(-1) for piece in pieces if piece.array is not None]
    return columns.Column(np.concatenate(values), tuple(columns.offsets(np.concatenate(each)) for each in lengths))


def _pieces(item: Any, path: tuple[int, ...], dtype: Any) -> Iterator[Piece]:
    array = _rectangle(item, path[0], dtype)
    if array is not None:
        typed = array.size > 0 or array.dtype != np.float64 or not isinstance(item, (list, tuple))
        yield Piece(path, array, array.shape, typed)
        return
    rule, remedy = f"at most {arguments.MOST_AXES} axes", "Lists that contain themselves have no end."
    errors.require("pad", len(path) <= arguments.MOST_AXES, f"sequences[{path[0]}]", "nested deeper", rule, remedy)
    item = [*item]  # whose length a class of its own cannot misstate
    yield Piece(path, None, (len(item),))
    for index, child in enumerate(item):
        yield from _pieces(child, (*path, index), dtype)


def _rectangle(item: Any, index: int, dtype: Any) -> np.ndarray | None:
    """The item as an array; None if its parts have different sizes."""
    if type(item) is np.ndarray and item.dtype != object:
        return item
    found, remedy = f"with masked elements in sequences[{index}]", "Fill them, or leave them out."
    errors.require("pad", not np.ma.is_masked(item), "sequences", found, "no masked elements", remedy)
    is_list = isinstance(item, (list, tuple))
    try:
        array = np.asarray(item, dtype=dtype if is_list else None)
    except ValueError:
        if is_list:
            return None
        raise
    found, rule = f"nested deeper than {arguments.MOST_AXES} axes", "at most so many"
    errors.require("pad", array.ndim <= arguments.MOST_AXES, f"sequences[{index}]", found, rule)
    if array.dtype == object and array.ndim and any(isinstance(x, (list, tuple, np.ndarray)) for x in array.flat):
        return None
    if is_list and dtype is None:
        _check_leaves(item, array, index)
    if is_list and array.dtype.kind in "US":
        text = str if array.dtype.kind == "U" else bytes
        is_text = all(isinstance(leaf, text) for leaf in np.asarray(item, object).flat)
        found = f"of strings and other elements in sequences[{index}]"
        errors.require("pad", is_text, "sequences", found, "one kind of element", "Give dtype=object.")
    return array


def _check_leaves(item: Any, array: np.ndarray, index: int) -> None:
    """Raise ValueError for a list that NumPy would convert to objects, or whose integers it would round to floats."""
    if array.dtype == object and not any(isinstance(part, np.ndarray) for part in item):
        leaf = next((x for x in array.flat if not isinstance(x, (bool, int, float, complex, str, bytes))), None)
        found = f"with {errors.shown(leaf)} in sequences[{index}]"
        if leaf is None and None not in array:
            found = f"with integers of more than 64 bits or of other kinds in sequences[{index}]"
        raise ValueError(errors.sentence("pad", "sequences", found, "numbers or text", "Or give dtype=object."))
    large = array.dtype == np.float64 and bool((np.abs(array) >= arguments.EXACT).any())
    leaves = np.asarray(item, object).flat if large else ()
    if any(isinstance(leaf, (int, np.integer)) and abs(int(leaf)) > arguments.EXACT for leaf in leaves):
        raise _rounded(index)


def _rounded(index: int) -> ValueError:
    found, rule = (
        f"with integers above 2**53 beside other dtypes in sequences[{index}]",
        "integers that float64 holds exactly",
    )
    return ValueError(errors.sentence("pad", "sequences", found, rule, "Convert them, or give dtype=."))


def _rank(blocks: list[Piece], options: arguments.Options) -> int:
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


def _is_shapeless(blocks: list[Piece]) -> bool:
    return all(block.is_open and block.rank == 1 for block in blocks)


def _dtype(blocks: list[Piece], options: arguments.Options) -> np.dtype:
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
