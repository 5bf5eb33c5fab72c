"""The world of these tests, which DISTPAD_WORLD names (tests/worlds.py)."""

from __future__ import annotations

import pytest

import replica_world


@pytest.fixture(scope="session", autouse=True)  # a strategy must be made before a test runs an operation
def world() -> replica_world.World:
    return replica_world.made()
