"""SIGTERM while it trains: all workers save at one step, and leave together.

It comes where a node is drained, a job's time is over, or another job takes its place: to one worker or to all, and
hardly at one moment. But saving is collective, and no worker can train without the others. So who gets it takes note,
and every few steps, where the loss is exchanged anyway, all agree whether anyone has got it. The time that launchers
give (``--grace-s``) has to last for so many steps and a checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np

from distpad.backends import horovod
from handwriting.engines import Engine

EXIT_CODE = 128 + signal.SIGTERM
ONE_S = 5.0  # several within it are one: Slurm, and launchers that pass it on, may send it twice


def end_at_sigterm() -> None:
    """Let SIGTERM end this process, after the engine has started: TensorFlow's workers take it, and do nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Watch:
    """Takes note of SIGTERM in a ``with`` block, around the loop that saves. Elsewhere it ends the process at once.

    One that comes more than ONE_S seconds after the first ends the process here, too.

    Args:
        engine: who trains together.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.told_at: float | None = None

    def __enter__(self) -> Watch:
        # A handler would have to wait while the main thread waits, as for a worker that is gone. A thread need not.
        reads, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._thread = threading.Thread(target=self._listen, args=(reads,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        end_at_sigterm()
        signal.set_wakeup_fd(-1)
        os.close(self._pipe)
        self._thread.join()
        # Too late to agree: all is saved, or an elastic job has broken up. Other errors are to be seen.
        if self.told_at is not None and (kind is None or horovod.is_elastic()):
            os.kill(os.getpid(), signal.SIGTERM)

    def _listen(self, reads: int) -> None:
        with open(reads, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] != signal.SIGTERM:
                    continue
                if self.told_at is None:
                    self.told_at = time.monotonic()
                elif time.monotonic() > self.told_at + ONE_S:
                    os._exit(EXIT_CODE)

    def anyone(self) -> bool:
        """Whether any worker has been told to end. Collective."""
        told = self.told_at is not None
        if self.engine.backend.num_workers == 1:
            return told
        return bool(self.engine.backend.host_max(np.array([int(told)]))[0])

    def leave(self, step: int) -> None:
        """End this process, after all have agreed and saved this step; in an elastic job only one that was told to, and
        the others go on as after any loss."""
        elastic = horovod.is_elastic()
        if elastic and self.told_at is None:
            return
        self.told_at = None
        if elastic or self.engine.worker == 0:
            print(f"train.py: SIGTERM: step {step} is saved. --resume goes on there.", flush=True)
        self.engine.backend.close()
        raise SystemExit(EXIT_CODE)
