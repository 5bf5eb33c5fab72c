"""Checkpoints: weights, optimiser and with them the step; written by worker 0, read by all."""

from __future__ import annotations

import tempfile
from pathlib import Path

import tensorflow as tf

from handwriting.learner import Learner

KEEP = 2


class Checkpoints:
    """The checkpoints of one training.

    Args:
        learner: what is saved and restored.
        folder: for worker 0. Under MultiWorkerMirroredStrategy all workers take part in saving; the others write to a
            folder that is thrown away.
    """

    def __init__(self, learner: Learner, folder: Path):
        self.engine = learner.engine
        self.folder = folder
        self._thrown_away = None if self.engine.worker == 0 else tempfile.TemporaryDirectory()
        where = str(folder) if self._thrown_away is None else self._thrown_away.name
        # The optimiser counts the steps, and the data of a step depend on its number alone: no more is to be saved.
        self._checkpoint = tf.train.Checkpoint(model=learner.model, optimizer=learner.optimizer)
        self._manager = tf.train.CheckpointManager(self._checkpoint, where, max_to_keep=KEEP)

    def save(self, step: int) -> None:
        """All workers call this at the same step."""
        if self.engine.worker == 0 or self.engine.strategy is not None:
            self._manager.save(checkpoint_number=step)

    def restore(self) -> None:
        """Go back to the last checkpoint. Horovod's other ranks get it from rank 0 (``Learner.broadcast``).

        Raises:
            ValueError: there is none.
        """
        if self.engine.worker > 0 and self.engine.strategy is None:
            return
        latest = tf.train.latest_checkpoint(str(self.folder))
        if latest is None:
            raise ValueError(f"--resume: {self.folder} holds no checkpoint. Leave --resume out to start anew.")
        self._checkpoint.restore(latest).assert_existing_objects_matched()
