"""Write the errors that tests/replicas/test_every_loss.py finds, in each engine, into benchmarks/losses.md.

    .envs/current/bin/python tests/loss_table.py
    .envs/classic/bin/python tests/loss_table.py

Each renews the part of its own stack, and takes about five minutes.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
import tempfile

import every_loss
import worlds

FILE = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "losses.md"
WORLDS = ("local", "onedevice", "mirrored:4", "multiworker:2", "horovod:2", "mpirun:2")
STACK = "current" if every_loss.IS_KERAS_3 else "classic"
STACKS = {"current": "TensorFlow 2.21, Keras 3", "classic": "TensorFlow 2.15, Keras 2, TensorFlow Addons 0.23"}
HEAD = """# Losses, each exact

For each loss under `DistributedLoss`: the largest relative error of a gradient, max|g - g*| / max|g*| of a variable on
any replica, in float64 / in float32. g* is of one device that is shown each row alone, cut to its length. The rows of
the replicas differ in number and in length; the model's output is NaN where they are padded. Allowed are 1e-12 and
1e-5.

Written by `python tests/loss_table.py`, which runs `tests/replicas/test_every_loss.py`; the tests run it in these
engines and in more. `-`: it computes in float32 alone.
"""


def measure(spec: str) -> dict[str, float]:
    """The errors in one engine, by "name|dtype"."""
    with tempfile.TemporaryDirectory() as folder:
        code = worlds.run(spec, ["-k", "test_every_loss and True"], DISTPAD_LOSS_TABLE=folder, DISTPAD_TESTS="all")
        if code:
            sys.exit(f"loss_table: the tests fail in {spec}, exit code {code}")
        (found,) = pathlib.Path(folder).iterdir()
        return json.loads(found.read_text())


def section(errors: dict[str, dict[str, float]]) -> str:
    """One stack's table."""
    lines = [f"| loss | {' | '.join(errors)} |", f"|---|{'---|' * len(errors)}"]
    for name in every_loss.CASES:
        cells = []
        for found in errors.values():
            both = [found.get(f"{name}|{dtype}") for dtype in ("float64", "float32")]
            shown = ["-" if error is None else f"{error:.0e}" for error in both]
            cells.append(" / ".join(shown) if any(both) else every_loss.missing(name))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parts(text: str) -> dict[str, str]:
    """The tables by stack."""
    found = re.split(r"^## (\w+):.*$", text, flags=re.MULTILINE)[1:]
    return {name: table.strip() for name, table in zip(found[::2], found[1::2])}


def main() -> None:
    tables = parts(FILE.read_text()) if FILE.exists() else {}
    tables[STACK] = section({spec: measure(spec) for spec in WORLDS})
    made = [f"## {stack}: {what}\n\n{tables[stack]}\n" for stack, what in STACKS.items() if stack in tables]
    FILE.write_text("\n".join([HEAD, *made]))


if __name__ == "__main__":
    main()
