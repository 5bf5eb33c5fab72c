"""How a process ends that feeds fit: a thread of tf.data that is in Python then never gets out of it, and whoever ends
its iterator, as TensorFlow does behind Python, waits for it forever."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from distpad.data import sync

_WITHIN_S = 10.0  # how long a process waits for what feeds fit, and for other workers to hear that it has left
_BACK_S = 0.2  # what a thread takes from here to TensorFlow, and back again for its next element
_NOTHING = object()

_ending = threading.Event()
_moves = threading.Condition()  # held for an instant, where a thread comes or goes
_inside = 0  # so many threads are here
_came = 0  # so often one came


def until_exit(feeds: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """What the generator that ``feeds`` makes gives, until the process ends."""
    feed: Any = feeds()
    try:
        while True:
            with _counted():
                element = _NOTHING if _ending.is_set() else next(feed, _NOTHING)
                if element is _NOTHING:
                    feed.close()  # before this thread no longer counts: it waits for other threads
                    return
            yield element
    finally:
        with _counted():
            feed.close()


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    global _inside, _came
    with _moves:
        _inside, _came = _inside + 1, _came + 1
    try:
        yield
    finally:
        with _moves:
            _inside -= 1
            _moves.notify_all()


@atexit.register
def _end() -> None:
    until = time.monotonic() + _WITHIN_S
    _ending.set()
    sync.leave_all(until)
    seen = 0
    while seen != _came and time.monotonic() < until:
        with _moves:
            _moves.wait_for(lambda: not _inside, timeout=max(0.0, until - time.monotonic()))
            seen = _came
        time.sleep(_BACK_S)
