"""A share of the tests, where DISTPAD_SHARE asks for one, as tests/run.sh --short does: 2/3 is the second of three."""

from __future__ import annotations

import os

import pytest

import shares


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is in another share. One job by each launcher (the mark smoke) is in all of them."""
    share = os.environ.get("DISTPAD_SHARE")
    if not share:
        return
    others = [item for item in items if not shares.has(share, item.nodeid) and not item.get_closest_marker("smoke")]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
