"""Shares of the tests, for runs that take a part: see tests/conftest.py and tests/run.sh."""

from __future__ import annotations

import zlib


def has(share: str, name: str) -> bool:
    """Whether a share, such as ``"2/3"``, has the test of this name: exactly one has, the same on every machine."""
    number, of = map(int, share.split("/"))
    return zlib.crc32(name.encode()) % of == number - 1
