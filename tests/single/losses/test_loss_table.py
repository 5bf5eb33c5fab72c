"""benchmarks/losses.md lists the tested losses of both stacks, each within the limits of its dtype."""

from __future__ import annotations

import pytest

import every_loss
import loss_table

LIMITS = (1e-12, 1e-5)


@pytest.mark.parametrize("stack", loss_table.STACKS)
def test_each_loss_has_a_line_and_is_exact(stack):
    rows = [line.strip("| ").split(" | ") for line in loss_table.parts(loss_table.FILE.read_text())[stack].splitlines()]
    head, _, *rows = rows
    assert tuple(head[1:]) == loss_table.WORLDS
    assert [row[0] for row in rows] == list(every_loss.CASES), "run tests/loss_table.py with both stacks"
    for name, *cells in rows:
        dtypes = every_loss.CASES[name].dtypes
        for cell in cells:
            if every_loss.missing(name, stack == "current"):
                assert cell == every_loss.missing(name, stack == "current")
                continue
            for found, limit, dtype in zip(cell.split(" / "), LIMITS, ("float64", "float32")):
                assert found == "-" if dtype not in dtypes else float(found) <= limit
