"""distpad's exceptions and the format of its messages. This module imports nothing from distpad."""

from __future__ import annotations

import numbers
import operator


class DistpadError(Exception):
    """Base class of distpad's own errors. Wrong arguments raise plain ``ValueError`` and ``TypeError``."""


class PeerError(DistpadError):
    """Another worker failed. The message names the worker and repeats its error."""


def sentence(function: str, argument: str, value: object, expected: str, *notes: str) -> str:
    """Format an error: ``function: argument is VALUE, expected RULE. EVIDENCE. REMEDY.``

    >>> sentence("pad", "padding", "'left'", "'pre' or 'post'", "Write padding='pre'.")
    "pad: padding is 'left', expected 'pre' or 'post'. Write padding='pre'."
    """
    return " ".join([f"{function}: {argument} is {value}, expected {expected}.", *(note for note in notes if note)])


def choice(function: str, argument: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``. The message lists all of ``allowed``.

    >>> choice("pad", "padding", "post", ("pre", "post"))
    """
    if value not in allowed:
        raise ValueError(sentence(function, argument, repr(value), "one of " + ", ".join(map(repr, allowed))))


def integer(function: str, argument: str, value: object, least: int) -> int:
    """Return ``value`` as an int. Raises TypeError if it is not an integer, ValueError if it is below ``least``.

    >>> integer("certify", "cases", 32, least=1)
    32
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(sentence(function, argument, repr(value), "an integer"))
    number = operator.index(value)
    if number < least:
        raise ValueError(sentence(function, argument, number, f"at least {least}"))
    return number


def number(function: str, argument: str, value: object) -> float:
    """Return ``value`` as a float. Raises TypeError if it is not a real number.

    >>> number("PaddedBatches", "limit_s", 5)
    5.0
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(sentence(function, argument, repr(value), "a number"))
    return float(value)
