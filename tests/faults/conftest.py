"""The table that a run of these tests ends with: one row per fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest

HEAD = ("fault", "engine", "what happened", "seconds")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--chaos-rounds", type=int, default=5, help="faults of test_chaos.py")
    group.addoption("--chaos-jobs", type=int, default=1, help="jobs of test_chaos.py, which share the rounds")
    group.addoption("--chaos-seed", type=int, default=0, help="which faults test_chaos.py draws, and when")
    group.addoption("--soak-minutes", type=float, default=1.0, help="how long test_soak.py trains")


FOUND: list[tuple[str, ...]] = []


@pytest.fixture
def record_fault(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record_fault(fault, engine, what happened, seconds)`` adds a row to the table, also if the test then fails."""

    def record(fault: str, engine: str, happened: str, seconds: float) -> None:
        # a property of the test travels with its report, also from a process of pytest-xdist
        request.node.user_properties.append(("fault", (fault, engine, happened, f"{seconds:.1f}")))

    return record


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":  # the report of each test that comes last, and has all its properties
        FOUND.extend(tuple(value) for name, value in report.user_properties if name == "fault")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, the rows of one engine together."""
    if not FOUND:
        return
    rows = [HEAD, *sorted(FOUND, key=lambda row: (row[1], row[0]))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    terminalreporter.section("faults")
    for fault, engine, happened, seconds in rows:
        cells = fault.ljust(widths[0]), engine.ljust(widths[1]), happened.ljust(widths[2]), seconds.rjust(widths[3])
        terminalreporter.write_line("  ".join(cells))
