"""Which tests run: those marked wide where DISTPAD_TESTS=all, as tests/run.sh --all sets it, or where a command line
asks for them, by ``-m`` with that word or by their ids. And how property tests draw."""

from __future__ import annotations

import pytest

import drawn

drawn.use_profile()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is wide and was not asked for."""
    asked = "wide" in (config.getoption("markexpr") or "") or any("::" in argument for argument in config.args)
    if not drawn.ALL and not asked:
        wide = [item for item in items if item.get_closest_marker("wide")]
        config.hook.pytest_deselected(items=wide)
        items[:] = [item for item in items if item not in wide]
