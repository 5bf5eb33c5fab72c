"""WindowSync: what workers say to one another about a window of steps, and how long they wait for it."""

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
from distpad.data import plan
from distpad.errors import DistpadError, PeerError

_TEXT = 1024  # bytes of an error that peers are shown
_LOG = logging.getLogger("distpad")
Vectors = tuple[np.ndarray, np.ndarray]


class Left(Exception):
    """A worker has left the epoch, so that there is nothing more to agree on."""


@dataclasses.dataclass(frozen=True)
class Channel:
    """Where workers meet, one exchange after the other, whichever epoch it is of."""

    number: int = 0  # see Backend.host_merge
    handshakes: bool = False  # whether workers that leave at the same step may have come to different exchanges
    meeting: threading.Lock = dataclasses.field(default_factory=threading.Lock)


class WindowSync:
    """The exchanges of one pipeline. All methods are collective among workers; those of channel 0 are called from the
    training's thread.

    A worker whose source is slow does not keep the others in a collective: after ``warn_after_s`` it comes and says
    that it has nothing yet. Then all know its name, warn, and meet again, until ``limit_s`` is over.

    Where workers that leave at the same step may have come to different exchanges (``Channel.handshakes``), each
    begins with a handshake: who leaves comes to one more of these, and whoever meets it there goes no further. It does
    so in a thread: others may leave much later, when Python's garbage collector gets to the iterator there. Only then
    does anything else begin on this channel.

    Raises (all methods): Left, where another worker has left.
    """

    def __init__(self, backend: backends.Backend, warn_after_s: float, limit_s: float, channel: Channel) -> None:
        self.backend, self.warn_after_s, self.limit_s, self.channel = backend, warn_after_s, limit_s, channel
        self._parts = channel.handshakes
        self.seconds = 0.0  # spent in exchanges
        self._left = False
        self._telling: threading.Thread | None = None

    def merge(
        self,
        sizes: tuple[int, int],
        ready: Callable[[float], Vectors | None],
        what: str,
        is_last: Callable[[Vectors], bool] = lambda _: False,
    ) -> Vectors:
        """The maximum and the sum of the workers' vectors.

        Args:
          sizes: of the two vectors, the same on all workers.
          ready: gives this worker's vectors, or None after so many seconds.
          what: for messages, as "window 3".
          is_last: whether there is nothing more to agree on, as these vectors tell all workers.

        Raises:
          PeerError: another worker was not ready within the limit, or did not come at all.
          DistpadError: this worker was not ready within the limit.
        """
        workers, worker = self.backend.num_workers, self.backend.worker_index
        began = time.monotonic()
        while True:
            mine = ready(min(self.warn_after_s, self.limit_s))
            late = 0.0
            if mine is None:
                mine = np.zeros(sizes[0]), np.zeros(sizes[1])
                late = int(time.monotonic() - began) * workers + workers - worker
            given = np.concatenate([[late], mine[0]]), mine[1]
            maxima, sums = self._reduced(*given, what, lambda m, s: m[0] <= 0 and is_last((m[1:], s)))
            if maxima[0] <= 0:
                return maxima[1:], sums
            self._wait_on(int(maxima[0]), what, time.monotonic() - began)

    def tell(self, text: str | None, size: int = _TEXT, *, is_last: bool = False) -> str:
        """What one worker says to all; the others give None."""
        said = np.zeros(size)
        if text is not None:
            said[:] = np.frombuffer(text.encode()[:size].ljust(size, b"\0"), np.uint8)
        heard = self._reduced(np.zeros(1), said, "a message", lambda *_: is_last)[1]
        return heard.astype(np.uint8).tobytes().rstrip(b"\0").decode(errors="replace")

    def gather(self, text: str) -> list[str]:
        """What each worker says, for errors alone: its size grows with the number of workers."""
        longest = int(self._reduced(np.array([float(len(text.encode()))]), np.zeros(1), "a message")[0][0])
        mine = self.backend.worker_index
        return [self.tell(text if worker == mine else None, longest) for worker in range(self.backend.num_workers)]

    def leave(self) -> None:
        """Tell the others of it, who may have come to an exchange already; not where one of them was first. Waits for
        the exchange that this worker is at, not for the others to leave; and not where the channel is not free within
        the limit."""
        if self._is_leaving(self._patience_s):
            self._telling = threading.Thread(target=self._tell_all, args=(math.inf,), daemon=True, name="distpad-leave")
            self._telling.start()

    def exit(self, until: float) -> None:
        """As ``leave``, when the process ends: wait for the others to hear of it until then, by the monotonic clock."""
        if self._is_leaving(max(0.0, until - time.monotonic())):
            self._tell_all(max(0.0, until - time.monotonic()))
        elif self._telling:
            self._telling.join(max(0.0, until - time.monotonic()))

    def _is_leaving(self, limit_s: float) -> bool:
        """Whether the others are to be told. Then the channel is this worker's, until they were."""
        if self not in _MET or self._left or not self._alone(limit_s):
            return False
        leaving, self._left = not self._left, True
        if not leaving:
            self.channel.meeting.release()
        return leaving

    def _tell_all(self, limit_s: float) -> None:
        try:
            # who failed never comes; and a Python that ends may start no thread any more
            with contextlib.suppress(TimeoutError, RuntimeError):
                self.backend.host_merge(np.ones(1), np.zeros(1), limit_s, self.channel.number)
        finally:
            self.channel.meeting.release()

    def end(self) -> None:
        """There is nothing more to agree on, and no other worker is at an exchange."""
        self._left = True

    def _reduced(
        self, maxima: np.ndarray, sums: np.ndarray, what: str, is_last: Callable[..., bool] = lambda *_: False
    ) -> Vectors:
        if self._parts:
            _MET.add(self)
        if not self._alone(self._patience_s):
            self._left = True  # there is nobody to leave
            raise self._in_vain(what, self._patience_s, "they have not left the epoch before")
        try:
            if self._parts:
                self._left = self._left or self._merged(np.zeros(1), np.zeros(1), what)[0][0] > 0
                if self._left:
                    raise Left
            found = self._merged(maxima, sums, what)
            self._left = self._left or is_last(*found)  # before a thread that waits to leave gets the lock
            return found
        finally:
            self.channel.meeting.release()

    def _merged(self, maxima: np.ndarray, sums: np.ndarray, what: str) -> Vectors:
        began = time.monotonic()
        try:
            return self.backend.host_merge(maxima, sums, self._patience_s, self.channel.number)
        except TimeoutError as error:
            self._left = True  # there is nobody to leave
            raise self._in_vain(what, time.monotonic() - began, error) from error
        finally:
            self.seconds += time.monotonic() - began

    def _alone(self, limit_s: float) -> bool:
        """Whether the channel is this thread's now, and not still another's when the limit was over."""
        return self.channel.meeting.acquire(timeout=min(limit_s, threading.TIMEOUT_MAX))

    @property
    def _patience_s(self) -> float:
        return self.limit_s + self.warn_after_s

    def _in_vain(self, what: str, waited: float, why: Any) -> PeerError:
        return PeerError(
            f"PaddedBatches: worker {self.backend.worker_index} waited {waited:.0f} s at {what} "
            f"for the other workers, in vain ({why}). All workers must leave a loop at the same step, and begin "
            "epochs together; timeout_s says how long to wait."
        )

    def _wait_on(self, code: int, what: str, waited: float) -> None:
        """Warn of a worker that is not ready; raise where it took too long."""
        seconds, behind = divmod(code - 1, self.backend.num_workers)
        slow = self.backend.num_workers - 1 - behind
        found = f"PaddedBatches: worker {slow} is still reading {what}, for {max(seconds, 1)} s now"
        if seconds < self.limit_s:
            _LOG.warning("%s; worker %d waits for it.", found, self.backend.worker_index)
            return
        text = f"{found}, expected less than timeout_s={self.limit_s:g} s."
        raise DistpadError(text) if slow == self.backend.worker_index else PeerError(text)


def raise_differences(agreement: WindowSync, text: str, what: str) -> None:
    """Where fingerprints differ: show all workers' texts to all, and raise what differs and where. Collective."""
    found = plan.differences(agreement.gather(text))
    raise ValueError(f"PaddedBatches: the workers' {what} differ, expected the same: {'; '.join(found)}.")


_MET: weakref.WeakSet[WindowSync] = weakref.WeakSet()  # those that other workers may wait for


def leave_all(until: float) -> None:
    """Where the process ends and iterators were not closed: tell the others, until then by the monotonic clock."""
    for agreement in sorted(_MET, key=lambda met: met.channel.number):  # in the same order on all workers
        agreement.exit(until)
