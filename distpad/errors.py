"""The leaf: distpad's exceptions and the form of its messages. Imports nothing of distpad."""

from __future__ import annotations

import numbers
import operator


class DistpadError(Exception):
    """Base of the errors that are distpad's own. Wrong arguments are plain ``ValueError`` and ``TypeError``."""


class PeerError(DistpadError):
    """Another worker failed: the message names the worker and repeats what it said."""


def sentence(function: str, argument: str, value: object, expected: str, *notes: str) -> str:
    """Format an error: ``function: argument is VALUE, expected RULE. EVIDENCE. REMEDY.``

    >>> sentence("pad", "padding", "'left'", "'pre' or 'post'", "Write padding='pre'.")
    "pad: padding is 'left', expected 'pre' or 'post'. Write padding='pre'."
    """
    return " ".join([f"{function}: {argument} is {value}, expected {expected}.", *(note for note in notes if note)])


def choice(function: str, argument: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a string option that is none of ``allowed``, listing them all.

    >>> choice("pad", "padding", "post", ("pre", "post"))
    """
    if value not in allowed:
        raise ValueError(sentence(function, argument, repr(value), "one of " + ", ".join(map(repr, allowed))))


def integer(function: str, argument: str, value: object, least: int) -> int:
    """``value`` as an int; TypeError where it is no integer, ValueError where it is below ``least``.

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
    """``value`` as a float; TypeError where it is no real number.

    >>> number("PaddedBatches", "limit_s", 5)
    5.0
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(sentence(function, argument, repr(value), "a number"))
    return float(value)
