"""Data of the benchmarks: character sequences, random or from the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

VOCABULARY = 128  # ASCII; all other characters share one index
SHORTEST, LONGEST = 16, 1024


def drawn(count: int, seed: int = 0) -> list[np.ndarray]:
    """Draw random character sequences. Lengths are lognormal(5, 1), between 16 and 1024."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(5, 1, count).astype(int), SHORTEST, LONGEST)
    return [random.integers(1, VOCABULARY, size=n) for n in lengths]


def docstrings(count: int, seed: int = 0) -> list[np.ndarray]:
    """Choose random docstrings of the standard library, cut to 1024 characters.

    Raises ValueError if the library has fewer docstrings than ``count``.
    """
    found = sorted({text[:LONGEST] for text in _all_docstrings(Path(sysconfig.get_paths()["stdlib"]))})
    if len(found) < count:
        raise ValueError(
            f"docstrings: count is {count}, expected at most {len(found)}, the number in this Python's library."
        )
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    return [np.minimum([ord(c) for c in found[i]], VOCABULARY - 1) for i in chosen]


SETS = {"lognormal": drawn, "docstrings": docstrings}


def _all_docstrings(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "lib2to3"} & set(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # templates are not valid Python
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= SHORTEST:
                    yield text
