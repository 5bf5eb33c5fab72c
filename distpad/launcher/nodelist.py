"""Slurm's short forms of its environment variables, written out: node lists, and tasks per node."""

from __future__ import annotations

import itertools
import math
import re

from distpad import errors

_MOST_HOSTS = 65536  # scontrol's own limit of a range; it also keeps a mistyped list from filling the memory
_ENTRY = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")  # text and whole brackets
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_TASKS = re.compile(r"([0-9]+)(?:\(x([0-9]+)\))?")


def slurm_hostnames(nodelist: str) -> list[str]:
    """The host names of a Slurm node list, such as ``SLURM_JOB_NODELIST``, in the order of ``scontrol show hostnames``.

    Where ``scontrol`` can be asked, ask it: this is for where it cannot, as in containers. Ranks follow the order, so
    it is scontrol's also where that surprises: of several brackets the last runs fastest, as everywhere, but then the
    first, and the last but one slowest.

    Args:
        nodelist: names separated by commas; brackets hold numbers and ranges, ``a[01-03,7]``. A range's numbers are
            filled up with zeros to the width of its first. scontrol refuses text behind the last bracket; this does
            not.

    Returns:
        The names; a name that is listed twice stands there twice.

    Raises:
        TypeError: it is no string.
        ValueError: it is empty or malformed, a range runs backwards, or there are more than 65536 hosts.

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
    """The numbers of tasks of each node, from ``SLURM_TASKS_PER_NODE`` or ``SLURM_STEP_TASKS_PER_NODE``.

    Args:
        text: numbers separated by commas; ``2(x3)`` stands for three nodes of two tasks each.

    Returns:
        One number a node, in the order of the node list.

    Raises:
        TypeError: it is no string.
        ValueError: it is empty or malformed, a node has no task, or there are more than 65536 nodes.

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
    """The parts between the commas that stand outside brackets. Blanks separate too, as for scontrol."""
    rest = _ENTRY.sub("", nodelist)
    entries = _ENTRY.findall(nodelist)
    if left := re.sub(r"[,\s]", "", rest):
        raise _wrong(nodelist, "brackets in pairs, none inside another", f"{left[0]!r} has no partner.")
    if not entries:
        raise _wrong(nodelist, "at least one host name", "Is this inside a Slurm allocation?")
    return entries


def _numbers(nodelist: str, bracket: str) -> list[str]:
    """What the inside of one bracket stands for, as digits."""
    numbers: list[str] = []
    for part in bracket.split(","):
        found = _RANGE.fullmatch(part)
        if not found:
            raise _wrong(nodelist, "numbers and ranges such as [01-03,7] in brackets", f"{part!r} is neither.")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise _wrong(nodelist, "ranges that run upwards", f"{part!r} runs downwards.")
        if last - first >= _MOST_HOSTS - len(numbers):
            raise _wrong(nodelist, f"at most {_MOST_HOSTS} hosts", f"[{bracket}] has more.")
        numbers += [f"{number:0{len(found[1])}d}" for number in range(first, last + 1)]
    return numbers


def _choices(brackets: list[list[str]]) -> list[tuple[str, ...]]:
    """One number of each bracket, in scontrol's order: it takes the last bracket off, and expands what is in front of
    it by its own last bracket first."""
    *front, last = brackets or [[""]]
    return [(*reversed(numbers), number) for *numbers, number in itertools.product(*reversed(front), last)]


def _join(texts: list[str], numbers: tuple[str, ...]) -> str:
    return "".join(itertools.chain.from_iterable(itertools.zip_longest(texts, numbers, fillvalue="")))
