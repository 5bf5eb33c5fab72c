"""How many examples property tests draw: by default few and always the same, under tests/run.sh --all many others."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

ALL = os.environ.get("DISTPAD_TESTS") == "all"
LEAST = 25


def use_profile() -> None:
    """Make it what hypothesis does where a test says nothing else: nowhere is a test held to how fast a machine is."""
    settings.register_profile(
        "distpad",
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize=not ALL,
        max_examples=100 if ALL else LEAST,
        print_blob=True,
    )
    settings.load_profile("distpad")


def examples(count: int) -> settings:
    """For a test that draws this many under --all, and by default a fifth of them."""
    return settings(max_examples=count if ALL else max(LEAST, count // 5))
