"""Every message that docs/troubleshooting.md quotes is a string of the product, read without running it."""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Iterator, Mapping

import pytest

from distpad import errors

pytestmark = pytest.mark.one_stack

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### (.+)$", PAGE, re.MULTILINE)


def text_of(node: ast.AST, constants: Mapping[str, str]) -> str:
    """A string expression, with "..." for each value that is not a constant of the module."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, constants)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, constants) + text_of(node.right, constants)
    return constants.get(node.id, "...") if isinstance(node, ast.Name) else "..."


def messages_of(source: str) -> Iterator[str]:
    """The strings of a module, and the sentences that distpad.errors makes of those that are its arguments."""
    tree = ast.parse(source)
    constants = {
        statement.targets[0].id: statement.value.value
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    }
    for node in ast.walk(tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called.lstrip("_").replace("errors.", "") in ("sentence", "require"):
            parts = [*["..."] * called.startswith("_"), *(text_of(argument, constants) for argument in node.args)]
            if called.endswith("require"):  # whose second argument is the condition
                del parts[1]
            if len(parts) >= 4:  # not a function of the same name
                yield errors.sentence(*parts)
        elif isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
            yield text_of(node, constants)


MESSAGES = {
    message
    for path in sorted((ROOT / "distpad").rglob("*.py"))
    for message in messages_of(path.read_text(encoding="utf-8"))
    if " " in message
}


@pytest.mark.parametrize("heading", HEADINGS)
def test_quoted_messages_exist(heading):
    quoted = re.fullmatch("`(.+)`", heading)
    assert quoted, "a heading of the third level is one message in backticks"
    assert any(quoted[1] in message for message in MESSAGES)


def test_many_messages_are_quoted_once_each():
    assert len(HEADINGS) == len(set(HEADINGS)) >= 25


def test_a_message_is_found_as_it_is_written():
    source = '_NAME = "f"\nraise ValueError(f"{_NAME}: {a} has " "no end" + b)\nerrors.sentence(_NAME, "x", 1, rule)'
    source += '\nerrors.require(_NAME, ok, "y", 2, rule)\n_require(ok, "z", 3, rule)'
    expected = {
        "f: ... has no end...",
        "f: x is 1, expected ....",
        "f: y is 2, expected ....",
        "...: z is 3, expected ....",
    }
    assert expected <= {*messages_of(source)}
