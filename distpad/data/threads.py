"""Threads of the pipeline: waiting for a thread that has died is an error at once."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from distpad import errors

_POLL_S = 0.2  # how often a waiting thread looks whether the other threads are alive
_Item = TypeVar("_Item")


def get(items: queue.SimpleQueue[_Item], threads: Sequence[threading.Thread], limit_s: float) -> _Item:
    """Return the next item of a queue that the threads fill.

    Raises:
      DistpadError: a thread has died and left nothing in the queue.
      queue.Empty: no item within the limit.
    """
    until = time.monotonic() + limit_s
    while True:
        dead = [thread for thread in threads if not thread.is_alive()]
        try:
            return items.get(timeout=min(_POLL_S, max(0.0, until - time.monotonic())))
        except queue.Empty:
            if dead:
                raise died(dead[0]) from None
            if time.monotonic() >= until:
                raise


def died(thread: threading.Thread) -> errors.DistpadError:
    """The error for a thread that has died."""
    text = f"PaddedBatches: the thread {thread.name} has died, expected it to live as long as its epoch."
    return errors.DistpadError(text)


class Pool:
    """Threads that call functions. A call that hangs does not keep the process from exiting. ``close`` ends them.

    Raises: RuntimeError, MemoryError: a thread cannot be started.
    """

    def __init__(self, number: int) -> None:
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        try:
            for _ in range(number):
                thread = threading.Thread(target=self._run, daemon=True, name="distpad-read")
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    def call(self, function: Callable[[Any], Any], argument: Any) -> Callable[[], Any]:
        """Let a thread call the function. Returns a function that waits for its result, or raises its error."""
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._tasks.put((done, function, argument))
        return functools.partial(self._result, done)

    def _result(self, done: queue.SimpleQueue[Any]) -> Any:
        result = get(done, self._threads, float("inf"))
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """End the threads, without waiting for calls that run."""
        self._is_closed = True
        for _ in self._threads:
            self._tasks.put(None)

    def _run(self) -> None:
        for done, function, argument in iter(self._tasks.get, None):
            if self._is_closed:
                return
            try:
                done.put(function(argument))
            except BaseException as error:  # also SystemExit, which would end the thread without a result
                done.put(error)
