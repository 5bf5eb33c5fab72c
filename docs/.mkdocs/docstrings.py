"""Docstrings as Markdown, for the pages that mkdocstrings makes."""

from __future__ import annotations

import re

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n *\S.*)*", re.MULTILINE)
ROLE = re.compile(r":math:(`[^`]+`)")
# Sections in prose: griffe would take what stands before a colon for a type.
PROSE = re.compile(r"^(?:(Returns|Yields):\s+|(Args|Attributes|Raises): +)(\S.*(?:\n +\S.*)*)", re.MULTILINE)


def as_markdown(text: str) -> str:
    """The docstring with doctests as code, which Markdown would take for quotations, and without roles of Sphinx."""
    text = DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", ROLE.sub(r"\1", text))
    return PROSE.sub(lambda found: f"**{found[1] or found[2]}:** " + re.sub(r"\n +", "\n", found[3]), text)


class Docstrings(griffe.Extension):
    """Rewrites the docstring of each object before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
