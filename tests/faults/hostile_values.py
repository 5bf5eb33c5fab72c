"""Values that no function expects, and arguments that are nearly right, chosen by the bytes of a fuzzer or a test."""

from __future__ import annotations

import array
import collections
import decimal
import fractions
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Own(Exception):
    """The error of a hostile object's own method: it may reach the caller."""


class Choices:
    """Choices among n things, one byte each (three for more than 256 things); 0 after the last byte."""

    def __init__(self, data: bytes) -> None:
        self._bytes = iter(data)

    def __call__(self, count: int) -> int:
        number = next(self._bytes, 0)
        if count > 256:
            number = (number << 16) + (next(self._bytes, 0) << 8) + next(self._bytes, 0)
        return number % count

    def of(self, items: Sequence[Any]) -> Any:
        return items[self(len(items))]

    def one(self, *makers: Callable[[Choices], Any]) -> Any:
        return self.of(makers)(self)

    def some(self, make: Callable[[Choices], Any], most: int = 4) -> list[Any]:
        return [make(self) for _ in range(self(most + 1))]


def _raise(*_: Any) -> Any:
    raise Own


def _class(base: type = object, **methods: Any) -> Callable[[], Any]:
    return type("Hostile", (base,), methods)


class _Frame:
    """As of pandas: a row has a name, a column is an attribute."""

    column_names = columns = ("y",)
    iloc = property(_raise)

    def __len__(self) -> int:
        return 2

    def to_numpy(self) -> Any:
        return "no array"


def _deep(kind: type, depth: int) -> Any:
    item: Any = kind()
    for _ in range(depth):
        item = {"a": item} if kind is dict else kind([item])
    return item


def _cyclic() -> list[Any]:
    item: list[Any] = [1]
    item.append(item)
    return item


NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 4, 7, -1, -2, 255, 2**15, 2**31 - 1, 2**31, 2**40, 2**53 + 1, 2**62, 2**63 - 1, 2**63, -(2**63)),
    *(2**64, 10**400, 10**5000, True, False, np.True_, 0.0, -0.0, 0.5, 1.0, 1e300, 1e-300, 1j),
    *(float("nan"), float("inf"), -float("inf"), fractions.Fraction(1, 3), fractions.Fraction(10**400)),
    *(decimal.Decimal(1), np.int8(3), np.uint64(2**64 - 1), np.float16("nan"), np.longdouble(2), np.complex64(1)),
)
TEXTS: tuple[Any, ...] = (
    "",
    "a",
    "pre",
    "post",
    "error",
    "auto",
    "y",
    "0",
    "x" * 10**4,
    "\0",
    "\ud800",
    b"",
    b"\xff",
    b"y",
    np.str_("y"),
)
OBJECTS: tuple[Callable[[], Any], ...] = (
    *(lambda: None, object, lambda: Ellipsis, lambda: NotImplemented, lambda: int, lambda: len, lambda: print),
    *(set, lambda: {1, 2}, lambda: frozenset("ab"), dict, lambda: {"a": 1}, lambda: {1: "x", "b": [2]}),
    *(
        lambda: {(1, 2): 3},
        lambda: {None: 1},
        lambda: {b"k": 1, "k": 2},
        lambda: {True: 1, "x": 2},
        lambda: {float("nan"): 1},
    ),
    *(lambda: range(3), lambda: slice(1), lambda: iter([1, 2]), lambda: (i for i in range(3)), lambda: map(int, "ab")),
    *(lambda: bytearray(b"ab"), lambda: memoryview(b"abc"), lambda: array.array("i", [1, 2])),
    *(lambda: collections.deque([1, 2]), lambda: collections.OrderedDict(b=1), lambda: collections.UserList([1, 2])),
    *(
        lambda: _deep(list, 40),
        lambda: _deep(list, 3000),
        lambda: _deep(tuple, 3000),
        lambda: _deep(dict, 3000),
        _cyclic,
    ),
    *(_Frame, _class(__len__=_raise), _class(__len__=lambda _: -1), _class(__len__=lambda _: 2**63, __iter__=_raise)),
    _class(__len__=lambda _: 10**5, __iter__=lambda _: iter([[1], [2]])),
    _class(__len__=lambda _: 10**5, __getitem__=lambda _, i: i if i < 2 else _raise()),
    _class(list, __len__=lambda _: 5),
    _class(dict, __len__=lambda _: 5),
    *(_class(__iter__=_raise), _class(__iter__=lambda _: 3), _class(__array__=_raise)),
    *(_class(__array__=lambda *_, **__: [1]), _class(__array__=lambda *_, **__: np.zeros([2, 2]))),
    *(_class(__index__=_raise), _class(__index__=lambda _: 2**70), _class(__index__=lambda _: "1")),
    *(_class(__float__=_raise), _class(__eq__=_raise), _class(__bool__=_raise), _class(__hash__=None)),
    *(_class(__repr__=_raise), _class(__repr__=lambda _: 3), _class(__getattr__=_raise)),
)
ARRAYS: tuple[Callable[[], Any], ...] = (
    *(lambda: np.array(3), lambda: np.array([]), lambda: np.zeros([2, 0]), lambda: np.zeros([0, 2], int)),
    *(
        lambda: np.array([1, 2]),
        lambda: np.arange(6).reshape(2, 3),
        lambda: np.ones([1] * 20),
        lambda: np.ones([2, 2], bool),
    ),
    *(lambda: np.array([1.5, np.nan]), lambda: np.array([[1j, 2]]), lambda: np.array([[2**64 - 1]], np.uint64)),
    *(
        lambda: np.array(["2020-01-01", "NaT"], "M8[D]"),
        lambda: np.array([[1], [2]], "m8[s]"),
        lambda: np.array([b"a", b"bc"]),
    ),
    *(
        lambda: np.array([["a", "bc"]]),
        lambda: np.zeros([2], [("a", int), ("b", float)]),
        lambda: np.zeros([2, 2], "V3"),
    ),
    *(lambda: np.rec.array([(1, 2.0)], dtype=[("a", int), ("b", float)]), lambda: np.zeros([2, 2], ">i4")),
    *(lambda: np.ma.array([[1, 2]], mask=[[0, 1]]), lambda: np.ma.array([1, 2]), lambda: np.ma.masked),
    *(
        lambda: np.array([1, "a", None], object),
        lambda: np.array([[1], [2, 3]], object),
        lambda: np.array({1: 2}, object),
    ),
    *(lambda: np.zeros([2, 2], np.float16), lambda: np.zeros([2, 2], np.longdouble)),
    lambda: np.broadcast_to(np.int8(1), [1, 2**40]),
    lambda: np.broadcast_to(np.int8(1), [2, 2**20, 2**30]),
    lambda: np.broadcast_to(np.int64(1), [0, 2**40]),
)


def number(choose: Choices) -> Any:
    return choose.of(NUMBERS)


def text(choose: Choices) -> Any:
    return choose.of(TEXTS)


def small(choose: Choices) -> int:
    return choose(6)


def leaf(choose: Choices) -> Any:
    return choose.one(number, text, lambda c: c.of(OBJECTS)(), lambda c: c.of(ARRAYS)())


def nest(choose: Choices, depth: int = 3) -> Any:
    """Lists, tuples and mappings of hostile leaves."""
    kind = choose(8) if depth else 0
    if kind < 4:
        return leaf(choose)
    items = [nest(choose, depth - 1) for _ in range(choose(4))]
    if kind < 6:
        return items
    return (
        tuple(items) if kind == 6 else {choose.of(("a", "y", 0, 1, "a/b", None, 1.5, ("t",))): item for item in items}
    )


def nearly(right: Callable[[Choices], Any]) -> Callable[[Choices], Any]:
    """What is right three times in four."""
    return lambda choose: nest(choose) if choose(4) == 3 else right(choose)


def just(*items: Any) -> Callable[[Choices], Any]:
    return lambda choose: choose.of(items)


def integers(choose: Choices) -> list[int]:
    return choose.some(lambda c: c(9) - 2, 5)


def ragged(choose: Choices, depth: int = 2) -> list[Any]:
    """Nested lists of small integers, of up to three axes, now and then with one hostile item."""
    if depth == 0 or choose(3) == 0:
        return choose.some(small)
    rows = choose.some(lambda c: ragged(c, depth - 1))
    if rows and choose(8) == 7:
        rows[choose(len(rows))] = nest(choose)
    return rows


def arrays(choose: Choices) -> list[np.ndarray]:
    """Arrays of one rank and of any sizes."""
    rank, dtype = 1 + choose(3), choose.of(("i4", "f8", "f4", "?", "u1", "i8", "c8", "f2", "O", "U2", "M8[s]"))
    return [np.ones([choose(4) for _ in range(rank)], dtype) for _ in range(choose(4))]


def sequences(choose: Choices) -> Any:
    return choose.one(ragged, ragged, arrays, nest)


def options(choose: Choices, **makers: Callable[[Choices], Any]) -> dict[str, Any]:
    """Some keyword arguments, each nearly right."""
    return {name: nearly(make)(choose) for name, make in makers.items() if choose(3) == 0}
