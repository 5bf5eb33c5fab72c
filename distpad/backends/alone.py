"""One device beside the engine: runs a function as if this process were the only one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_HERE = threading.local()


def run_alone(function: Callable[[], Any]) -> Any:
    """Call ``function()`` on one device: no strategy is in scope, and every backend resolves to the local one.

    The function runs in a new thread, since a strategy's scope belongs to a thread and has no public way out. distpad
    makes no collective; a call of Horovod inside the function still reaches all ranks.

    Returns:
      The result of the function, whose errors it raises.

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
    """Whether the caller runs inside ``run_alone``."""
    return getattr(_HERE, "alone", False)
