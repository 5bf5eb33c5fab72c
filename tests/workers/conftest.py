"""The world that these tests run in, as DISTPAD_WORLD says (tests/worlds.py)."""

from __future__ import annotations

import pytest

import replica_world


@pytest.fixture(scope="session")
def world() -> replica_world.World:
    return replica_world.made()
