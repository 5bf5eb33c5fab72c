"""distpad's exceptions, the form of its messages, and checks of arguments. Imports no other module of distpad."""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
import operator
import os
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any


class DistpadError(Exception):
    """Base class of distpad's own errors. Wrong arguments raise ``ValueError`` and ``TypeError``."""


class PeerError(DistpadError):
    """Another worker failed: the message names the worker and repeats its error."""


_MOST_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
_MOST = 2**62  # int64 holds the sum of two
_shown = reprlib.Repr()  # limits depth and length, and survives objects whose own repr fails
_shown.maxstring = _shown.maxother = _shown.maxlong = 200
_shown.maxlist = _shown.maxtuple = _shown.maxdict = _shown.maxset = 20


def shown(value: object) -> str:
    """``repr(value)`` for messages, cut to some hundred characters.

    >>> shown("left"), shown([[[[[[[[3]]]]]]]])
    ("'left'", '[[[[[[[...]]]]]]]')
    """
    try:
        return _shown.repr(value)
    except Exception:  # of a subclass of str or int, or an integer with too many digits for Python
        return f"a {type(value).__name__}"


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception:  # as in shown
        return f"a {type(value).__name__}"


def sentence(function: str, argument: str, value: object, expected: str, *notes: str) -> str:
    """Format an error: ``function: argument is VALUE, expected RULE. EVIDENCE. REMEDY.``

    A ``value`` that is a string is the text itself.

    >>> sentence("pad", "padding", "'left'", "'pre' or 'post'", "Write padding='pre'.")
    "pad: padding is 'left', expected 'pre' or 'post'. Write padding='pre'."
    """
    nested = isinstance(value, (list, tuple, dict, set, frozenset))
    found = shown(value) if nested else _text(value)
    return " ".join([f"{function}: {argument} is {found}, expected {expected}.", *(note for note in notes if note)])


def require(
    function: str,
    holds: object,
    argument: str,
    value: object,
    expected: str,
    *notes: str,
    error: type[Exception] = ValueError,
) -> None:
    """Raise ``error`` with the sentence of the other arguments, unless ``holds``.

    >>> require("pad", 3 > 0, "length", 3, "above 0")
    """
    if not holds:
        raise error(sentence(function, argument, value, expected, *notes))


def is_deep(value: object, most: int = 32) -> bool:
    """Whether lists, tuples and mappings are nested in each other more than ``most`` times, or contain themselves.

    >>> is_deep([[1], {"a": [2]}]), is_deep([[[1]]], most=2)
    (False, True)
    """
    kinds = (list, tuple, dict)
    level: list[Any] = [value] if isinstance(value, kinds) else []
    for _ in range(most):
        nested = {id(item): item for item in level}.values()  # once each, also where lists contain themselves
        parts = itertools.chain.from_iterable(item.values() if isinstance(item, dict) else item for item in nested)
        level = [part for part in parts if isinstance(part, kinds)]
    return bool(level)


def choice(function: str, argument: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError for an option that is not in ``allowed``, listing all of them.

    >>> choice("pad", "padding", "post", ("pre", "post"))
    """
    is_known = isinstance(value, str) and value in allowed
    require(function, is_known, argument, shown(value), "one of " + ", ".join(map(repr, allowed)))


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer of Python's, NumPy's or an eager tensor; booleans are not.

    >>> is_integer(3), is_integer(True), is_integer(3.0)
    (True, False, False)
    """
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # also of a symbolic tensor, whose value is not known yet
        return False
    return type(value).__name__ not in ("bool", "bool_")  # NumPy's has the second name; it is not imported here


def check_memory(name: str, shape: Sequence[int], dtype: Any) -> None:
    """Raise ValueError for an array that is larger than the machine's memory, before it is allocated.

    >>> check_memory("length", [2, 3], "int64")
    """
    size = math.prod(map(int, shape)) * getattr(dtype, "itemsize", 1)
    if size > _MOST_BYTES:
        found, rule = f"{name} is an array of shape {tuple(shape)}, of {size:.1e} bytes", f"{_MOST_BYTES:.1e} bytes"
        raise ValueError(f"{found}, expected one within the {rule} of memory.")


@contextlib.contextmanager
def within_memory(name: str) -> Iterator[None]:
    """Raise ValueError for NumPy's MemoryError, which precedes the allocation.

    >>> with within_memory("pad: the batch"):
    ...     pass
    """
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"{name} needs more memory than is free. {error}") from error


def integer(function: str, argument: str, value: object, least: int, most: int = _MOST) -> int:
    """``value`` as an int; TypeError if it is not an integer, ValueError if it is not from ``least`` to ``most``.

    >>> integer("certify", "cases", 32, least=1)
    32
    """
    if not is_integer(value):
        raise TypeError(sentence(function, argument, shown(value), "an integer"))
    number = operator.index(value)  # type: ignore[arg-type]
    if not least <= number <= most:
        raise ValueError(
            sentence(function, argument, number, f"at least {least}" if number < least else f"at most {most}")
        )
    return number


def flag(function: str, argument: str, value: object) -> bool:
    """``value`` as a bool; TypeError if it is neither a bool of Python or NumPy nor 0 or 1.

    >>> flag("PaddedBatches", "replicated", 1)
    True
    """
    is_flag = type(value).__name__ in ("bool", "bool_") or (is_integer(value) and operator.index(value) in (0, 1))  # type: ignore[arg-type]
    require(function, is_flag, argument, shown(value), "True or False", error=TypeError)
    return bool(value)


def number(function: str, argument: str, value: object, *, finite: bool = True) -> float:
    """``value`` as a float; TypeError if it is not a real number, ValueError if it has to be ``finite`` and is not.

    >>> number("PaddedBatches", "limit_s", 5)
    5.0
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(sentence(function, argument, shown(value), "a number"))
    try:
        found = float(value)
    except OverflowError:  # an integer or a fraction above all floats
        found = math.inf
    require(function, math.isfinite(found) or not finite, argument, shown(value), "a finite number")
    return found
