"""Epoch: runs the pipeline once: the reader and the padder in their threads, and the window syncs between workers."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from distpad import errors
from distpad.backends import finite, messages
from distpad.data import collate, keras, plan, reader, sync, watch
from distpad.data.schema import Features
from distpad.data.sources import Cursor, Source
from distpad.data.stats import PaddingStats, Skipped

_NAME = "PaddedBatches"
_LOG = logging.getLogger("distpad")
_ALIKE = 32  # examples of each worker that are equal, so that no chance explains it


class Epoch:
    """Reads, synchronises, pads and yields the steps of one epoch, beginning at a cursor.

    The thread that consumes the batches makes the exchanges, at the same steps on all workers: a header and one window
    before the first step, then each further window in the middle of the window before it.

    Args:
      cursor: the position where the epoch begins, the same on all workers.
      features: the features of an example, if an earlier epoch learned them.
      elements: makes the elements of a dataset for fit; None: the batches of a loop.
      watched: the variables that are compared in a loop.

    Attributes:
      features: the features of an example; None until they are known.
      begins: fingerprints of the first steps, over all workers.
      was_left: whether another worker left before the end.
      has_begun: whether the first window sync is complete, which is so on all workers or on none.
      is_at_end: whether the batch that was yielded last is the last one.
    """

    def __init__(
        self,
        source: Source,
        cursor: Cursor,
        features: Features | None,
        stats: PaddingStats,
        elements: keras.Elements | None,
        watched: watch.Watch,
    ) -> None:
        self._source, self._backend, self._config = source, source.backend, source.config
        self.cursor, self.features, self._stats, self._elements = cursor, features, stats, elements
        self._watch, self._checks = watched, False
        self.was_left = self.is_at_end = self.has_begun = False
        self.begins = [*cursor.begins]
        compared = {"source": source.identity(), "for_keras": str(elements), **cursor._asdict()}
        described = {**self._config.as_json(), **compared, "versions": watch.code()}
        self._configuration = json.dumps(described, sort_keys=True)
        self._sync = sync.WindowSync(self._backend, self._config, elements.channel if elements else sync.Channel())
        self._reader = source.open_reader(cursor, features)
        self._reader.begin()
        self._padder = collate.Padder(self._backend, self._config, stats, elements.of if elements else None)
        self._read: reader.Window | None = None  # the window that was read last, until it is planned
        self._windows = itertools.count()
        self._planned = self._seen = 0  # steps that were planned, and their examples over all workers
        self._skipped: dict[
            int, list[Skipped]
        ] = {}  # examples of all workers, by planned steps, until they are consumed
        self._num_skipped = 0
        self._consumed = 0
        self._rows = self._config.batch_size or 1  # of a replica, in the last batch that was read
        self._latest: tuple[int, reader.Window] | None = None  # the window that was planned last, and its first step
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
            self._begin()
        except sync.Left as left:
            raise errors.PeerError(f"{_NAME}: another worker left before the first step.") from left
        return self.features

    def _begin(self) -> plan.Merged:
        self._compare()
        if self._elements and self.features:
            self._elements.bind(self.features)
        self._first_window = self._plan()
        if self.features is None and self._first_window.failure:
            self._fail(self._first_window.failure)
        return self._first_window

    def batches(self) -> Iterator[Any]:
        """Yield the batches. Ends early if another worker leaves. Collective among workers."""
        try:
            yield from self._batches()
        except sync.Left:
            self.was_left = True

    def _batches(self) -> Iterator[Any]:
        following: plan.Merged | None = self._first_window or self._begin()
        while following:
            window, following = following, None
            goes_on, last = not (window.is_last or window.failure), len(window.steps) - 1
            for i, step in enumerate(window.steps):
                # in the middle, but before the only step just if it may be the last of the epoch
                if i == len(window.steps) // 2 and goes_on and (last or self._config.drop_remainder):
                    following = self._plan()
                began = time.perf_counter()
                batch = self._padder.take()
                self._stats.padding_seconds += time.perf_counter() - began
                self._stats.steps += 1
                self._stats.add_skipped(self._skipped.pop(self._consumed, ()))
                self._consumed += 1
                if i % self._config.accumulation_steps == 0:
                    self._stats.add_group(float(step.tokens.sum()))
                rest = following or window._replace(steps=[])
                self.is_at_end = i == last and rest.is_last and not rest.steps
                yield batch
            if window.failure:
                self._fail(window.failure)
            if goes_on and following is None:
                following = self._plan()
        if self._checks and self._elements is None:
            found, _ = self._sync.merge((np.zeros(4), np.zeros(1)), lambda _: (self._state(), np.zeros(1)), "the end")
            self._compare_state(found)

    def _compare(self) -> None:
        """Check that all workers have the same configuration and features, and different examples. One exchange."""
        workers, worker = self._backend.num_workers, self._backend.worker_index
        maxima, sums = self._sync.merge((np.zeros(6), np.zeros(3)), self._header, "the first window")
        known = self.features
        if maxima[0] != -maxima[1]:
            sync.raise_differences(self._sync, self._configuration, "configurations")
        if sums[0] > 1 and maxima[4] != -maxima[5]:
            sync.raise_differences(self._sync, known.to_text() if known else "", "examples")
        self._check_beginning(sums[1] > 0, int(sums[2]))
        if 0 < sums[0] < workers:  # a worker without examples receives the features
            sender = workers - int(maxima[2])
            text = self._sync.broadcast_text(known.to_text() if known and worker == sender else None, int(maxima[3]))
            with messages.checked("a description of examples"):
                self.features = known or Features.from_text(text, self._config.padding)

    def _header(self, limit_s: float) -> sync.Vectors | None:
        window = self._window(limit_s)
        if window is None:
            return None
        self.features = window.features or self.features
        configured = plan.fingerprint(self._configuration)
        maxima = [configured, -configured, 0, 0, *[plan.NOTHING] * 2]
        if self.features:
            text = self.features.to_text()
            hashed = plan.fingerprint(text)
            first = self._backend.num_workers - self._backend.worker_index
            maxima[2:6] = [first, len(text.encode()), hashed, -hashed]
        # a worker that failed before its first step has no fingerprint
        sums = [bool(self.features), window.report.failed_at == 0, window.compared]
        return np.array(maxima), np.array(sums, np.float64)

    def _check_beginning(self, is_unknown: bool, found: int) -> None:
        """Compare the fingerprint of a saved position with the examples that are read now."""
        checked = min(self.cursor.step, len(self.begins))
        if self.cursor.step and not is_unknown and found != self.begins[checked - 1]:
            skips = " Or an example was skipped then and is not now, or the reverse." * self._config.skips
            raise ValueError(
                f"{_NAME}: source begins with other examples than when the position was saved (its first {checked} "
                "steps, over all workers), expected the same: continuing at that step would repeat some examples and "
                "leave others out. Make every iteration yield one order (tf.data's shuffle(seed=..., "
                f"reshuffle_each_iteration=False)), shuffle by a LengthSampler, or save at the end of an epoch.{skips}"
            )

    def _check_different(self, merged: plan.Merged) -> None:
        """Raise if all workers read the same examples. The same on all workers."""
        self._seen += sum(step.rows for step in merged.steps)
        is_enough = merged.is_last or self._planned >= self._config.lookahead or self._seen >= _ALIKE * merged.alike
        if merged.alike and is_enough:
            raise ValueError(
                f"{_NAME}: source gives the same examples on all {merged.alike} workers that have examples, expected "
                "different ones. Write dataset.shard(num_workers, worker_index), or replicated=True if you intend this."
            )

    def _plan(self) -> plan.Merged:
        """Synchronise the next window, and order its batches from the padder."""
        config, backend = self._config, self._backend

        def report(limit_s: float) -> sync.Vectors | None:
            read = self._window(limit_s)
            if read is None:
                return None
            maxima, sums = plan.pack(read.report, backend.worker_index, backend.num_workers)
            return np.concatenate([self._state(), maxima]), sums

        planned, size = config.window(next(self._windows))
        begin = self.cursor.step + planned
        merged: plan.Merged | None = None

        def is_last(vectors: sync.Vectors) -> bool:
            nonlocal merged
            with messages.checked("a report"):
                plan.check(vectors[0][4:], vectors[1], size, backend.num_workers)
            merged = plan.merge(
                vectors[0][4:],
                vectors[1],
                config=config,
                window=size,
                workers=backend.num_workers,
                full_rows=(config.batch_size or 0) * backend.num_replicas if config.drop_remainder else None,
                sizes_of=lambda i, agreed: self._source.padded_sizes(self.cursor.epoch, begin + i, agreed),
            )
            self.has_begun = True
            # the next epoch of a dataset that repeats may begin earlier on this worker
            repeats = self._elements is not None and self._elements.repeats
            return merged.is_last and not repeats and not any(merged.skipped)

        maxima, sums = plan.pack(plan.Report.blank(config, size), 0, 1)
        blank = np.concatenate([np.zeros(4), maxima]), sums
        maxima, _ = self._sync.merge(blank, report, f"steps {begin} to {begin + size - 1}", is_last)
        self._compare_state(maxima[:4])
        assert merged is not None, "is_last sets it"
        self._stats.plan_seconds, self._sync.seconds = self._stats.plan_seconds + self._sync.seconds, 0.0
        read, self._read = self._read, None
        assert read is not None, "the report comes from it"
        self._note_skipped(merged, read, planned)
        self._planned = planned + size
        self._latest = begin, read._replace(batches=[])
        if not self.cursor.step:
            self.begins += merged.begins[: self._reader.prints.steps - len(self.begins)]
        self._check_different(merged)
        if merged.is_last:
            self._source.read_ahead(self.cursor.epoch + 1, self.features)
        for i, step in enumerate(merged.steps):
            micro = read.batches[i] if i < len(read.batches) else None
            if micro:
                finite.planned(self.cursor.epoch, begin + i, micro.rows.indices)
            self._rows = micro.batch_size if micro else self._rows
            assert self.features is not None, "a step has rows, so that a worker knows the features"
            self._padder.order(collate.Order(micro, step, self.features, self._rows))
        return merged

    def _state(self) -> np.ndarray:
        """What a worker tells of its training: whether it checks it, what is not finite, and the checksums."""
        backend, is_loop = self._backend, self._elements is None
        sums = self._watch.checksum() if is_loop else [0.0, 0.0]
        return np.array([bool(self._watch) or finite.is_used(), finite.urgency(backend), *sums])

    def _compare_state(self, maxima: np.ndarray) -> None:
        """Raise DistpadError on all workers if a value is not finite, or watched variables differ. Collective if so."""
        backend = self._backend
        self._checks, failed, highest, lowest = bool(maxima[0]), int(maxima[1]), maxima[2], -maxima[3]
        if failed:
            text = self._sync.broadcast_text(
                finite.found() if finite.worker_of(failed, backend) == backend.worker_index else None
            )
            if self._elements is None:  # fit may have read ahead, and end before it comes to this error
                finite.clear()
            raise errors.DistpadError(text)
        if highest != lowest:
            texts = self._sync.gather_texts(self._watch.describe())
            with messages.checked("the checksums"):
                found = watch.differences(texts)
            step = self.cursor.step + self._consumed
            remedy = "Let all workers begin with distpad.broadcast_variables, and reduce all gradients."
            raise errors.DistpadError(
                f"watch: variables differ between replicas after {step} steps of epoch "
                f"{self.cursor.epoch}, expected equal ones: {found}. {remedy}"
            )

    def _note_skipped(self, merged: plan.Merged, read: reader.Window, begin: int) -> None:
        """Note the examples of all workers that the window skipped, for ``stats``. Collective if there are any.

        Raises: DistpadError on all workers: more than ``max_skipped``, or all examples so far.
        """
        count = sum(merged.skipped)
        if not count:
            return
        self._num_skipped += count
        seen = self._num_skipped + self._seen + sum(step.rows for step in merged.steps)
        limit = self._config.may_skip(seen)
        is_wrong = self._num_skipped > limit or self.features is None
        micros = read.batches[: len(merged.steps)]
        mine = [(begin + i, *each) for i, micro in enumerate(micros) for each in micro.skipped]
        repeats = self._elements is not None and self._elements.repeats
        texts = self._sync.gather_texts(
            json.dumps(mine[:1] if is_wrong else mine), is_last=merged.is_last and not repeats and not is_wrong
        )
        with messages.checked("the skipped examples"):
            parts = [(worker, part) for worker, text in enumerate(texts) for part in json.loads(text)]
            found = [(int(at), Skipped(worker, int(i), str(why))) for worker, (at, i, why) in parts]
            _, first = found[0]
        shown = f"first example {first.example} of worker {first.worker}, {first.reason}"
        if is_wrong:
            allowed = "some that define the features" if self.features is None else f"max_skipped={limit} at most"
            raise errors.DistpadError(
                f"{_NAME}: {self._num_skipped} of the first {seen} examples of the epoch were skipped ({shown}), "
                f"expected {allowed}."
            )
        if self._num_skipped == count:
            _LOG.warning("%s: %d examples were skipped: %s", _NAME, count, shown)
        for at, skipped in found:
            self._skipped.setdefault(at, []).append(skipped)

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
            if read and self._padder.error:
                read = read.refused(self._padder.error)
            self._read = read
        return self._read

    def _fail(self, failure: plan.Failure) -> None:
        """Raise on all workers: a worker that failed at this step raises its own error, others the first worker's."""
        assert self._latest is not None, "it has the failure"
        begin, read = self._latest
        error = read.error
        is_first = failure.worker == self._backend.worker_index
        message = self._sync.broadcast_text(f"{type(error).__name__}: {error}" if is_first else None, is_last=True)
        if error is not None and read.report.failed_at == failure.step:
            raise error
        step = begin + failure.step
        raise errors.PeerError(f"{_NAME}: worker {failure.worker} failed at step {step} of the epoch: {message}")
