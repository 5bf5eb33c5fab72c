"""Feeder: yields epochs to Keras's fit, and keeps track of the batches that fit requested but did not train on."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import backends, errors
from distpad.data import keras, sync
from distpad.data.config import Config
from distpad.data.epoch import Cursor, Epoch
from distpad.data.progress import Progress

_KEPT = 3  # of the earlier epochs after the first


class Requests:
    """The batches that fit requested from the datasets of one ``PaddedBatches``, and the epochs that it began.

    Keras consumes batches to infer shapes, and tf.data reads ahead: an epoch whose batches may not have been trained on
    begins again.

    Attributes:
      count: batches that were requested since the first of these epochs began.
      behaviour: how fit consumes datasets under this backend.
    """

    def __init__(self, backend: backends.Backend, config: Config, progress: Progress) -> None:
        self._backend, self._config, self._progress = backend, config, progress
        self.behaviour = keras.behaviour_of(backend)
        self.count = 0
        self._epochs: list[tuple[int, Cursor]] = []  # the count before each, and the cursor where it begins

    def begin_epoch(self, cursor: Cursor) -> None:
        """Fit begins an epoch at the cursor."""
        if not self._epochs:
            self.count = 0
        self._epochs = [*self._epochs[:1], *self._epochs[1:][-_KEPT:], (self.count, cursor)]

    def clear(self) -> None:
        """Every requested batch was trained on, or is dropped."""
        self._epochs = []

    def untrained(self) -> Cursor | None:
        """The cursor of the epoch that must begin again, because fit may have trained on none of its batches."""
        ahead = self.behaviour.reads_ahead
        if self._epochs and self.count <= max(self.behaviour.peeks, ahead):
            return self._epochs[0][1]
        return next((cursor for before, cursor in self._epochs[1:] if before >= self.count - ahead), None)

    def leave(self, elements: keras.Elements | None = None) -> None:
        """Close the running epoch, and let an untrained one begin again.

        Collective if workers may have consumed different numbers of batches: then the largest number holds.
        """
        self._progress.stop()
        if elements and self.behaviour.leaves_apart:
            limits = self._config.warn_after_s, self._config.timeout_s
            window_sync = sync.WindowSync(self._backend, *limits, elements.channel)
            mine = np.array([self.count]), np.zeros(1)
            self.count = window_sync.merge((1, 1), lambda _: mine, "the next epoch", lambda _: True)[0][0]
        untrained = self.untrained()
        if untrained:
            self._progress.move_to(untrained)
        self.clear()


class Feeder:
    """The generator function of one dataset: each iteration yields an epoch, or epochs forever if the dataset repeats.

    tf.data calls it in a thread of its own.

    Args:
      first: the epoch that ``for_keras`` opened to learn the features; the first iteration continues it.
      steps: the steps of every epoch, or None if they are unknown.
    """

    def __init__(
        self, progress: Progress, requests: Requests, elements: keras.Elements, first: Epoch, steps: int | None
    ) -> None:
        self._progress, self._requests, self._elements = progress, requests, elements
        self._first, self._steps = first, steps
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
        progress, requests, elements = self._progress, self._requests, self._elements
        elements.refuse_predict()
        is_first = next(self._iterations) == 0
        is_peek = requests.behaviour.peeks > 0 and keras.is_peeking(otherwise=is_first)
        is_open = is_first and self._first is progress.running
        if not is_open and not continues:
            requests.leave(elements)
        if self._steps and progress.following.step:
            found = f"at step {progress.at.step}, when a dataset of {self._steps} steps an epoch was made already"
            raise ValueError(errors.sentence("load_state_dict", "state", found, "to be loaded before for_keras"))
        running = self._first if is_open else progress.open(elements)
        requests.begin_epoch(running.cursor)
        for element in progress.consume(running):
            requests.count += 1
            if not (elements.predicts and not len(tf.nest.flatten(element)[0])):
                yield element
        if running is not progress.running:
            return False
        is_short = requests.count < requests.behaviour.peeks  # a peek consumes the whole epoch
        if not elements.repeats and not (is_peek and is_short):
            requests.clear()
        return not running.was_left
