"""Preemption: all workers save at one step and leave together when SIGTERM arrives at any of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

from distpad import backends, errors

_NAME = "Preemption"
EXIT_CODE = 128 + signal.SIGTERM
_ONE_S = 5.0  # signals within this time are one: Slurm, and launchers that pass it on, may send it twice


class Preemption:
    """Save and leave together when SIGTERM arrives, in a custom training loop on any engine.

    SIGTERM arrives where a node is drained, the time of a job is over, or another job takes its place: at one worker or
    at all of them, and hardly at one moment. Saving is collective, and no worker can train without the others. So a
    worker that gets the signal notes it. Every ``every`` steps all workers agree whether any of them has noted one;
    then all of them save at this step, and end with exit code 143. The time that a launcher grants (``--grace-s``) has
    to last for ``every`` steps and a save.

    Outside of the ``with`` block, SIGTERM ends the process at once, although TensorFlow's workers would ignore it. So
    does a second SIGTERM, more than 5 s after the first, inside the block: it ends a worker that waits for another one
    that is gone. In an elastic job of Horovod only the workers that got the signal leave, after all have saved.

    Args:
      save: ``save()``, called on all workers at the same step; it may be collective.
      every: steps between two exchanges of one number, at least 1.
      backend: see ``distpad.backends.resolve``.

    Raises:
      TypeError: ``save`` is not callable, or ``every`` is no integer.
      ValueError: ``every`` is below 1.

    >>> saved = []
    >>> with Preemption(lambda: saved.append("now"), every=2) as preemption:
    ...     for done in range(1, 4):
    ...         preemption.step(done)  # after step number ``done``
    >>> saved
    []
    """

    def __init__(self, save: Callable[[], Any], *, every: int = 10, backend: Any = None) -> None:
        if not callable(save):
            raise TypeError(errors.sentence(_NAME, "save", repr(save), "a function without arguments"))
        self._save, self._every = save, errors.integer(_NAME, "every", every, least=1)
        self._backend = backends.resolve(backend, function=_NAME)
        self._noted_at: float | None = None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __enter__(self) -> Preemption:
        self._done = 0
        if threading.current_thread() is not threading.main_thread():
            remedy = "Python takes signals there alone."
            raise ValueError(errors.sentence(_NAME, "the thread", "another one", "the main thread", remedy))
        # A handler would have to wait while the main thread waits, as for a worker that is gone. A thread need not.
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
                self._agree()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            os.close(self._pipe)
            self._thread.join()
        # An elastic job that broke up: this worker cannot agree with anyone. Other errors are raised.
        if self._noted_at is not None and kind is not SystemExit and self._backend.is_elastic:
            os.kill(os.getpid(), signal.SIGTERM)

    def step(self, done: int) -> None:
        """Save and leave where any worker got SIGTERM. Call it after each step.

        Args:
          done: the number of steps that are done, the same on all workers.

        Raises:
          SystemExit: of code 143, after ``save``.
          ValueError: on all workers, if they meet at different steps. TypeError: ``done`` is no integer.

        Collective in each step whose number is a multiple of ``every``, and at the end of the block: one exchange.
        """
        self._done = errors.integer(_NAME, "done", done, least=0)
        if self._done % self._every == 0:
            self._agree()

    def _agree(self) -> None:
        noted = self._noted_at is not None
        anyone, most, least = self._backend.host_max(np.array([int(noted), self._done, -self._done]))
        if most != -least:
            # Workers that leave their loops at different steps would wait for each other later, or save two states.
            remedy = "End the loop under a condition that all workers share."
            found = f"{self._done} on worker {self._backend.worker_index}"
            rule = f"the same on all workers (they are at {-least} to {most})"
            raise ValueError(errors.sentence(_NAME, "done", found, rule, remedy))
        if not anyone:
            return
        self._save()
        if self._backend.is_elastic and not noted:
            return  # the others go on, as after any loss of a worker
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
