"""Progress: the cursor of the batches that were consumed, and the one epoch that runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distpad import errors
from distpad.data.epoch import Cursor, Epoch
from distpad.data.keras import Elements
from distpad.data.sampler import LengthSampler
from distpad.data.schema import Features

_NAME = "PaddedBatches"


class Progress:
    """Opens one epoch at a time, and counts its batches as they are consumed.

    A thread of tf.data may still read from an epoch that another thread has closed. The lock keeps that thread from
    counting.

    Args:
      make_epoch: makes the epoch that begins at a cursor: for ``fit``, from the ``Elements`` of its dataset; for a
        loop, from None.

    Attributes:
      at: the cursor after the last consumed batch.
      following: the cursor where the next iteration begins.
      running: the open epoch, or None.
      features: the features of an example; None until they are known.
    """

    def __init__(self, make_epoch: Callable[[Cursor, Elements | None], Epoch]) -> None:
        self._make_epoch = make_epoch
        self.at = self.following = Cursor()
        self.running: Epoch | None = None
        self.features: Features | None = None
        self._lock = threading.Lock()

    def move_to(self, cursor: Cursor) -> None:
        """Let the next iteration begin at the cursor."""
        self.at = self.following = cursor

    def open(self, elements: Elements | None = None) -> Epoch:
        """Open the next epoch. Stop the running one first."""
        self.at = self.following
        self.running = self._make_epoch(self.at, elements)
        return self.running

    def stop(self) -> None:
        """Close the running epoch. An epoch that no window sync has begun is opened again next time: another worker may
        not have opened it at all."""
        with self._lock:
            running, self.running = self.running, None
            if running is not None and not running.has_begun:
                self.move_to(running.cursor)
        if running is not None:
            running.close()

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


def cursor_of(state: Any, source: Mapping[str, Any], group: int, sampler: LengthSampler | None) -> Cursor:
    """Return the cursor of a saved state of ``PaddedBatches``.

    Args:
      state: a result of ``state_dict``.
      source: the source that the state must belong to.
      group: micro-batches in an optimiser step.
      sampler: its plan bounds the step.

    Raises:
      TypeError, ValueError: not a state, the state of another source, or a position out of range.
    """
    if not isinstance(state, Mapping):
        raise TypeError(errors.sentence(_NAME, "state", repr(state), "a result of state_dict"))
    missing = {"epoch", "step", "begins", "source"} - set(state)
    if missing:
        raise ValueError(errors.sentence(_NAME, "state", f"without {sorted(missing)}", "a result of state_dict"))
    if state["source"] != source:
        raise ValueError(errors.sentence(_NAME, "state", f"of {state['source']}", f"one of {source}"))
    number = errors.integer(_NAME, "state's epoch", state["epoch"], least=0)
    step = errors.integer(_NAME, "state's step", state["step"], least=0)
    if step % group:
        raise ValueError(
            errors.sentence(_NAME, "state's step", step, f"a multiple of accumulation_steps, which is {group}")
        )
    if sampler is not None and step > -(-len(sampler.of_epoch(number).steps) // group) * group:
        rule = f"at most the {len(sampler.of_epoch(number).steps)} of epoch {number}"
        raise ValueError(errors.sentence(_NAME, "state's step", step, rule))
    if not isinstance(state["begins"], (list, tuple)) or (step and not state["begins"]):
        found = f"{state['begins']!r} at step {step}"
        rule = "the fingerprints of the epoch's first steps, as state_dict returned them"
        raise ValueError(errors.sentence(_NAME, "state's begins", found, rule))
    begins = tuple(errors.integer(_NAME, "state's begins", each, least=0) for each in state["begins"])
    return Cursor(number, step, begins if step else ())
