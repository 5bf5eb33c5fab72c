"""distpad's exceptions, the form of its messages, and checks of arguments. Imports no other module of distpad."""

from __future__ import annotations

import numbers
import operator


class DistpadError(Exception):
    """Base class of distpad's own errors. Wrong arguments raise ``ValueError`` and ``TypeError``."""


class PeerError(DistpadError):
    """Another worker failed: the message names the worker and repeats its error."""


def sentence(function: str, argument: str, value: object, expected: str, *notes: str) -> str:
    """Format an error: ``function: argument is VALUE, expected RULE. EVIDENCE. REMEDY.``

    >>> sentence("pad", "padding", "'left'", "'pre' or 'post'", "Write padding='pre'.")
    "pad: padding is 'left', expected 'pre' or 'post'. Write padding='pre'."
    """
    return " ".join([f"{function}: {argument} is {value}, expected {expected}.", *(note for note in notes if note)])


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


def choice(function: str, argument: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError for an option that is not in ``allowed``, listing all of them.

    >>> choice("pad", "padding", "post", ("pre", "post"))
    """
    require(function, value in allowed, argument, repr(value), "one of " + ", ".join(map(repr, allowed)))


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


def integer(function: str, argument: str, value: object, least: int) -> int:
    """``value`` as an int; TypeError if it is not an integer, ValueError if it is below ``least``.

    >>> integer("certify", "cases", 32, least=1)
    32
    """
    if not is_integer(value):
        raise TypeError(sentence(function, argument, repr(value), "an integer"))
    number = operator.index(value)  # type: ignore[arg-type]
    if number < least:
        raise ValueError(sentence(function, argument, number, f"at least {least}"))
    return number


def number(function: str, argument: str, value: object) -> float:
    """``value`` as a float; TypeError if it is not a real number.

    >>> number("PaddedBatches", "limit_s", 5)
    5.0
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(sentence(function, argument, repr(value), "a number"))
    return float(value)
