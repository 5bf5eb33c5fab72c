"""The world that these tests run in, as DISTPAD_WORLD says (tests/worlds.py)."""

from __future__ import annotations

import pytest

import replica_world


@pytest.fixture(scope="session", autouse=True)  # before any test runs an operation: a strategy must be made first
def world() -> replica_world.World:
    return replica_world.made()
