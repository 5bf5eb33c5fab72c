"""Options that are stated once: as a dataclass's fields, with the help and the rule of each."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Any, Optional

from distpad import errors


class Option(typing.NamedTuple):
    """How the command line shows a field, and which values it takes. A tuple's values are checked one by one."""

    help: str = ""  # none: the command line does not have it, or another class states it
    flag: str = ""  # by default, the field's name
    panel: Optional[str] = None  # noqa: UP045 (NamedTuple evaluates it on Python 3.9)
    metavar: Optional[str] = None  # noqa: UP045
    low: Optional[float] = None  # noqa: UP045
    high: Optional[float] = None  # noqa: UP045
    pattern: str = ""
    rule: str = ""  # the pattern in words
    remedy: str = ""
    private: bool = False  # after "=", a value holds what no message may repeat


def option(default: Any, help: str = "", *, factory: Any = dataclasses.MISSING, **fields: Any) -> Any:
    """A dataclass's field. The further arguments are fields of Option."""
    metadata = {"option": Option(help, **fields)}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def stated(owner: Any) -> Iterator[tuple[dataclasses.Field, str, Option]]:
    """The options of a dataclass: its fields, their flags, and what ``option`` states about them."""
    for field in dataclasses.fields(owner):
        if found := field.metadata.get("option"):
            yield field, found.flag or f"--{field.name.replace('_', '-')}", found


def check(owner: Any) -> None:
    """Check all options of a dataclass's instance.

    Raises:
      ValueError: a value is out of range, or does not have its form.
    """
    for field, flag, rule in stated(owner):
        value = getattr(owner, field.name)
        for each in value if isinstance(value, tuple) else () if value is None else (value,):
            low, high = rule.low, float("inf") if rule.high is None else rule.high
            if low is not None and not (low <= each <= high and each < float("inf")):
                wanted = f"at least {low}" if rule.high is None else f"{low} to {high}"
                raise ValueError(errors.sentence("launch", flag, each, wanted))
            if rule.pattern and not re.fullmatch(rule.pattern, each):
                shown = each.partition("=")[0] if rule.private else each
                raise ValueError(errors.sentence("launch", flag, repr(shown), rule.rule, rule.remedy))
