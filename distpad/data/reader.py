"""Reader: reads a worker's examples in a thread, one window of steps ahead of the training."""

from __future__ import annotations

import atexit
import collections
import contextlib
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy as np

from distpad import errors
from distpad.data import chunks, measures, plan
from distpad.data.config import Config
from distpad.data.fingerprints import Beginning, Digest
from distpad.data.schema import Features
from distpad.data.steps import Step
from distpad.data.structure import Name
from distpad.padding.columns import Column

_EXIT_S = 5.0  # how long a process that ends waits for a thread in the user's source


class MicroBatch(NamedTuple):
    """A step whose examples were read and checked.

    Attributes:
      columns: of each feature, the rows of all replicas of this worker; none without rows.
      bounds: the first row of each replica, and the row after its last.
      indices: the example indices of each replica.
      sizes: of the ragged axes of each padded feature, ``[rows, axes]``.
      local: the replica's tokens and sequences, ``[replicas, losses, 2]``.
      lost: the positions that each example lost by truncation, ``[rows]``.
    """

    batch_size: int
    columns: list[Column]
    bounds: list[tuple[int, int]]
    indices: list[np.ndarray]
    sizes: dict[Name, np.ndarray]
    local: np.ndarray
    lost: np.ndarray


class Window(NamedTuple):
    """The steps that were read for a window, and the error that ended the reading.

    Attributes:
      compared: the fingerprint of the steps that were read for comparison with a saved position.
    """

    batches: list[MicroBatch]
    report: plan.Report
    features: Features | None
    compared: float
    error: BaseException | None

    def refused(self, error: Exception) -> Window:
        """The same window as one that failed before its first step."""
        report = plan.Report.blank(*self.report.shape)
        report.failed_at = 0
        return self._replace(batches=[], report=report, error=error)


class Reader:
    """Reads an epoch in a thread, one window ahead of the consumer. ``close`` ends the thread.

    Args:
      steps: makes the iterator of the epoch's steps; called in the thread.
      features: the features of an example, if an earlier epoch learned them.
      beginning: computes the fingerprints of the epoch's first steps.
      digest: computes the hash of the first examples, or None if it is not compared.
      waits: whether the epoch has not begun. Then the thread ends after the first window, until ``begin``.
      at_end: called once, when the last window was read without an error and the epoch has begun.
    """

    def __init__(
        self,
        steps: Callable[[], Iterator[Step]],
        config: Config,
        features: Features | None,
        beginning: Beginning,
        digest: Digest | None,
        *,
        waits: bool = False,
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._steps, self._config, self._features = steps, config, features
        self.beginning, self._digest, self._at_end = beginning, digest, at_end
        self._windows: queue.Queue[Window | None] = queue.Queue()  # None after the last window
        self._wanted = threading.Semaphore(1)  # windows that may be read: it bounds the memory
        self._waits, self._is_idle, self._has_ended, self._lock = waits, False, False, threading.Lock()
        self._stopped = threading.Event()
        self._reads = self._read()
        _OPEN.add(self)
        self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True, name="distpad-reader")
        self._thread.start()

    def begin(self) -> None:
        """The epoch begins: read the windows after the first."""
        with self._lock:
            self._waits, is_idle = False, self._is_idle
            self._is_idle = False
            has_ended = self._has_ended
        if has_ended:
            self._at_end()
        if is_idle:
            self._thread.join()  # it has left the lock, and ends
            self._start()

    def take(self, limit_s: float) -> Window | None:
        """Return the next window; None if it is not read within ``limit_s`` seconds."""
        try:
            window = self._windows.get(timeout=min(limit_s, threading.TIMEOUT_MAX))
        except queue.Empty:
            return None
        if window is None:
            self._windows.put(None)
            raise errors.DistpadError("PaddedBatches: this loop was left, and another has begun.")
        self._wanted.release()
        return window

    def close(self, limit_s: float = 5.0) -> None:
        """End the thread. A thread that hangs in the user's source continues, but does not block interpreter exit."""
        self._stopped.set()
        self._wanted.release()
        if limit_s:
            self._thread.join(limit_s)
        if not self._thread.is_alive():
            self._reads.close()
        self._windows.put(None)

    def _run(self) -> None:
        """Read windows while they are wanted. The generator closes the source when the thread ends for good."""
        while True:
            with self._lock:
                self._is_idle = self._waits and not self._wanted.acquire(blocking=False)
                if self._is_idle:
                    return  # begin starts another thread
                has_acquired = self._waits
            if not has_acquired:
                self._wanted.acquire()
            if self._stopped.is_set() or not next(self._reads, False):
                self._reads.close()
                return

    def _end(self) -> None:
        """The last window was read. An epoch that has not begun reads no further epoch ahead."""
        with self._lock:
            is_first, self._has_ended = not self._has_ended, True
            waits = self._waits
        if is_first and not waits:
            self._at_end()

    def _read(self) -> Generator[bool, None, None]:
        """Read a window each time; whether another one may follow."""
        steps: Iterator[Step] | None = None
        waiting: collections.deque[Step] = collections.deque()  # that were read, until a window takes them
        ended: BaseException | bool = False  # the error that ended the source, or whether it has ended
        try:
            for number in itertools.count():
                reading = _Reading(self._config, number, self._features, self.beginning, self._digest, waiting)
                try:
                    steps = steps if steps is not None else self._steps()
                    while not (ended or reading.is_full):
                        step = next(steps, None)
                        ended = step is None or step.is_last
                        if step is not None:
                            reading.add(step)
                        if self._stopped.is_set():
                            return
                except BaseException as error:  # also SystemExit, which would otherwise end this thread silently
                    ended = error
                reading.finish(ended)
                self._features = reading.features
                if not reading.report.continues:
                    self._end()  # before the consumer can begin the next epoch
                self._windows.put(reading.window())
                yield True
        finally:
            if hasattr(steps, "close"):
                with contextlib.suppress(Exception):
                    steps.close()  # type: ignore[union-attr]


class Ahead:
    """Keeps the reader of the next epoch until that epoch begins."""

    def __init__(self) -> None:
        self._key: Any = None
        self._reader: Reader | None = None

    def keep(self, key: Any, reader: Reader) -> None:
        self._key, self._reader = key, reader

    def take(self, key: Any) -> Reader | None:
        """The reader that was kept with this key; one of another key is closed."""
        reader, self._reader = self._reader, None
        if reader is None or self._key == key:
            return reader
        reader.close()
        return None

    def drop(self) -> None:
        """End the reader without waiting for its thread: the garbage collector may call this in that thread."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close(0)


class _Reading:
    """A window that is being read.

    Args:
      waiting: steps that were read and not taken by a window, until the features are known.
    """

    def __init__(
        self,
        config: Config,
        number: int,
        features: Features | None,
        beginning: Beginning,
        digest: Digest | None,
        waiting: collections.deque[Step],
    ) -> None:
        self.config, self.features, self.beginning, self.digest = config, features, beginning, digest
        self._begin, self.size = config.window(number)
        self.report = plan.Report.blank(self.size, len(config.axes), len(config.tokens))
        self.batches: list[MicroBatch] = []
        self.error: BaseException | None = None
        self.compared = 0.0
        self._waiting = waiting

    @property
    def is_full(self) -> bool:
        """Whether the window has its steps; without the features, whether as many were read as a window may have."""
        steps = len(self.batches) + sum(not step.is_check for step in self._waiting)
        return steps >= (self.config.lookahead if self.features is None else self.size)

    def add(self, step: Step) -> None:
        self._waiting.append(step)
        if self.features is not None or self._learn(guess=False):
            self._take_all()

    def finish(self, ended: BaseException | bool) -> None:
        """Take the waiting steps, although no further example may complete the features.

        Args:
          ended: the error that ended the source, or whether it has ended.
        """
        try:
            self._learn(guess=True)
            self._take_all()
        except BaseException as earlier:  # in a step before the one that failed
            self._failed(earlier)
            return
        if isinstance(ended, BaseException) and not self._waiting and len(self.batches) < self.size:
            self._failed(ended)
        self.report.continues = bool(self._waiting) or ended is not True

    def _failed(self, error: BaseException) -> None:
        self.report.failed_at, self.error = len(self.batches), error

    def _learn(self, guess: bool) -> bool:
        if self.features is None and self._waiting:
            features = chunks.learn([step.rows for step in self._waiting], self.config.padding, guess=guess)
            if features is not None:
                measures.check_counted(features, self.config)
            self.features = features
        return self.features is not None

    def _take_all(self) -> None:
        while self._waiting and len(self.batches) < self.size:
            self._take(self._waiting[0])
            self._waiting.popleft()

    def _take(self, step: Step) -> None:
        indices = step.indices[0] if len(step.indices) == 1 else np.concatenate(step.indices)
        columns, lost = [], np.zeros(0, np.int64)
        if len(indices):
            assert self.features is not None, "learned from the examples"
            columns = chunks.columns_of(self.features, step.rows, indices)
            columns, lost = measures.truncated(self.features, columns, indices)
        if step.is_check:
            self.beginning.add(columns, indices)
            self.compared = self.beginning.fingerprints[-1]
            return
        named = dict(zip(self.features.names if self.features else (), columns))
        sizes = measures.sizes_of(self.config, named, indices)
        ends = [*itertools.accumulate(map(len, step.indices))]
        bounds = [*zip([0, *ends], ends)]
        local = measures.counts_of(self.config, named, sizes, indices, bounds)
        at = len(self.batches)
        self.beginning.add(columns, indices)
        if self.digest is not None and self._begin + at < self.config.lookahead:
            self.digest.add(columns, len(indices))
        self.report.longest[at] = measures.longest(sizes)
        self.report.tokens[at], self.report.sequences[at] = local.sum(axis=0).T
        self.report.rows[at] = len(indices)
        self.batches.append(MicroBatch(step.batch_size, columns, bounds, step.indices, sizes, local, lost))

    def window(self) -> Window:
        self.report.begins[:] = [self.beginning.at(self._begin + i) for i in range(self.size)]
        self.report.digest = self.digest.value if self.digest is not None else 0.0
        return Window(self.batches, self.report, self.features, self.compared, self.error)


_OPEN: weakref.WeakSet[Reader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """TensorFlow must not be left in the middle of a read by a thread that ends with the process."""
    until = time.monotonic() + _EXIT_S
    for each in list(_OPEN):
        each.close(max(0.0, until - time.monotonic()))
