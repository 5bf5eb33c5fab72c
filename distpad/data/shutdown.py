"""Interpreter exit of a process that feeds fit.

At interpreter exit a tf.data thread blocked in a Python generator never returns, and TensorFlow, which destroys the
iterator afterwards, waits for the thread forever. So a generator ends before the interpreter exits.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from distpad.data import sync

_LIMIT_S = 10.0  # how long a process waits for its generators, and for other workers to learn that it leaves
_RETURN_S = 0.2  # how long a thread takes from a generator to TensorFlow, and back for its next element
_END = object()

_exiting = threading.Event()
_changed = threading.Condition()
_inside = 0  # threads in a generator
_entries = 0  # how often a thread entered a generator


def until_exit(make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Yield the elements of the generator that ``make`` returns, until the process exits."""
    generator: Any = make()
    try:
        while True:
            with _counted():
                element = _END if _exiting.is_set() else next(generator, _END)
                if element is _END:
                    generator.close()  # waits for other threads, so it belongs inside _counted
                    return
            yield element
    finally:
        with _counted():
            generator.close()


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    global _inside, _entries
    with _changed:
        _inside, _entries = _inside + 1, _entries + 1
    try:
        yield
    finally:
        with _changed:
            _inside -= 1
            _changed.notify_all()


@atexit.register
def _wait_for_threads() -> None:
    until = time.monotonic() + _LIMIT_S
    _exiting.set()
    sync.leave_all(until)
    seen = 0
    while seen != _entries and time.monotonic() < until:
        with _changed:
            _changed.wait_for(lambda: not _inside, timeout=max(0.0, until - time.monotonic()))
            seen = _entries
        time.sleep(_RETURN_S)
