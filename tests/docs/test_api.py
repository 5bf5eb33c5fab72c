"""docs/api.md documents each public name once, where it is defined. Read, not imported: TensorFlow takes seconds."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

import distpad

pytestmark = pytest.mark.one_stack

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTED = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)


def body_of(module: str) -> list[ast.stmt]:
    return ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")).body


def test_every_public_name_is_documented_once():
    bodies = (body_of(f"distpad.{module}.__init__") for module in ("layers", "metrics"))
    lists = [line.value for body in bodies for line in body if isinstance(line, ast.Assign)]
    public = {*distpad.__all__, *(name for each in lists for name in ast.literal_eval(each))}
    public -= {"backends", "layers", "metrics"}
    assert len(lists) == 2
    names = [path.rpartition(".")[2] for path in DOCUMENTED]
    assert len(names) == len(set(names)) and public <= set(names)


@pytest.mark.parametrize("path", DOCUMENTED)
def test_documented_names_are_defined_there(path):
    module, _, name = path.rpartition(".")
    assert name in {getattr(line, "name", "") for line in body_of(module)}
