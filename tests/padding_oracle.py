"""The oracle of pad, element by element in plain Python, and the inputs for the comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

import drawn
from distpad.padding import Padded

many = drawn.examples(150)
sides = st.sampled_from(["pre", "post"])
cutting = st.fixed_dictionaries(
    {"padding": sides, "truncating": sides}, optional={"length": st.integers(0, 6), "value": st.integers(-9, 9)}
)
shapes = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4)


def nested(rank: int, least: int = 0) -> st.SearchStrategy:
    """One sequence of ``rank`` axes: nested lists, ragged on all axes; inner lists have at least ``least`` items."""
    element: st.SearchStrategy = st.integers(-9, 9)
    for _ in range(rank - 1):
        element = st.lists(element, min_size=least, max_size=3)
    return st.lists(element, max_size=4)


def batches(least: int = 0) -> st.SearchStrategy:
    return st.integers(1, 3).flatmap(
        lambda rank: st.tuples(st.lists(nested(rank, least), min_size=1, max_size=4), st.just(rank))
    )


def depth(item: Any) -> int:
    return 1 + max(map(depth, item), default=0) if isinstance(item, list) else 0


def cut(batch: list, length: Any = None, truncating: str = "post", **_: Any) -> list:
    """The sequences cut to ``length``."""
    if length is None:
        return batch
    return [row[max(len(row) - length, 0) :] if truncating == "pre" else row[:length] for row in batch]


def oracle(
    batch: list, axes: list, *, length: Any = None, value: Any = 0, padding: str = "post", truncating: str = "post"
) -> tuple[list, list, list]:
    """(values, lengths, mask) of nested lists with ragged ``axes``, computed element by element."""
    rank = max([depth(batch) - 1, axes[-1] + 1])
    batch = cut(batch, length, truncating)
    sizes: list[set] = [set() for _ in range(rank)]

    def visit(item: list, axis: int) -> None:
        sizes[axis].add(len(item))
        for child in item if axis + 1 < rank else ():
            visit(child, axis + 1)

    for sequence in batch:
        visit(sequence, 0)
    target = [max(size, default=0) for size in sizes]
    target[0] = target[0] if length is None else length
    values = np.full([len(batch), *target], value, dtype=object)
    mask = np.zeros(values.shape[: axes[-1] + 2], bool)

    def place(item: Any, at: tuple) -> None:
        if len(at) == mask.ndim:
            mask[at] = True
        if len(at) == values.ndim:
            values[at] = item
            return
        for position, child in enumerate(item):
            place(child, (*at, position))

    lengths = []
    for row, sequence in enumerate(batch):
        lengths.append(len(sequence))
        for position, item in enumerate(sequence):
            place(item, (row, position + (target[0] - len(sequence) if padding == "pre" else 0)))
    return values.tolist(), lengths, mask.tolist()


def ragged_axes(batch: list) -> list:
    """Axis 0 and all axes along which two lists differ in length."""
    sizes: dict[int, set] = {}

    def visit(item: Any, axis: int) -> None:
        if isinstance(item, list):
            sizes.setdefault(axis, set()).add(len(item))
            for child in item:
                visit(child, axis + 1)

    for sequence in batch:
        visit(sequence, 0)
    return [0] + [axis for axis in sorted(sizes) if axis and len(sizes[axis]) > 1]


def as_lists(padded: Padded) -> tuple[list, list, list]:
    values, lengths, mask = map(np.asarray, padded)
    assert lengths.dtype == np.int32
    assert mask.dtype == bool
    assert mask.shape == values.shape[: mask.ndim]
    return values.tolist(), lengths.tolist(), mask.tolist()


def plain(sequences: Any) -> list:
    """Nested lists with the arrays in them converted to lists."""
    return [plain(item) for item in sequences] if isinstance(sequences, list) else np.asarray(sequences).tolist()
