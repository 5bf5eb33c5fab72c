"""Saving: checkpoints that are whole or not there, and the end of all workers at one step after SIGTERM."""

from distpad.saving.checkpoints import Checkpoints
from distpad.saving.preemption import Preemption

__all__ = ["Checkpoints", "Preemption"]
