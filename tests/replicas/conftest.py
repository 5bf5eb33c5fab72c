"""The world that these tests run in, as DISTPAD_WORLD says (tests/worlds.py)."""

from __future__ import annotations

import os

import pytest

import replica_world


@pytest.fixture(scope="session")
def world() -> replica_world.World:
    return replica_world.made()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long runs in the worlds that its module names in WORLDS, one of each engine; with -k, in any."""
    here = os.environ.get("DISTPAD_WORLD", "local")
    elsewhere = [item for item in items if here not in getattr(item.module, "WORLDS", (here,))]
    if elsewhere and not config.getoption("keyword"):
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]
