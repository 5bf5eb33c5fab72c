"""The world that these tests run in, as DISTPAD_WORLD says (tests/worlds.py)."""

from __future__ import annotations

import os

import pytest

import replica_world


@pytest.fixture(scope="session", autouse=True)  # before any test runs an operation: a strategy must be made first
def world() -> replica_world.World:
    return replica_world.made()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "worlds(names): it runs in these by default, and in others under --all")


@pytest.hookimpl(tryfirst=True)  # before those that are wide are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What one engine shows for all, or shows alone, is wide in the others. Under --all, what takes long runs in the
    worlds that its module names in WORLDS, one of each engine; with -k, in any; a test of the core everywhere."""
    here = os.environ.get("DISTPAD_WORLD", "local")
    elsewhere = []
    for item in items:
        mark = item.get_closest_marker("worlds")
        if mark and here not in mark.args:
            item.add_marker("wide")
        if here not in getattr(item.module, "WORLDS", (here,)) and not item.get_closest_marker("core"):
            elsewhere.append(item)
    if elsewhere and not config.getoption("keyword"):
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]
