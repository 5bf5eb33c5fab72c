"""Reader: reads a worker's examples in a thread, one window of steps ahead of the training."""

from __future__ import annotations

import contextlib
import hashlib
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from distpad import errors
from distpad.data import plan
from distpad.data.config import Config
from distpad.data.schema import Features, Name, Row
from distpad.data.sources import Step


class MicroBatch(NamedTuple):
    """A step whose examples were read and checked: a list item for each replica of this worker.

    Attributes:
      indices: the example index of each row.
      local: the replica's tokens and sequences, ``[replicas, losses, 2]``.
    """

    batch_size: int
    rows: list[list[Row]]
    indices: list[np.ndarray]
    local: np.ndarray


class Window(NamedTuple):
    """The steps that were read for a window, and the error that ended the reading.

    Attributes:
      digest: hash of the examples, 0 without examples.
      beginning: fingerprints of the epoch's first step, first two steps, and so on.
    """

    batches: list[MicroBatch]
    report: plan.Report
    features: Features | None
    digest: float
    beginning: list[float]
    error: BaseException | None

    def refused(self, error: Exception) -> Window:
        """The same window as one that failed before its first step."""
        width = self.report.longest.shape[1], self.report.tokens.shape[1]
        report = plan.Report.blank(len(self.report.rows), *width)
        report.failed_at = 0
        return self._replace(batches=[], report=report, error=error)


class Reader:
    """Reads in a thread, one window ahead of the consumer. ``close`` ends the thread.

    Args:
      steps: makes the iterator of an epoch's steps; called in the thread.
      features: the features of an example, if an earlier epoch learned them.
      beginning: computes the fingerprints of the epoch's first steps.
    """

    def __init__(
        self, steps: Callable[[], Iterator[Step]], config: Config, features: Features | None, beginning: Beginning
    ) -> None:
        self._steps, self._config, self._features, self._beginning = steps, config, features, beginning
        self._windows: queue.Queue[Window | None] = queue.Queue()  # None after the last window
        self._wanted = threading.Semaphore(1)  # windows that may be read: it bounds the memory
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="distpad-reader")
        self._thread.start()

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
        self._thread.join(limit_s)
        self._windows.put(None)

    def _run(self) -> None:
        steps: Iterator[Step] | None = None
        first = True
        try:
            while True:
                self._wanted.acquire()
                if self._stopped.is_set():
                    return
                reading = _Reading(self._config, self._features, self._beginning)
                try:
                    steps = steps if steps is not None else self._steps()
                    while not reading.is_full and (step := next(steps, None)) is not None:
                        reading.add(step)
                        if self._stopped.is_set():
                            return
                    reading.finish()
                except BaseException as error:  # also SystemExit, which would otherwise end this thread silently
                    reading.failed(error)
                self._features = reading.features
                self._windows.put(reading.window(with_digest=first))
                first = False
        finally:
            if hasattr(steps, "close"):
                with contextlib.suppress(Exception):
                    steps.close()  # type: ignore[union-attr]


class Beginning:
    """Fingerprints of an epoch's first steps, by which a saved position recognises its source.

    Args:
      worker: this worker, whose examples count in their order. None with a sampler: then the order does not count,
        because it depends on the number of workers.
      steps: the number of steps.

    Attributes:
      fingerprints: of the first step, of the first two steps, and so on.
    """

    def __init__(self, worker: int | None, steps: int) -> None:
        self.steps = steps
        self._worker = worker
        self._hashed = hashlib.blake2b(str(worker).encode(), digest_size=4)
        self.fingerprints: list[float] = []

    def add(self, rows: Sequence[Sequence[Row]], indices: Sequence[np.ndarray]) -> None:
        """Add the next step."""
        if len(self.fingerprints) == self.steps:
            return
        total = 0
        for rows_of_replica, indices_of_replica in zip(rows, indices):
            for row, index in zip(rows_of_replica, indices_of_replica):
                if self._worker is None:
                    self._hashed = hashlib.blake2b(str(index).encode(), digest_size=4)
                for array in row:
                    _hash(self._hashed, array)
                total += int.from_bytes(self._hashed.digest(), "big")
        self.fingerprints.append(float(total if self._worker is None else int.from_bytes(self._hashed.digest(), "big")))


def _hash(hashed: Any, array: np.ndarray) -> None:
    """Hash an array, equal numbers alike: the dtype of a list depends on the examples that were read before it."""
    hashed.update(repr(array.shape).encode())
    if array.dtype.kind == "O":
        hashed.update(repr([leaf.encode() if isinstance(leaf, str) else leaf for leaf in array.flat]).encode())
    else:
        hashed.update(np.ascontiguousarray(array if array.dtype.kind == "c" else array.astype(np.float64)))


class _Reading:
    """A window that is being read."""

    def __init__(self, config: Config, features: Features | None, beginning: Beginning) -> None:
        self.config, self.features, self.beginning = config, features, beginning
        self.report = plan.Report.blank(config.lookahead, len(config.axes), len(config.tokens))
        self.batches: list[MicroBatch] = []
        self.error: BaseException | None = None
        self._waiting: list[Step] = []  # steps that were read before the features are known

    @property
    def is_full(self) -> bool:
        return len(self.batches) + sum(not step.is_check for step in self._waiting) >= self.config.lookahead

    def add(self, step: Step) -> None:
        self._waiting.append(step)
        if self.features is not None or self._learn(guess=False):
            self._take_all()

    def finish(self) -> None:
        """Take the waiting steps, although no further example will complete the features."""
        self._learn(guess=True)
        self._take_all()

    def _learn(self, guess: bool) -> bool:
        examples = [example for step in self._waiting for part in step.examples for example in part]
        if self.features is None and examples:
            features = Features.learn(examples, self.config.padding, guess=guess)
            if features is not None:
                _check_counted(features, self.config)
            self.features = features
        return self.features is not None

    def _take_all(self) -> None:
        while self._waiting:
            self._take(self._waiting.pop(0))

    def _take(self, step: Step) -> None:
        rows = [
            [self.features.row(example, int(index)) for example, index in zip(examples, indices)]  # type: ignore[union-attr]
            for examples, indices in zip(step.examples, step.indices)
        ]
        self.beginning.add(rows, step.indices)
        if step.is_check:
            return
        at = len(self.batches)
        local = np.zeros([len(rows), len(self.config.tokens), 2])
        for replica, (rows_of_replica, indices) in enumerate(zip(rows, step.indices)):
            for row, index in zip(rows_of_replica, indices):
                local[replica] += self._count(at, row, int(index))
        self.report.tokens[at], self.report.sequences[at] = local.sum(axis=0).T
        self.report.rows[at] = sum(map(len, rows))
        self.batches.append(MicroBatch(step.batch_size, rows, step.indices, local))

    def failed(self, error: BaseException) -> None:
        try:
            self.finish()
        except Exception as earlier:  # in a step before the one that failed
            error = earlier
        at = len(self.batches)
        for table in (self.report.longest, self.report.tokens, self.report.sequences, self.report.rows):
            table[at:] = 0  # a step that was read in part
        self.report.failed_at, self.error = at, error

    def window(self, with_digest: bool) -> Window:
        digest = _digest(self.batches) if with_digest else 0.0
        return Window(self.batches, self.report, self.features, digest, [*self.beginning.fingerprints], self.error)

    def _count(self, at: int, row: Row, index: int) -> np.ndarray:
        """Report an example's sizes; return its tokens, and 1 if it has tokens, ``[losses, 2]``."""
        assert self.features is not None
        arrays = dict(zip(self.features.names, row))
        sizes = [arrays[name].shape[axis] for name, axis in self.config.axes]
        try:
            self.config.check_sizes(sizes)
        except ValueError as error:
            raise ValueError(f"{error} (example {index})") from None
        np.maximum(self.report.longest[at], sizes, out=self.report.longest[at])
        counted = np.zeros([len(self.config.tokens), 2])
        for i, (loss, name) in enumerate(self.config.tokens.items()):
            weights = self.config.weights.get(loss)
            counted_sizes = tuple(arrays[name].shape[axis] for axis in self.config.counted_axes(name))
            total = float(math.prod(counted_sizes))
            if weights is not None:
                total = _weight(arrays[weights], counted_sizes, weights, index)
            counted[i] = total, total > 0
        return counted


def _weight(weights: np.ndarray, sizes: tuple[int, ...], name: Name, index: int) -> float:
    """The sum of an example's weights over its positions; ``sizes`` are those of the counted feature's axes."""
    if weights.ndim == 0:
        total = float(weights) * math.prod(sizes)
    elif weights.shape == sizes:
        total = float(weights.astype(np.float64).sum())
    else:
        given, wanted = f"of shape {weights.shape} in example {index}", f"{sizes}, the shape of the counted feature"
        raise ValueError(_sentence(f"weights {name!r}", given, wanted))
    if not (np.isfinite(total) and (weights >= 0).all()):
        found = f"of sum {total:g} in example {index}"
        raise ValueError(_sentence(f"weights {name!r}", found, "finite, non-negative numbers"))
    return total


def _check_counted(features: Features, config: Config) -> None:
    """Check that weights are features of numbers, with one value per position or per example."""
    known = {feature.name: feature for feature in features.features}
    for loss, name in config.weights.items():
        if name not in known:
            raise ValueError(_sentence("weights", repr(name), f"a feature of an example: {features.names}"))
        found, axes = known[name], config.counted_axes(config.tokens[loss])
        if len(found.shape) not in (0, len(axes)) or found.dtype.kind not in "fiub":
            wanted = "numbers, one per position or one per example"
            raise ValueError(_sentence(f"weights {name!r}", f"of shape {found.shape} and {found.dtype}", wanted))


def _digest(batches: Sequence[MicroBatch]) -> float:
    """A hash of the examples, in order; 0 without examples."""
    digest = hashlib.blake2b(digest_size=6)
    empty = True
    for batch in batches:
        for array in (array for part in batch.rows for row in part for array in row):
            digest.update(repr(array.shape).encode())
            digest.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
            empty = False
    return 0.0 if empty else float(int.from_bytes(digest.digest(), "big"))


def _sentence(argument: str, value: Any, rule: str, *more: str) -> str:
    return errors.sentence("PaddedBatches", argument, value, rule, *more)
