"""Checkpoints of weights, optimiser and position in the data. Worker 0 writes them, all workers read them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf

import distpad
from handwriting.engines import Engine
from handwriting.learner import Learner

KEEP = 2
PLACE_BYTES = 1024  # size of the position in the data, as JSON


def found(folder: Path) -> str | None:
    """Return the path of the last checkpoint that this worker finds, or None."""
    return tf.train.latest_checkpoint(str(folder))


def exist(engine: Engine, folder: Path) -> bool:
    """Return whether worker 0 finds a checkpoint. The other workers may not see its folder. Collective."""
    here = engine.worker == 0 and found(folder) is not None
    return bool(engine.backend.host_max(np.array([int(here)]))[0])


class Checkpoints:
    """The checkpoints of one training.

    Args:
        learner: the model and optimiser to save and restore.
        batches: the training batches; a checkpoint keeps the position in them.
        folder: worker 0 writes here. Under MultiWorkerMirroredStrategy all workers save; the other workers write to a
            temporary folder.
    """

    def __init__(self, learner: Learner, batches: distpad.PaddedBatches, folder: Path):
        self.engine = learner.engine
        self.batches = batches
        self.folder = folder
        self._thrown_away = None if self.engine.worker == 0 else tempfile.TemporaryDirectory()
        where = str(folder) if self._thrown_away is None else self._thrown_away.name
        with self.engine.scope():
            # engines broadcast neither strings nor bytes, so the position is stored as integers
            self._place = tf.Variable(_as_bytes({}), trainable=False, name="place")
        self._checkpoint = tf.train.Checkpoint(model=learner.model, optimizer=learner.optimizer, place=self._place)
        self._manager = tf.train.CheckpointManager(self._checkpoint, where, max_to_keep=KEEP)

    def save(self, step: int) -> None:
        """Save a checkpoint. Collective: all workers call this at the same step."""
        self._place.assign(_as_bytes(self.batches.state_dict()))
        if self.engine.worker == 0 or self.engine.strategy is not None:
            self._manager.save(checkpoint_number=step)

    def load(self) -> None:
        """Restore the last checkpoint on this worker alone.

        Raises:
            ValueError: the folder holds no checkpoint.
        """
        self._read()
        self._move()

    def restore(self) -> None:
        """Restore the last checkpoint. Under Horovod, ``Learner.broadcast`` sends rank 0's weights to the other ranks.

        Raises:
            ValueError: the folder holds no checkpoint.
        """
        if self.engine.worker == 0 or self.engine.strategy is not None:
            self._read()
        distpad.broadcast_variables([self._place], backend=self.engine.backend)
        self._move()

    def _read(self) -> None:
        latest = found(self.folder)
        if latest is None:
            raise ValueError(f"--resume: {self.folder} holds no checkpoint. Leave --resume out to start again.")
        self._checkpoint.restore(latest).assert_existing_objects_matched()

    def _move(self) -> None:
        self.batches.load_state_dict(json.loads(self._place.numpy().astype(np.uint8).tobytes()))


def _as_bytes(state: dict) -> np.ndarray:
    """Return the bytes of a state's JSON, padded with spaces. JSON ignores trailing spaces."""
    return np.frombuffer(json.dumps(state).encode().ljust(PLACE_BYTES), np.uint8).astype(np.int32)
