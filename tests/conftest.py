"""A share of the tests, where DISTPAD_SHARE asks for one, as tests/run.sh --short does: 2/3 is the second of three."""

from __future__ import annotations

import os

import pytest

import shares

WHOLE = ("smoke", "one_engine")  # marks of what is in every share


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is in another share."""
    share = os.environ.get("DISTPAD_SHARE")
    if share:
        others = [
            item for item in items if not (shares.has(share, item.nodeid) or any(map(item.get_closest_marker, WHOLE)))
        ]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
