"""Epoch: runs the pipeline once: the reader and the padder in their threads, and the window syncs between workers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors
from distpad.data import collate, plan, reader, sync
from distpad.data.config import Config
from distpad.data.schema import Features
from distpad.data.stats import PaddingStats

_NAME = "PaddedBatches"
BEGINNING = 8  # steps whose fingerprints identify a source
_NOTHING = -(2.0**60)  # in a maximum: this worker has no value


class Cursor(NamedTuple):
    """A position in the data: consumed steps of an epoch, and the fingerprints of its first steps, by which a source is
    recognised."""

    epoch: int = 0
    step: int = 0
    begins: tuple[int, ...] = ()


class Epoch:
    """Reads, synchronises, pads and yields the steps of one epoch, beginning at a cursor.

    The thread that consumes the batches makes the exchanges, at the same steps on all workers: a header and one window
    before the first step, then each further window in the middle of the window before it.

    Args:
      steps: makes the iterator of this worker's steps.
      cursor: the position where the epoch begins, the same on all workers.
      features: the features of an example, if an earlier epoch learned them.
      compared: further configuration that must be the same on all workers.
      beginning: computes the fingerprints of the first steps on this worker.
      sizes_of: computes the padded sizes of a step's ragged axes from the step's index and their longest sizes.
      to_device: makes an element from the replicas' batches in NumPy; default: the backend's ``to_device``.
      channel: the channel of the exchanges.
      repeats: whether the next epoch begins immediately, on one worker perhaps earlier than on another.

    Attributes:
      features: the features of an example; None until they are known.
      begins: fingerprints of the first steps, over all workers.
      was_left: whether another worker left before the end.
      has_begun: whether the first window sync is complete, which is so on all workers or on none.
      is_at_end: whether the batch that was yielded last is the last one.
    """

    def __init__(
        self,
        backend: backends.Backend,
        config: Config,
        steps: Callable[[], Iterator[reader.Step]],
        *,
        cursor: Cursor,
        features: Features | None,
        stats: PaddingStats,
        compared: dict[str, Any],
        beginning: reader.Beginning,
        sizes_of: Callable[[int, tuple[int, ...]], tuple[int, ...]],
        to_device: Callable[[Features, Sequence[collate.Batch]], Any] | None = None,
        channel: sync.Channel,
        repeats: bool = False,
    ) -> None:
        self.features = features
        self.was_left = self.is_at_end = self.has_begun = False
        self.cursor = cursor
        self.begins = [*cursor.begins]
        self._sizes_of, self._beginning = sizes_of, beginning
        self._backend, self._config, self._stats, self._first = backend, config, stats, cursor.step
        versions = {"tensorflow": tf.__version__, "numpy": np.__version__}
        described = {**config.as_json(), **compared, **cursor._asdict(), "versions": versions}
        self._configuration = json.dumps(described, sort_keys=True)
        self._repeats = repeats
        self._sync = sync.WindowSync(backend, config.warn_after_s, config.timeout_s, channel)
        self._reader = reader.Reader(steps, config, features, beginning)
        self._padder = collate.Padder(backend, config, stats, to_device or _to_device(backend))
        self._read: reader.Window | None = None  # the window that was read last, until it is planned
        self._planned = 0  # steps
        self._rows = config.batch_size or 1  # of a replica, in the last batch that was read
        self._error: BaseException | None = None  # in the window that was planned last
        self._failed_at: int | None = None
        self._first_window: plan.Merged | None = None

    def close(self) -> None:
        """End both threads. Collective if the epoch was left early and the channel has handshakes."""
        self._sync.leave()
        self._reader.close()
        self._padder.close()

    def finish(self) -> None:
        """Close the epoch after its last batch. No collective."""
        self._sync.end()
        self.close()

    def begin(self) -> Features | None:
        """Make the first exchanges, unless ``batches`` makes them later, and return the features of an example.

        Returns None if no worker has an example. Raises the errors of the configuration and of the first examples.
        Collective among workers.
        """
        try:
            return self._begin()
        except sync.Left as left:
            raise errors.PeerError(f"{_NAME}: another worker left before the first step.") from left

    def _begin(self) -> Features | None:
        self._compare()
        self._first_window = self._plan()
        if self.features is None and self._first_window.failure:
            self._fail(self._first_window.failure)
        return self.features

    def batches(self) -> Iterator[Any]:
        """Yield the batches. Ends early if another worker leaves. Collective among workers."""
        try:
            yield from self._planned_batches()
        except sync.Left:
            self.was_left = True

    def _planned_batches(self) -> Iterator[Any]:
        if self._first_window is None:
            self._begin()
        window = self._first_window
        assert window is not None, "_begin sets it"
        while True:
            following = None
            for i, step in enumerate(window.steps):
                if i == len(window.steps) // 2 and not (window.is_last or window.failure):
                    following = self._plan()
                began = time.perf_counter()
                batch = self._padder.take()
                self._stats.padding_seconds += time.perf_counter() - began
                self._stats.steps += 1
                if i % self._config.accumulation_steps == 0:
                    self._stats.add_group(float(step.tokens.sum()))
                self.is_at_end = i + 1 == len(window.steps) and _is_end(following or window._replace(steps=[]))
                yield batch
            if window.failure:
                self._fail(window.failure)
            if following is None:
                return
            window = following

    def _compare(self) -> None:
        """Check that all workers have the same configuration and features, and different examples. One exchange."""
        workers, worker = self._backend.num_workers, self._backend.worker_index
        maxima, sums = self._sync.merge((8, 3 + BEGINNING), self._header, "the first window")
        known = self.features
        if maxima[0] != -maxima[1]:
            sync.raise_differences(self._sync, self._configuration, "configurations")
        if sums[0] > 1 and maxima[4] != -maxima[5]:
            sync.raise_differences(self._sync, known.to_text() if known else "", "examples")
        if sums[1] > 1 and maxima[6] == -maxima[7] and not self._config.replicated:
            raise ValueError(
                f"{_NAME}: source gives the same examples on all {sums[1]:.0f} workers that have examples, expected "
                "different ones. Write dataset.shard(num_workers, worker_index), or replicated=True if you intend this."
            )
        self._check_beginning(sums[2] > 0, [int(fingerprint) for fingerprint in sums[3:]])
        if 0 < sums[0] < workers:  # a worker without examples receives the features
            sender = workers - int(maxima[2])
            text = self._sync.broadcast_text(known.to_text() if known and worker == sender else None, int(maxima[3]))
            self.features = known or Features.from_text(text, self._config.padding)

    def _header(self, limit_s: float) -> sync.Vectors | None:
        window = self._window(limit_s)
        if window is None:
            return None
        self.features = window.features or self.features
        configured = plan.fingerprint(self._configuration)
        maxima = [configured, -configured, 0, 0, *[_NOTHING] * 4]
        if self.features:
            text = self.features.to_text()
            hashed = plan.fingerprint(text)
            first = self._backend.num_workers - self._backend.worker_index
            maxima[2:6] = [first, len(text.encode()), hashed, -hashed]
        if window.digest:
            maxima[6:8] = [window.digest, -window.digest]
        # An epoch of fewer steps repeats its last fingerprint. A worker that failed before its first step has none.
        known = [*window.beginning, *[*window.beginning[-1:], 0.0][:1] * BEGINNING][:BEGINNING]
        sums = [bool(self.features), bool(window.digest), window.report.failed_at == 0, *known]
        return np.array(maxima), np.array(sums, np.float64)

    def _check_beginning(self, is_unknown: bool, found: list[int]) -> None:
        """Keep the fingerprints of the epoch's first steps, or compare saved fingerprints with those read now."""
        if not self._first:
            self.begins = found[: min(self._config.lookahead, self._beginning.steps)]
            return
        checked = min(self._first, len(self.begins))
        if not is_unknown and found[checked - 1] != self.begins[checked - 1]:
            raise ValueError(
                f"{_NAME}: source begins with other examples than when the position was saved (its first {checked} "
                "steps, over all workers), expected the same: continuing at that step would repeat some examples and "
                "leave others out. Make every iteration yield one order (tf.data's shuffle(seed=..., "
                "reshuffle_each_iteration=False)), shuffle by a LengthSampler, or save at the end of an epoch."
            )

    def _plan(self) -> plan.Merged:
        """Synchronise the next window, and order its batches from the padder."""
        config, workers = self._config, self._backend.num_workers
        axes, losses = len(config.axes), len(config.tokens)

        def report(limit_s: float) -> sync.Vectors | None:
            read = self._window(limit_s)
            return None if read is None else plan.pack(read.report, self._backend.worker_index, workers)

        begin = self._first + self._planned
        steps = f"steps {begin} to {begin + config.lookahead - 1}"
        sizes = 1 + config.lookahead * axes, config.lookahead * (1 + 2 * losses)
        full = (config.batch_size or 0) * self._backend.num_replicas if config.drop_remainder else None

        merged: plan.Merged | None = None

        def is_last(vectors: sync.Vectors) -> bool:
            nonlocal merged
            merged = plan.merge(
                *vectors,
                window=config.lookahead,
                axes=axes,
                losses=losses,
                workers=workers,
                sizes_of=lambda i, agreed: self._sizes_of(begin + i, agreed),
                accumulation_steps=config.accumulation_steps,
                full_rows=full,
            )
            self.has_begun = True
            return merged.is_last and not merged.failure and not self._repeats

        self._sync.merge(sizes, report, steps, is_last)
        assert merged is not None, "is_last sets it"
        self._stats.plan_seconds, self._sync.seconds = self._stats.plan_seconds + self._sync.seconds, 0.0
        read, self._read = self._read, None
        assert read is not None, "the report comes from it"
        self._planned += config.lookahead
        self._error, self._failed_at = read.error, read.report.failed_at
        for i, step in enumerate(merged.steps):
            micro = read.batches[i] if i < len(read.batches) else None
            self._rows = micro.batch_size if micro else self._rows
            assert self.features is not None, "a step has rows, so that a worker knows the features"
            self._padder.order(collate.Order(micro, step, self.features, self._rows))
        return merged

    def _window(self, limit_s: float) -> reader.Window | None:
        """The next window; None if it is not read within the limit."""
        if self._read is None:
            began = time.perf_counter()
            read = self._reader.take(limit_s)
            self._stats.source_seconds += time.perf_counter() - began
            if read and read.features and self.features and read.features.to_text() != self.features.to_text():
                # the first example of this worker came in a later window
                texts = [self.features.to_text(), read.features.to_text()]
                found = "; ".join(plan.differences(texts)).replace("worker 0", "the others").replace("worker 1", "here")
                who = f"{_NAME}: the examples of worker {self._backend.worker_index}"
                read = read.refused(ValueError(f"{who} differ from the examples of the others: {found}."))
            self._read = read
        return self._read

    def _fail(self, failure: plan.Failure) -> None:
        """Raise on all workers: a worker that failed at this step raises its own error, others the first worker's."""
        error = self._error
        is_first = failure.worker == self._backend.worker_index
        message = self._sync.broadcast_text(f"{type(error).__name__}: {error}" if is_first else None, is_last=True)
        if error is not None and self._failed_at == failure.step:
            raise error
        step = self._first + self._planned - self._config.lookahead + failure.step
        raise errors.PeerError(f"{_NAME}: worker {failure.worker} failed at step {step} of the epoch: {message}")


def _is_end(window: plan.Merged) -> bool:
    return not window.steps and window.is_last and not window.failure


def _to_device(backend: backends.Backend) -> Callable[[Features, Sequence[collate.Batch]], Any]:
    return lambda _, batches: backend.to_device(batches)
