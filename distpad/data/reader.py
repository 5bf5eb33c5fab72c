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
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from distpad import errors
from distpad.data import chunks, measures, plan, threads
from distpad.data.config import Config
from distpad.data.readers import Step
from distpad.data.schema import Features
from distpad.data.structure import Name
from distpad.padding.columns import Column

_EXIT_S = 5.0  # how long a process that ends waits for a thread in the user's source


class ReplicaRows(NamedTuple):
    """A replica's rows of a step.

    Attributes:
      columns: of each feature.
      indices: the example indices.
      sizes: of the ragged axes of each padded feature, ``[rows, axes]``.
      local: the tokens and sequences, ``[losses, 2]``.
    """

    columns: list[Column]
    indices: np.ndarray
    sizes: dict[Name, np.ndarray]
    local: np.ndarray

    @classmethod
    def none(cls, config: Config) -> ReplicaRows:
        """No rows."""
        indices = np.zeros(0, np.int64)
        return cls([], indices, measures.sizes_of(config, {}, indices), np.zeros([len(config.tokens), 2]))


class MicroBatch(NamedTuple):
    """A step whose examples were read and checked.

    Attributes:
      rows: of all replicas of this worker; their ``local`` counts are ``[replicas, losses, 2]``.
      bounds: the first row of each replica, and the row after its last.
      lost: the positions that each example lost by truncation, ``[rows]``.
      skipped: the examples that were left out: the index of each, and the reason.
    """

    batch_size: int
    rows: ReplicaRows
    bounds: list[tuple[int, int]]
    lost: np.ndarray
    skipped: tuple[tuple[int, str], ...]

    def rows_of(self, replica: int) -> ReplicaRows:
        """One replica's rows."""
        begin, end = self.bounds[replica]
        columns, indices, sizes, local = self.rows
        return ReplicaRows(
            [column.between(begin, end) for column in columns],
            indices[begin:end],
            {name: table[begin:end] for name, table in sizes.items()},
            local[replica],
        )


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

    def refused(self, error: BaseException) -> Window:
        """The same window as one that failed before its first step."""
        self.report.failed_at = 0
        return self._replace(batches=[], error=error)


class Reader:
    """Reads an epoch in a thread, one window ahead of the consumer. ``close`` ends the thread.

    Args:
      steps: makes the iterator of the epoch's steps; called in the thread.
      features: the features of an example, if an earlier epoch learned them.
      prints: computes the fingerprints of the epoch's first steps.
      waits: whether the epoch has not begun. Then the thread ends after the first window, until ``begin``.
    """

    def __init__(
        self,
        steps: Callable[[], Iterator[Step]],
        config: Config,
        features: Features | None,
        prints: measures.Fingerprints,
        *,
        waits: bool = False,
    ) -> None:
        self._steps, self._config, self._features = steps, config, features
        self.prints, self._compared = prints, 0.0
        # These queues allow that the garbage collector calls close in the middle of their methods.
        self._windows: queue.SimpleQueue[Window | BaseException | None] = queue.SimpleQueue()  # at last None
        self._wanted: queue.SimpleQueue[None] = queue.SimpleQueue()  # an item for each window that may be read
        self._wanted.put(None)
        self._waits, self._is_idle, self._lock = waits, False, threading.Lock()
        self._stopped, self._taken = False, 0
        self._reads = self._read()
        _OPEN.add(self)
        self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True, name="distpad-reader")
        try:
            self._thread.start()
        except (RuntimeError, MemoryError) as error:  # take hands it to all workers
            self._windows.put(error)

    def begin(self) -> None:
        """The epoch begins: read the windows after the first."""
        with self._lock:
            self._waits = False
        if self._is_idle:
            self._is_idle = False
            self._thread.join()  # it has left the lock, and ends
            self._start()

    def take(self, limit_s: float) -> Window | None:
        """Return the next window; None if it is not read within ``limit_s`` seconds.

        If the thread has died, or could not be started, the window is one that failed before its first step.
        """
        window: Window | BaseException | None
        try:
            window = threads.get(self._windows, [self._thread], limit_s)
        except queue.Empty:
            return None
        except errors.DistpadError as died:
            window = died
        if window is None:
            self._windows.put(None)
            raise errors.DistpadError("PaddedBatches: this loop was left, and another has begun.")
        if isinstance(window, BaseException):
            report = plan.Report.blank(self._config, self._config.window(self._taken)[1])
            window = Window([], report, self._features, 0.0, None).refused(window)
        self._taken += 1
        self._wanted.put(None)
        return window

    def close(self, limit_s: float = 5.0) -> None:
        """End the thread. A thread that hangs in the user's source continues, but does not block interpreter exit."""
        self._stopped = True
        self._wanted.put(None)
        if limit_s and self._thread.is_alive():
            self._thread.join(limit_s)
        if self._is_idle or not self._thread.is_alive():
            self._end()
        self._windows.put(None)

    def _run(self) -> None:
        """Read windows while they are wanted."""
        try:
            while True:
                self._wanted.get()
                if self._stopped or not next(self._reads, False):
                    return self._end()
                with self._lock:
                    self._is_idle = is_idle = self._waits
                # The flags are set here and read in close in opposite orders: one of the two ends the reads.
                if is_idle and not self._stopped:
                    return  # begin starts another thread
        except BaseException as error:  # such as one that another thread has set in this one
            self._windows.put(error)

    def _end(self) -> None:
        """End the reads, which close the source."""
        with contextlib.suppress(ValueError):  # the other thread, of close or of _run, is doing it
            self._reads.close()

    def _read(self) -> Generator[bool, None, None]:
        """Read a window each time; whether another one may follow."""
        with contextlib.closing(self._learned()) as steps:
            for number in itertools.count():
                begin, size = self._config.window(number)
                report = plan.Report.blank(self._config, size)
                batches: list[MicroBatch] = []
                error = None
                try:
                    while report.continues and len(batches) < size:
                        step = next(steps, None)
                        report.continues = not (step is None or step.is_last)
                        if step is not None:
                            self._take(step, begin, batches, report)
                        if self._stopped:
                            return
                except BaseException as raised:  # also SystemExit, which would otherwise end this thread silently
                    report.failed_at, error = len(batches), raised
                report.begins[:] = [self.prints.at(begin + i) for i in range(size)]
                report.digest = self.prints.digest
                self._windows.put(Window(batches, report, self._features, self._compared, error))
                yield True

    def _learned(self) -> Generator[Step, None, None]:
        """Yield the steps as soon as the features are known, or when no further step may complete them."""
        steps: Any = None
        waiting: collections.deque[Step] = collections.deque()
        failed = None
        try:
            try:
                steps = self._steps()
                for step in steps:
                    if self._stopped:
                        return
                    waiting.append(step.without_unread() if self._config.skips else step)
                    is_enough = step.is_last or sum(not each.is_check for each in waiting) >= self._config.lookahead
                    self._learn(waiting, guess=is_enough)
                    while waiting and (self._features is not None or is_enough):
                        yield waiting.popleft()
            except GeneratorExit:
                raise
            except BaseException as error:  # raised after the steps before it
                failed = error
            if waiting:
                self._learn(waiting, guess=True)
            while waiting:
                yield waiting.popleft()
            if failed is not None:
                raise failed
        finally:
            with contextlib.suppress(Exception):
                steps.close()

    def _learn(self, waiting: Iterable[Step], guess: bool) -> None:
        if self._features is None:
            rows, config = [step.rows for step in waiting], self._config
            features = chunks.learn(rows, config.padding, guess=guess, skips=config.skips)
            if features is not None:
                measures.check_counted(features, self._config)
            self._features = features

    def _take(self, step: Step, begin: int, batches: list[MicroBatch], report: plan.Report) -> None:
        """Check and measure the next step of the window that begins at step ``begin``."""
        try:
            made = self._measured(step)
        except MemoryError:
            raise
        except Exception:
            if not self._config.skips:
                raise
            step = step.without(self._misfits(step))
            made = self._measured(step)
        columns, indices, at = made.rows.columns, step.indices, len(batches)
        if step.is_check:
            self.prints.add(columns, indices, compares=False)
            self._compared = self.prints.begins[-1]
            return
        self.prints.add(columns, indices, compares=begin + at < self._config.lookahead)
        report.longest[at] = measures.longest(made.rows.sizes)
        report.tokens[at], report.sequences[at] = made.rows.local.sum(axis=0).T
        report.rows[at], report.skipped[at] = len(indices), len(step.skipped)
        batches.append(made)

    def _measured(self, step: Step) -> MicroBatch:
        """The step's examples, checked and measured. Raises: ValueError, TypeError: an example that does not fit."""
        indices, columns, lost = step.indices, list[Column](), np.zeros(0, np.int64)
        if len(indices):
            assert self._features is not None, "learned from the examples"
            columns = chunks.columns_of(self._features, step.rows, indices)
            columns, lost = measures.truncated(self._features, columns, indices)
        named = dict(zip(self._features.names if self._features else (), columns))
        sizes = measures.sizes_of(self._config, named, indices)
        ends = [*itertools.accumulate(step.counts)]
        bounds = [*zip([0, *ends], ends)]
        local = measures.counts_of(self._config, named, sizes, indices, bounds)
        rows = ReplicaRows(columns, indices, sizes, local)
        return MicroBatch(step.batch_size, rows, bounds, lost, step.skipped)

    def _misfits(self, step: Step) -> dict[int, Exception]:
        """The rows of a step that do not fit, and why."""
        found: dict[int, Exception] = {}
        for row in range(len(step.indices)):
            try:
                self._measured(step.only([row]))
            except Exception as error:
                found[row] = error
        return found


_OPEN: weakref.WeakSet[Reader] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """TensorFlow must not be left in the middle of a read by a thread that ends with the process."""
    until = time.monotonic() + _EXIT_S
    for each in list(_OPEN):
        each.close(max(0.0, until - time.monotonic()))
