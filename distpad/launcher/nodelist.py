"""Expand the compact forms in Slurm's environment variables: node lists and tasks per node."""

from __future__ import annotations

import itertools
import math
import re

from distpad import errors

_MOST_HOSTS = 65536  # scontrol's own limit for a range; it also protects the memory from a mistyped list
_ENTRY = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")  # text and whole brackets
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_TASKS = re.compile(r"([0-9]+)(?:\(x([0-9]+)\))?")


def slurm_hostnames(nodelist: str) -> list[str]:
    """Expand a Slurm node list, such as ``SLURM_JOB_NODELIST``, in the order of ``scontrol show hostnames``.

    Prefer ``scontrol`` itself; this function is for containers, which lack it. Ranks follow the order of the hosts, so
    the order is exactly scontrol's: of several brackets, the last varies fastest, then the first, and the last but one
    slowest.

    Args:
        nodelist: names separated by commas; brackets hold numbers and ranges, ``a[01-03,7]``. The numbers of a range
            are padded with zeros to the width of its first number. Text after the last bracket is accepted, unlike in
            scontrol.

    Returns:
        The names. Duplicates are kept.

    Raises:
        TypeError: ``nodelist`` is not a string.
        ValueError: ``nodelist`` is empty or malformed, a range is descending, or there are more than 65536 hosts.

    >>> slurm_hostnames("a[09-10,7],b")
    ['a09', 'a10', 'a7', 'b']
    >>> slurm_hostnames("rack[1-2]-n[5,8].dom")
    ['rack1-n5.dom', 'rack1-n8.dom', 'rack2-n5.dom', 'rack2-n8.dom']
    """
    if not isinstance(nodelist, str):
        raise TypeError(errors.sentence("slurm_hostnames", "nodelist", repr(nodelist), "a string"))
    names: list[str] = []
    for entry in _entries(nodelist):
        texts, brackets = _BRACKET.split(entry)[::2], [_numbers(nodelist, b) for b in _BRACKET.findall(entry)]
        count = math.prod(map(len, brackets))
        if len(names) + count > _MOST_HOSTS:
            raise _wrong(nodelist, f"at most {_MOST_HOSTS} hosts", f"{entry!r} alone has {count}.")
        names += [_join(texts, numbers) for numbers in _choices(brackets)]
    return names


def slurm_tasks_per_node(text: str) -> list[int]:
    """Expand ``SLURM_TASKS_PER_NODE`` or ``SLURM_STEP_TASKS_PER_NODE``.

    Args:
        text: numbers separated by commas; ``2(x3)`` means three nodes of two tasks each.

    Returns:
        One number per node, in the order of the node list.

    Raises:
        TypeError: ``text`` is not a string.
        ValueError: ``text`` is empty or malformed, a node has no task, or there are more than 65536 nodes.

    >>> slurm_tasks_per_node("2(x3),1")
    [2, 2, 2, 1]
    """
    if not isinstance(text, str):
        raise TypeError(errors.sentence("slurm_tasks_per_node", "text", repr(text), "a string"))
    tasks: list[int] = []
    for part in text.split(","):
        found = _TASKS.fullmatch(part.strip())
        number, times = (int(found[1]), int(found[2] or 1)) if found else (0, 0)
        if number < 1 or not 0 < times <= _MOST_HOSTS - len(tasks):
            rule = f"numbers from 1 such as '2(x3),1', of at most {_MOST_HOSTS} nodes"
            raise ValueError(errors.sentence("slurm_tasks_per_node", "text", repr(text), rule, f"{part!r} is not."))
        tasks += [number] * times
    return tasks


def _wrong(nodelist: str, expected: str, evidence: str) -> ValueError:
    shown = nodelist if len(nodelist) <= 200 else nodelist[:200] + "..."
    return ValueError(errors.sentence("slurm_hostnames", "nodelist", repr(shown), expected, evidence))


def _entries(nodelist: str) -> list[str]:
    """Split at commas outside brackets. Blanks separate as well, as in scontrol."""
    rest = _ENTRY.sub("", nodelist)
    entries = _ENTRY.findall(nodelist)
    if left := re.sub(r"[,\s]", "", rest):
        raise _wrong(nodelist, "brackets in pairs, none inside another", f"{left[0]!r} has no partner.")
    if not entries:
        raise _wrong(nodelist, "at least one host name", "Is this inside a Slurm allocation?")
    return entries


def _numbers(nodelist: str, bracket: str) -> list[str]:
    """Expand the content of one bracket to strings of digits."""
    numbers: list[str] = []
    for part in bracket.split(","):
        found = _RANGE.fullmatch(part)
        if not found:
            raise _wrong(nodelist, "numbers and ranges such as [01-03,7] in brackets", f"{part!r} is neither.")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise _wrong(nodelist, "ascending ranges", f"{part!r} is descending.")
        if last - first >= _MOST_HOSTS - len(numbers):
            raise _wrong(nodelist, f"at most {_MOST_HOSTS} hosts", f"[{bracket}] has more.")
        numbers += [f"{number:0{len(found[1])}d}" for number in range(first, last + 1)]
    return numbers


def _choices(brackets: list[list[str]]) -> list[tuple[str, ...]]:
    """All combinations of one number per bracket, in scontrol's order.

    scontrol removes the last bracket, and expands the remaining text by its own last bracket first.
    """
    *front, last = brackets or [[""]]
    return [(*reversed(numbers), number) for *numbers, number in itertools.product(*reversed(front), last)]


def _join(texts: list[str], numbers: tuple[str, ...]) -> str:
    return "".join(itertools.chain.from_iterable(itertools.zip_longest(texts, numbers, fillvalue="")))
