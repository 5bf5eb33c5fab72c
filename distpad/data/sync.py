"""WindowSync: the exchanges by which workers synchronise a window of steps, and their time limits."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from distpad import backends
from distpad.backends import messages
from distpad.data import plan
from distpad.data.config import Config
from distpad.errors import DistpadError, PeerError

_MOST = 2**26  # bytes of a text
_TEXT = 1024  # bytes of an error message that other workers receive
_LOG = logging.getLogger("distpad")
Vectors = tuple[np.ndarray, np.ndarray]


class Left(Exception):
    """Another worker has left the epoch, which has no further exchange."""


@dataclasses.dataclass(frozen=True)
class Channel:
    """A sequence of exchanges, one at a time, of all epochs of one dataset.

    Attributes:
      number: see ``Backend.host_merge``.
      handshakes: whether a handshake precedes each exchange, because workers that leave an epoch at the same step may
        have come to different exchanges.
      lock: held by the thread that makes an exchange.
    """

    number: int = 0
    handshakes: bool = False
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


class WindowSync:
    """The exchanges of one epoch. All methods are collective among workers. Channel 0 belongs to the training thread.

    A worker with a slow source does not block the others in a collective: after ``warn_after_s`` it reports that it is
    not ready. Then all workers warn, naming it, and repeat the exchange until ``limit_s`` is over.

    With ``Channel.handshakes``, each exchange begins with a handshake. A worker that leaves makes one last handshake; a
    worker that receives it raises Left. The last handshake runs in a thread, because another worker may leave much
    later, when Python's garbage collector finds its iterator. Until then the channel makes no other exchange.

    Raises (all methods): Left, if another worker has left.
    """

    def __init__(self, backend: backends.Backend, config: Config, channel: Channel) -> None:
        self.backend, self.channel = backend, channel
        self.warn_after_s, self.limit_s = config.warn_after_s, config.timeout_s
        self.seconds = 0.0  # spent in exchanges
        self._left = False
        self._leaving: threading.Thread | None = None

    def merge(
        self,
        blank: Vectors,
        ready: Callable[[float], Vectors | None],
        what: str,
        is_last: Callable[[Vectors], bool] = lambda _: False,
    ) -> Vectors:
        """Return the maximum of one vector and the sum of another over all workers.

        Args:
          blank: the vectors of a worker that is not ready, of the same lengths on all workers.
          ready: returns this worker's vectors, or None after the given number of seconds.
          what: the subject of messages, such as "steps 0 to 31".
          is_last: whether the merged vectors make this the last exchange.

        Raises:
          PeerError: another worker was not ready within the limit, or did not come to the exchange.
          DistpadError: this worker was not ready within the limit.
        """
        workers, worker = self.backend.num_workers, self.backend.worker_index
        began = time.monotonic()
        while True:
            mine = ready(min(self.warn_after_s, self.limit_s))
            late = 0.0
            if mine is None:
                mine = blank
                late = int(time.monotonic() - began) * workers + workers - worker
            given = np.concatenate([[late], mine[0]]), mine[1]
            maxima, sums = self._reduced(*given, what, lambda m, s: m[0] <= 0 and is_last((m[1:], s)))
            if maxima[0] <= 0:
                return maxima[1:], sums
            self._wait_on(int(maxima[0]), what, time.monotonic() - began)

    def broadcast_text(self, text: str | None, size: int = _TEXT, *, is_last: bool = False) -> str:
        """Return one worker's text on all workers; the other workers pass None."""
        sent = np.zeros(size)
        if text is not None:
            sent[:] = np.frombuffer(text.encode()[:size].ljust(size, b"\0"), np.uint8)
        received = self._reduced(np.zeros(1), sent, "a message", lambda *_: is_last)[1]
        with messages.checked("a text"):
            if not np.array_equal(received, received.astype(np.uint8)):
                raise ValueError("numbers that are no bytes")
        return received.astype(np.uint8).tobytes().rstrip(b"\0").decode(errors="replace")

    def gather_texts(self, text: str, *, is_last: bool = False) -> list[str]:
        """Return each worker's text, in worker order. For errors: the cost grows with the number of workers."""
        size = int(self._reduced(np.array([float(len(text.encode()))]), np.zeros(1), "a message")[0][0])
        with messages.checked("a text"):
            if not 0 <= size <= _MOST:
                raise ValueError(f"{size} bytes")
        mine, workers = self.backend.worker_index, range(self.backend.num_workers)
        return [
            self.broadcast_text(text if worker == mine else None, size, is_last=is_last and worker == workers[-1])
            for worker in workers
        ]

    def leave(self) -> None:
        """Announce to the other workers that this one leaves, unless another worker left first.

        Waits for an exchange of this worker that is in progress, but not for the other workers to leave. Announces
        nothing if the channel is not free within the limit.
        """
        if self._claim(self._patience_s):
            self._leaving = threading.Thread(target=self._announce, args=(math.inf,), daemon=True, name="distpad-leave")
            try:
                self._leaving.start()
            except (RuntimeError, MemoryError):  # no further thread: the channel must not stay locked
                self._leaving = None
                self._announce(self._patience_s)

    def exit(self, until: float) -> None:
        """Leave because the process ends: wait for the other workers until ``until``, by the monotonic clock."""
        if self._claim(max(0.0, until - time.monotonic())):
            self._announce(max(0.0, until - time.monotonic()))
        elif self._leaving:
            self._leaving.join(max(0.0, until - time.monotonic()))

    def _claim(self, limit_s: float) -> bool:
        """Whether this worker must announce that it leaves. Then it holds the channel's lock."""
        if self not in _OPEN or self._left or not self._acquire(limit_s):
            return False
        must_announce, self._left = not self._left, True
        if not must_announce:
            self.channel.lock.release()
        return must_announce

    def _announce(self, limit_s: float) -> None:
        try:
            # A worker that failed never comes. An interpreter that exits may refuse to start a thread.
            with contextlib.suppress(TimeoutError, RuntimeError):
                self.backend.host_merge(np.ones(1), np.zeros(1), limit_s, self.channel.number)
        finally:
            self.channel.lock.release()

    def end(self) -> None:
        """Mark the last exchange as done: no other worker waits at an exchange."""
        self._left = True

    def _reduced(
        self, maxima: np.ndarray, sums: np.ndarray, what: str, is_last: Callable[..., bool] = lambda *_: False
    ) -> Vectors:
        if self.channel.handshakes:
            _OPEN.add(self)
        if not self._acquire(self._patience_s):
            self._left = True  # no worker waits for this one
            raise self._timed_out(what, self._patience_s, "they have not left the previous epoch")
        try:
            if self.channel.handshakes:
                self._left = self._left or self._merged(np.zeros(1), np.zeros(1), what)[0][0] > 0
                if self._left:
                    raise Left
            found = self._merged(maxima, sums, what)
            self._left = self._left or is_last(*found)  # before a thread that waits to leave gets the lock
            return found
        finally:
            self.channel.lock.release()

    def _merged(self, maxima: np.ndarray, sums: np.ndarray, what: str) -> Vectors:
        began = time.monotonic()
        try:
            merged = self.backend.host_merge(maxima, sums, self._patience_s, self.channel.number)
            with messages.checked(what):
                sizes = [len(each) for each in merged]
                if sizes != [len(maxima), len(sums)] or not np.isfinite(np.concatenate(merged)).all():
                    raise ValueError(f"{sizes} numbers for {[len(maxima), len(sums)]}, or numbers that are not finite")
            return merged
        except TimeoutError as error:
            self._left = True  # no worker waits for this one
            raise self._timed_out(what, time.monotonic() - began, error) from error
        finally:
            self.seconds += time.monotonic() - began

    def _acquire(self, limit_s: float) -> bool:
        """Acquire the channel's lock; False if it is not free within the limit."""
        return self.channel.lock.acquire(timeout=min(limit_s, threading.TIMEOUT_MAX))

    @property
    def _patience_s(self) -> float:
        return self.limit_s + self.warn_after_s

    def _timed_out(self, what: str, waited: float, cause: Any) -> PeerError:
        return PeerError(
            f"PaddedBatches: worker {self.backend.worker_index} waited {waited:.0f} s at {what} for the other workers, "
            f"which did not come ({cause}). All workers must leave a loop at the same step, and begin epochs together; "
            "timeout_s limits the wait."
        )

    def _wait_on(self, code: int, what: str, waited: float) -> None:
        """Warn of a worker that is not ready; raise if it took too long."""
        seconds, workers_after = divmod(code - 1, self.backend.num_workers)
        slow = self.backend.num_workers - 1 - workers_after
        found = f"PaddedBatches: worker {slow} is still reading {what}, for {max(seconds, 1)} s now"
        if seconds < self.limit_s:
            _LOG.warning("%s; worker %d waits for it.", found, self.backend.worker_index)
            return
        text = f"{found}, expected less than timeout_s={self.limit_s:g} s."
        raise DistpadError(text) if slow == self.backend.worker_index else PeerError(text)


def raise_differences(window_sync: WindowSync, text: str, what: str) -> None:
    """Gather the JSON of all workers, and raise ValueError that names the differences. Collective."""
    texts = window_sync.gather_texts(text)
    with messages.checked(f"the {what}"):
        found = plan.differences(texts)
    raise ValueError(f"PaddedBatches: the workers' {what} differ, expected the same: {'; '.join(found)}.")


_OPEN: weakref.WeakSet[WindowSync] = weakref.WeakSet()  # that other workers may wait for


def leave_all(until: float) -> None:
    """Leave every open epoch because the process ends: wait until ``until``, by the monotonic clock."""
    for window_sync in sorted(_OPEN, key=lambda each: each.channel.number):  # in the same order on all workers
        window_sync.exit(until)
