"""One process of a world: pytest, its output kept in a file of its own, so that ranks do not write over each other."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys


def rank() -> int:
    """This process's number, as whoever started it says."""
    for name in ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return int(json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("index", 0))


def main() -> int:
    import pytest

    path = pathlib.Path(os.environ["DISTPAD_RANK_OUTPUT"]) / f"rank-{rank()}"
    with path.open("w", buffering=1) as output, contextlib.redirect_stdout(output):
        # one report for all: their tests are the same
        arguments = [word for word in sys.argv[1:] if rank() == 0 or not word.startswith("--junitxml")]
        # -x: a rank that failed a test must not start the next one's collectives against the others
        return int(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if code == 0 and "horovod.tensorflow" in sys.modules:
        sys.modules["horovod.tensorflow"].shutdown()  # together with the others, else they report a lost peer
    os._exit(code)  # engines leave threads behind that can hang an ordinary exit
