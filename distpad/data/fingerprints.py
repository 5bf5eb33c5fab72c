"""Fingerprints of examples: by which a saved position recognises its source, and workers a forgotten shard."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from distpad.padding.columns import Column

_MOST = 2**16  # elements of a column that are hashed: they tell one order of the examples from another


class Fingerprints:
    """The fingerprints of an epoch's first steps, and a hash of a worker's first examples.

    Args:
      worker: this worker, whose examples count in their order. None with a sampler: then the order does not count,
        because it depends on the number of workers.
      steps: the number of steps that have fingerprints.
      compares: whether workers compare their first examples.

    Attributes:
      begins: the fingerprints of the first step, of the first two steps, and so on.
    """

    def __init__(self, worker: int | None, steps: int, compares: bool) -> None:
        self.steps, self.begins = steps, list[float]()
        self._worker, self._compares, self._rows = worker, compares, 0
        self._hashed = hashlib.blake2b(str(worker).encode(), digest_size=4)
        self._compared = hashlib.blake2b(digest_size=6)

    def add(self, columns: Sequence[Column], indices: np.ndarray, *, compares: bool) -> None:
        """Add the next step; ``compares``: to the examples that workers compare, too."""
        if compares and self._compares:
            self._rows += len(indices)
            _update(self._compared, columns)
        if len(self.begins) == self.steps:
            return
        if self._worker is not None:
            _update(self._hashed, columns)
            total = int.from_bytes(self._hashed.digest(), "big")
        else:
            total = 0
            for row, index in enumerate(indices):
                hashed = hashlib.blake2b(str(index).encode(), digest_size=4)
                _update(hashed, [column.between(row, row + 1) for column in columns])
                total += int.from_bytes(hashed.digest(), "big")
        self.begins.append(float(total))

    def at(self, step: int) -> float:
        """The fingerprint of the steps up to this one; of fewer if the epoch has no more; 0 without any."""
        return self.begins[min(step, len(self.begins) - 1)] if self.begins else 0.0

    @property
    def digest(self) -> float:
        """The hash of the first examples, 48 bits, which a float64 holds exactly; 0 without, or if not compared."""
        return float(int.from_bytes(self._compared.digest(), "big")) if self._rows else 0.0


def _update(hashed: Any, columns: Sequence[Column]) -> None:
    """Hash columns, equal numbers alike: the dtype of a list depends on the examples that were read before it."""
    for values, splits in columns:
        hashed.update(repr((len(values), values.shape[1:])).encode())
        for each in splits:
            hashed.update(np.diff(each))
        if values.dtype == object:
            leaves = values.ravel()[:_MOST].tolist()
            hashed.update(repr([leaf.encode() if isinstance(leaf, str) else leaf for leaf in leaves]).encode())
        else:
            head = np.ascontiguousarray(values).reshape(-1)[:_MOST]
            hashed.update(
                np.ascontiguousarray(head.astype(np.float64) if head.dtype == np.int64 else head).view(np.uint8)
            )
