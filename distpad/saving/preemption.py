"""Preemption: after SIGTERM to any worker, all workers save at the same step and exit."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

from distpad import backends, errors

_LOG = logging.getLogger("distpad")
EXIT_CODE = 128 + signal.SIGTERM
_ONE_S = 5.0  # signals within this time count as one, because Slurm and launchers may send SIGTERM twice
_ACTIVE: list[Preemption] = []  # the one whose block runs: a process has one handler of SIGTERM


class Preemption:
    """Save and exit on all workers at the same step after SIGTERM, in a custom training loop on any engine.

    A scheduler sends SIGTERM to drain a node, to end a job at its time limit, or to start another job. The signal
    reaches one worker or all workers, at different times. Saving is collective, and no worker can train without the
    others. A worker therefore only records the signal. Every ``every`` steps, one collective shows whether any worker
    has recorded a signal. If so, all workers save at this step, and exit with code 143. The launcher's grace period
    (``--grace-s``) must last for ``every`` steps and a save.

    Outside of the ``with`` block, SIGTERM ends the process at once, although TensorFlow's workers would ignore it.
    Inside the block, a second SIGTERM more than 5 s after the first also ends the process at once, even if it waits for
    a lost worker. In an elastic Horovod job, all workers save, but only the workers that received the signal exit.

    Args:
      save: ``save()``, called on all workers at the same step; it may be collective.
      every: steps between two collectives of a few numbers, at least 1.
      backend: see ``distpad.backends.resolve``.

    Raises:
      TypeError: ``save`` is not callable, or ``every`` is no integer.
      ValueError: ``every`` is below 1.

    ``Checkpoints`` does the same, and saves at regular times as well.

    >>> saved = []
    >>> with Preemption(lambda: saved.append("now"), every=2) as preemption:
    ...     for done in range(1, 4):
    ...         preemption.step(done)  # after step ``done``
    >>> saved
    []
    """

    def __init__(self, save: Callable[[], Any], *, every: int = 10, backend: Any = None) -> None:
        if not callable(save):
            raise TypeError(errors.sentence("Preemption", "save", errors.shown(save), "a function without arguments"))
        self._begin(save, backend, every=every)

    def _begin(self, save: Callable[[], Any], backend: Any, **steps: int | None) -> None:
        """Begin with the steps between two collectives: the first number is required, the others may be None."""
        self._name, self._save, self._steps = type(self).__name__, save, steps
        for argument, given in steps.items():
            if argument == next(iter(steps)) or given is not None:
                steps[argument] = errors.integer(self._name, argument, given, least=1)
        self._backend = backends.resolve(backend, function=self._name)
        self._done = 0
        # a worker that joins an elastic job takes its first step alone
        self._is_compared = self._backend.is_elastic
        self._noted_at: float | None = None
        if threading.current_thread() is threading.main_thread() and not _ACTIVE:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __enter__(self) -> Preemption:
        if threading.current_thread() is not threading.main_thread():
            remedy = "Python handles signals only in the main thread."
            raise ValueError(errors.sentence(self._name, "the thread", "another one", "the main thread", remedy))
        remedy = "Save all objects in one block."
        errors.require(self._name, not _ACTIVE, "the block", "within another one", "the only one", remedy)
        _ACTIVE.append(self)
        # A Python handler runs in the main thread, and is delayed while that thread waits, as for a lost worker.
        reads, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._thread = threading.Thread(target=self._listen, args=(reads,), daemon=True, name="distpad-preemption")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._end()
        finally:
            _ACTIVE.clear()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            os.close(self._pipe)
            self._thread.join()
        # The elastic job lost workers, and no collective completes: this worker exits alone. Other errors are raised.
        if self._noted_at is not None and kind is not SystemExit and self._backend.is_elastic:
            os.kill(os.getpid(), signal.SIGTERM)

    def step(self, done: int) -> None:
        """Save and exit if any worker received SIGTERM. Call this after each step.

        Args:
          done: number of completed steps, equal on all workers.

        Raises:
          SystemExit: with code 143, after ``save``.
          ValueError: ``done`` is below that of the last call, in a job that is not elastic. On all workers: ``done`` or
            ``every`` differs between workers.
          TypeError: ``done`` is not an integer.

        Collective at the first step, unless the job is elastic, at each multiple of ``every``, and at the end of the
        block.
        """
        self._count(done)
        if self._is_time():
            self._sync()

    def _count(self, done: int) -> None:
        """Note the completed steps. An elastic job that lost a worker counts again from its last commit."""
        done, least = errors.integer(self._name, "done", done, least=0), 0 if self._backend.is_elastic else self._done
        remedy = "Count on, also from the steps that were restored."
        errors.require(self._name, done >= least, "done", done, f"at least {least}, as before", remedy)
        self._done = done

    def _is_time(self) -> bool:
        """Whether this step has a collective. All workers must agree, so the first one compares ``every``."""
        return not self._is_compared or any(number and self._done % number == 0 for number in self._steps.values())

    def _end(self) -> None:
        self._sync()

    def _sync(self, wish: int = 0) -> int:
        """Return the largest wish of all workers, unless any worker received SIGTERM: then save and exit."""
        noted = self._noted_at is not None
        mine = np.array([self._done, *(number or 0 for number in self._steps.values())])
        anyone, wish, *found = self._backend.host_max(np.array([int(noted), wish, *mine, *-mine])).tolist()
        (most, *highest), (least, *lowest) = found[: len(mine)], (-each for each in found[len(mine) :])
        self._is_compared = True
        for name, high, low in zip(self._steps, highest, lowest):
            if high != low:
                here, range_ = f"{self._steps[name]} on worker {self._backend.worker_index}", f"{low or None} to {high}"
                raise ValueError(errors.sentence(self._name, name, here, f"the same on all workers ({range_})"))
        if most != least:
            # Workers whose loops end at different steps would later wait for each other, or save different states.
            remedy = "End the loop at the same step on all workers."
            found = f"{self._done} on worker {self._backend.worker_index}"
            rule = f"the same on all workers (they are at {least} to {most})"
            raise ValueError(errors.sentence(self._name, "done", found, rule, remedy))
        if not anyone:
            return int(wish)
        self._save()
        if self._backend.worker_index == 0:
            _LOG.warning("%s: SIGTERM: saved after step %d.", self._name, self._done)
        if self._backend.is_elastic and not noted:
            return 0  # this worker continues, as after any loss of a worker
        self._noted_at = None
        self._backend.close()
        raise SystemExit(EXIT_CODE)

    def _listen(self, reads: int) -> None:
        with open(reads, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] != signal.SIGTERM:
                    continue
                if self._noted_at is None:
                    self._noted_at = time.monotonic()
                elif time.monotonic() > self._noted_at + _ONE_S:
                    os._exit(EXIT_CODE)
