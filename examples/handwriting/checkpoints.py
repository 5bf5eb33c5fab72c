"""Checkpoints: weights, optimiser and the place in the data; written by worker 0, read by all."""

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
PLACE_BYTES = 1024  # of the place in the data, as JSON


def found(folder: Path) -> str | None:
    """The last checkpoint that this worker finds."""
    return tf.train.latest_checkpoint(str(folder))


def exist(engine: Engine, folder: Path) -> bool:
    """Whether worker 0 finds one. The others may not see its folder, and take its word. Collective."""
    here = engine.worker == 0 and found(folder) is not None
    return bool(engine.backend.host_max(np.array([int(here)]))[0])


class Checkpoints:
    """The checkpoints of one training.

    Args:
        learner: what is saved and restored.
        batches: what it trains on, of which the place is kept.
        folder: for worker 0. Under MultiWorkerMirroredStrategy all workers take part in saving; the others write to a
            folder that is thrown away.
    """

    def __init__(self, learner: Learner, batches: distpad.PaddedBatches, folder: Path):
        self.engine = learner.engine
        self.batches = batches
        self.folder = folder
        self._thrown_away = None if self.engine.worker == 0 else tempfile.TemporaryDirectory()
        where = str(folder) if self._thrown_away is None else self._thrown_away.name
        with self.engine.scope():
            # as numbers, since engines broadcast neither strings nor bytes
            self._place = tf.Variable(_as_bytes({}), trainable=False, name="place")
        self._checkpoint = tf.train.Checkpoint(model=learner.model, optimizer=learner.optimizer, place=self._place)
        self._manager = tf.train.CheckpointManager(self._checkpoint, where, max_to_keep=KEEP)

    def save(self, step: int) -> None:
        """All workers call this at the same step."""
        self._place.assign(_as_bytes(self.batches.state_dict()))
        if self.engine.worker == 0 or self.engine.strategy is not None:
            self._manager.save(checkpoint_number=step)

    def load(self) -> None:
        """Go back to the last checkpoint, this worker for itself.

        Raises:
            ValueError: there is none.
        """
        self._read()
        self._move()

    def restore(self) -> None:
        """Go back to the last checkpoint. Horovod's other ranks get the weights from rank 0 (``Learner.broadcast``).

        Raises:
            ValueError: there is none.
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
    """A state as the bytes of its JSON, filled up with spaces, which JSON ignores."""
    return np.frombuffer(json.dumps(state).encode().ljust(PLACE_BYTES), np.uint8).astype(np.int32)
