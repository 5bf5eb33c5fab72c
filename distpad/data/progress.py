"""Progress: the cursor of the batches that were consumed, the one epoch that runs, and what fit requested of it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors
from distpad.data import keras, sync
from distpad.data.epoch import Epoch
from distpad.data.sampler import check_state
from distpad.data.schema import Features
from distpad.data.sources import Cursor, Source
from distpad.data.stats import PaddingStats
from distpad.data.watch import Watch

_NAME = "PaddedBatches"
_KEPT = 3  # of the earlier epochs of fit after the first


class Progress:
    """Opens one epoch at a time, and counts its batches as they are consumed.

    A thread of tf.data may still read from an epoch that another thread has closed. The lock keeps that thread from
    counting. Keras consumes batches to infer shapes, and tf.data reads ahead: an epoch of fit whose batches may not
    have been trained on begins again.

    Attributes:
      at: the cursor after the last consumed batch.
      following: the cursor where the next iteration begins.
      running: the open epoch, or None.
      features: the features of an example; None until they are known.
      behaviour: how fit consumes datasets under this backend.
      requested: batches that fit requested since the first of the epochs that may begin again.
    """

    def __init__(self, source: Source, stats: PaddingStats, watched: Watch) -> None:
        self._source, self._stats, self._watch = source, stats, watched
        self.at = self.following = Cursor()
        self.running: Epoch | None = None
        self.features: Features | None = None
        self.behaviour = keras.behaviour_of(source.backend)
        self.requested = 0
        self._begun: list[tuple[int, Cursor]] = []  # epochs of fit: the requests before each, and its cursor
        self._lock = threading.Lock()

    def move_to(self, cursor: Cursor) -> None:
        """Let the next iteration begin at the cursor."""
        self.at = self.following = cursor

    def open(self, elements: keras.Elements | None = None) -> Epoch:
        """Open the next epoch. Leave the running one first."""
        self.at = self.following
        self.running = Epoch(self._source, self.at, self.features, self._stats, elements, self._watch)
        return self.running

    def begin_epoch(self, cursor: Cursor) -> None:
        """Fit begins an epoch at the cursor."""
        self.requested = self.requested if self._begun else 0
        self._begun = [*self._begun[:1], *self._begun[1:][-_KEPT:], (self.requested, cursor)]

    def end_epoch(self, running: Epoch, *, is_peek: bool, repeats: bool) -> bool:
        """Fit, or a peek, has no further batch of the epoch. Returns whether it requested the whole epoch."""
        with self._lock:
            # an epoch that another worker left may begin again on all
            if running is not self.running or running.was_left:
                return False
            is_short = self.requested < self.behaviour.peeks  # a peek consumes the whole epoch
            if not repeats and not (is_peek and is_short):
                self.clear()
            return True

    def clear(self) -> None:
        """Every requested batch was trained on, or is dropped."""
        self._begun = []

    def untrained(self) -> Cursor | None:
        """The cursor of the epoch that must begin again, because fit may have trained on none of its batches."""
        ahead = self.behaviour.reads_ahead
        if self._begun and self.requested <= max(self.behaviour.peeks, ahead):
            return self._begun[0][1]
        return next((cursor for before, cursor in self._begun[1:] if before >= self.requested - ahead), None)

    def stop(self) -> None:
        """Close the running epoch. An epoch that no window sync has begun is opened again next time: another worker may
        not have opened it at all."""
        with self._lock:
            running, self.running = self.running, None
            if running is not None and not running.has_begun:
                self.move_to(running.cursor)
        if running is not None:
            running.close()

    def leave(self, elements: keras.Elements | None = None) -> None:
        """Close the running epoch, and let an untrained one begin again.

        Collective if workers may have consumed different numbers of batches: then the largest number holds.
        """
        self.stop()
        if elements and self.behaviour.leaves_apart:
            window_sync = sync.WindowSync(self._source.backend, self._source.config, elements.channel)
            mine = np.array([self.requested]), np.zeros(1)
            self.requested = window_sync.merge(mine, lambda _: mine, "the next epoch", lambda _: True)[0][0]
        untrained = self.untrained()
        if untrained:
            self.move_to(untrained)
        self.clear()

    def state(self) -> dict[str, Any]:
        """The position after the last whole optimiser step whose batches were yielded, as a dict for JSON."""
        at, group = self.untrained() or self.at, self._source.config.accumulation_steps
        step = at.step // group * group
        return {**at._asdict(), "step": step, "begins": [*at.begins] if step else [], "source": self._source.identity()}

    def load(self, state: Any) -> None:
        """Let the next iteration begin at a position that ``state`` returned. Raises: TypeError, ValueError."""
        check_state(_NAME, state, {"epoch", "step", "begins", "source"})
        source, group, sampler = self._source.identity(), self._source.config.accumulation_steps, self._source.sampler
        is_same = isinstance(state["source"], type(source)) and state["source"] == source
        errors.require(_NAME, is_same, "state", f"of {state['source']}", f"one of {source}")
        number = errors.integer(_NAME, "state's epoch", state["epoch"], least=0)
        step, begins = errors.integer(_NAME, "state's step", state["step"], least=0, most=2**31), state["begins"]
        rule = f"a multiple of accumulation_steps, which is {group}"
        errors.require(_NAME, step % group == 0, "state's step", step, rule)
        if sampler is not None:
            steps = len(sampler.of_epoch(number).steps)
            rule = f"at most the {steps} of epoch {number}"
            errors.require(_NAME, step <= -(-steps // group) * group, "state's step", step, rule)
        are_given = isinstance(begins, (list, tuple)) and (begins or not step)
        rule = "the fingerprints of the epoch's first steps, as state_dict returned them"
        errors.require(_NAME, are_given, "state's begins", f"{errors.shown(begins)} at step {step}", rule)
        begins = tuple(errors.integer(_NAME, "state's begins", each, least=0) for each in begins)
        self.stop()
        self.move_to(Cursor(number, step, begins if step else ()))
        self.clear()

    def consume(self, running: Epoch) -> Iterator[Any]:
        """Yield the batches of the open epoch. Raises DistpadError if another epoch was opened meanwhile."""
        ended = False
        try:
            with self._lock:
                if running is self.running:
                    self.following = Cursor(running.cursor.epoch + 1)
            for batch in running.batches():
                with self._lock:
                    if running is not self.running:
                        remedy = "Give each loop a PaddedBatches of its own."
                        raise errors.DistpadError(f"{_NAME}: this loop was left, and another has begun. {remedy}")
                    self.features = running.features
                    self.requested += 1  # not after stop, when workers have agreed on the number
                    # The batch counts before it is yielded: state saved while training on it includes it.
                    self.at = Cursor(self.at.epoch, self.at.step + 1, tuple(running.begins))
                    if running.is_at_end:
                        self.move_to(self.following)
                        ended = True
                yield batch
            with self._lock:
                if running is not self.running:
                    return
                if running.was_left:
                    if not running.has_begun:
                        self.move_to(running.cursor)
                    return
                if not ended:  # the epoch had no batch
                    self.move_to(self.following)
            running.finish()
        finally:
            running.close()


class Feeder:
    """The generator function of one dataset: each iteration yields an epoch, or epochs forever if the dataset repeats.

    tf.data calls it in a thread of its own.

    Args:
      progress: of the batches.
      first: the epoch that ``for_keras`` opened to learn the features; the first iteration continues it.
      steps: the steps of every epoch, or None if they are unknown.
    """

    def __init__(self, progress: Progress, elements: keras.Elements, first: Epoch, steps: int | None) -> None:
        self._progress, self._elements, self._first, self._steps = progress, elements, first, steps
        self._iterations = itertools.count()

    def __call__(self) -> Iterator[Any]:
        # Dataset.repeat could be stopped between two epochs, where no other worker would learn that this one left.
        continues = False
        while (yield from self._epoch(continues)) and self._elements.repeats:
            continues = True

    def _epoch(self, continues: bool) -> Generator[Any, None, bool]:
        """Yield one epoch; return whether it was yielded completely.

        Args:
          continues: whether the epoch follows another one in the same iteration.
        """
        progress, elements = self._progress, self._elements
        elements.refuse_predict()
        is_first = next(self._iterations) == 0
        is_peek = progress.behaviour.peeks > 0 and keras.is_peeking(otherwise=is_first)
        is_open = is_first and self._first is progress.running
        if not is_open and not continues:
            progress.leave(elements)
        if self._steps and progress.following.step:
            found = f"at step {progress.at.step}, when a dataset of {self._steps} steps an epoch was made already"
            raise ValueError(errors.sentence("load_state_dict", "state", found, "to be loaded before for_keras"))
        running = self._first if is_open else progress.open(elements)
        progress.begin_epoch(running.cursor)
        for element in progress.consume(running):
            if not (elements.predicts and not len(tf.nest.flatten(element)[0])):
                yield element
        return progress.end_epoch(running, is_peek=is_peek, repeats=elements.repeats)
