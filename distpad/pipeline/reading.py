"""Reading ahead: a worker's examples, one window of steps at a time, in a thread beside the training."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from distpad import errors
from distpad.pipeline import plan
from distpad.pipeline.features import Features, Name, Row
from distpad.pipeline.recipe import Recipe
from distpad.pipeline.sources import Step


class MicroBatch(NamedTuple):
    """A step whose examples were read and checked; for each replica of this worker."""

    batch_size: int
    rows: list[list[Row]]
    places: list[np.ndarray]


class Window(NamedTuple):
    """What was read of a window: no more steps than there were, and the error that ended it."""

    batches: list[MicroBatch]
    report: plan.Report
    features: Features | None
    digest: float  # of its examples; 0 where it has none
    error: BaseException | None

    def refused(self, error: Exception) -> Window:
        """A window that failed before its first step."""
        width = self.report.longest.shape[1], self.report.tokens.shape[1]
        report = plan.Report.blank(len(self.report.rows), *width)
        report.failed_at = 0
        return self._replace(batches=[], report=report, error=error)


class Reader:
    """Reads one window ahead of what was taken, in a thread that ends with ``close``.

    Args:
      steps: of one epoch; made in the thread.
      features: of the examples where they are known from an earlier epoch.
    """

    def __init__(self, steps: Callable[[], Iterator[Step]], recipe: Recipe, features: Features | None) -> None:
        self._steps, self._recipe, self._features = steps, recipe, features
        self._windows: queue.Queue[Window | None] = queue.Queue()  # None behind the last that will come
        self._wanted = threading.Semaphore(1)  # windows that may be read: the bound of the memory
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="distpad-reader")
        self._thread.start()

    def take(self, limit_s: float) -> Window | None:
        """The next window; None where it is not read within ``limit_s`` seconds."""
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
        """End the thread. One that hangs in the user's source cannot be ended, and does not keep Python from it."""
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
                reading = _Reading(self._recipe, self._features)
                try:
                    steps = steps if steps is not None else self._steps()
                    for step in itertools.islice(steps, self._recipe.lookahead):
                        reading.add(step)
                        if self._stopped.is_set():
                            return
                    reading.finish()
                except BaseException as error:  # also SystemExit: nobody else would hear of it
                    reading.failed(error)
                self._features = reading.features
                self._windows.put(reading.window(with_digest=first))
                first = False
        finally:
            if hasattr(steps, "close"):
                with contextlib.suppress(Exception):
                    steps.close()  # type: ignore[union-attr]


class _Reading:
    """A window in the making."""

    def __init__(self, recipe: Recipe, features: Features | None) -> None:
        self.recipe, self.features = recipe, features
        self.report = plan.Report.blank(recipe.lookahead, len(recipe.axes), len(recipe.tokens))
        self.batches: list[MicroBatch] = []
        self.error: BaseException | None = None
        self._waiting: list[Step] = []  # whose examples do not tell yet what all are like

    def add(self, step: Step) -> None:
        self._waiting.append(step)
        if self.features is not None or self._learn(guess=False):
            self._take_all()

    def finish(self) -> None:
        """Take the steps that wait, although nothing more is to come."""
        self._learn(guess=True)
        self._take_all()

    def _learn(self, guess: bool) -> bool:
        examples = [example for step in self._waiting for part in step.examples for example in part]
        if self.features is None and examples:
            features = Features.learn(examples, self.recipe.padding, guess=guess)
            if features is not None:
                _check_counted(features, self.recipe)
            self.features = features
        return self.features is not None

    def _take_all(self) -> None:
        while self._waiting:
            self._take(self._waiting.pop(0))

    def _take(self, step: Step) -> None:
        rows = [
            [self.features.row(example, int(place)) for example, place in zip(part, places)]  # type: ignore[union-attr]
            for part, places in zip(step.examples, step.places)
        ]
        at = len(self.batches)
        for row, place in zip((row for part in rows for row in part), np.concatenate(step.places)):
            self._count(at, row, int(place))
        self.report.rows[at] = sum(map(len, rows))
        self.batches.append(MicroBatch(step.batch_size, rows, step.places))

    def failed(self, error: BaseException) -> None:
        try:
            self.finish()
        except Exception as earlier:  # of a step before the one that failed
            error = earlier
        at = len(self.batches)
        for table in (self.report.longest, self.report.tokens, self.report.sequences, self.report.rows):
            table[at:] = 0  # of a step that was read in part
        self.report.failed_at, self.error = at, error

    def window(self, with_digest: bool) -> Window:
        digest = _digest(self.batches) if with_digest else 0.0
        return Window(self.batches, self.report, self.features, digest, self.error)

    def _count(self, at: int, row: Row, place: int) -> None:
        assert self.features is not None
        arrays = dict(zip(self.features.names, row))
        sizes = [arrays[name].shape[axis] for name, axis in self.recipe.axes]
        try:
            self.recipe.check_sizes(sizes)
        except ValueError as error:
            raise ValueError(f"{error} (example {place})") from None
        np.maximum(self.report.longest[at], sizes, out=self.report.longest[at])
        for i, (loss, name) in enumerate(self.recipe.tokens.items()):
            weights = self.recipe.weights.get(loss)
            length = arrays[name].shape[self.recipe.padding[name].axes[0]]
            counted = float(length) if weights is None else _weight(arrays[weights], length, weights, place)
            self.report.tokens[at, i] += counted
            self.report.sequences[at, i] += counted > 0


def _weight(weights: np.ndarray, length: int, name: Name, place: int) -> float:
    """The sum of an example's weights over its positions."""
    if weights.ndim == 0:
        total = float(weights) * length
    elif weights.shape[0] == length:
        total = float(weights.astype(np.float64).sum())
    else:
        found = f"of length {weights.shape[0]} in example {place}"
        raise ValueError(_sentence(f"weights {name!r}", found, f"{length}, that of the feature they weigh"))
    if not (np.isfinite(total) and (weights >= 0).all()):
        raise ValueError(_sentence(f"weights {name!r}", f"{total:g} in sum in example {place}", "numbers from 0 on"))
    return total


def _check_counted(features: Features, recipe: Recipe) -> None:
    """The weights must be there, be numbers, and have no axis but that of positions."""
    known = {feature.name: feature for feature in features.features}
    for name in recipe.weights.values():
        if name not in known:
            raise ValueError(_sentence("weights", repr(name), f"a feature of an example: {features.names}"))
        found = known[name]
        if len(found.shape) > 1 or found.dtype.kind not in "fiub":
            wanted = "numbers, one a position or one an example"
            raise ValueError(_sentence(f"weights {name!r}", f"of shape {found.shape} and {found.dtype}", wanted))


def _digest(batches: Sequence[MicroBatch]) -> float:
    """A hash of examples, in order; 0 where there are none."""
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
