"""One device beside the engine: what a step would give if this process were all there is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_HERE = threading.local()


def run_alone(function: Callable[[], Any]) -> Any:
    """Call ``function()`` as one device: no strategy is in scope, and any backend that is asked for is the local one.

    It runs in a thread of its own, since a strategy's scope belongs to a thread and has no public way out. No
    collective of distpad's; a Horovod call of the function's own still reaches all ranks.

    Returns: what the function returns, and raises what it raises.

    >>> run_alone(is_alone), is_alone()
    (True, False)
    """
    outcome: dict[str, Any] = {}

    def called() -> None:
        _HERE.alone = True
        try:
            outcome["result"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=called, name="distpad-alone", daemon=True)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def is_alone() -> bool:
    """Whether the caller is in a function that ``run_alone`` runs."""
    return getattr(_HERE, "alone", False)
