"""PaddingStats: the causes of padding, and the time that training waited for data."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_CAUSES = ("own_batch", "global_maximum", "buckets", "filler_rows")
_ATTRIBUTES = ("skipped_examples", "truncated_examples", "truncated_positions", "count_variation")
_WAITS = ("plan_seconds", "source_seconds", "padding_seconds")
_TABLE = {  # of each figure: what it is, and its format
    "real": ("real positions", ">14,"),
    "own_batch": ("padding to the longest of the replica's rows", ">14,"),
    "global_maximum": ("padding to the longest of all replicas", ">14,"),
    "buckets": ("padding to the boundary of the buckets", ">14,"),
    "filler_rows": ("filler rows", ">14,"),
    "steps": ("steps", ">14,"),
    "shapes": ("distinct shapes", ">14,"),
    "skipped_examples": ("skipped examples, of all workers", ">14,"),
    "truncated_examples": ("truncated examples", ">14,"),
    "truncated_positions": ("positions that they lost", ">14,"),
    "count_variation": ("variation of the global count", ">14.1%"),
    "plan_seconds": ("waited for the plan", ">12.2f"),
    "source_seconds": ("waited for the source", ">12.2f"),
    "padding_seconds": ("waited for padding", ">12.2f"),
}


class Skipped(NamedTuple):
    """An example that ``PaddedBatches(on_error="skip")`` left out.

    Attributes:
      worker: the worker that read it.
      example: its index in the source, which without a sampler is the worker's own.
      reason: the class and the message of the error, at most 256 characters.
    """

    worker: int
    example: int
    reason: str


class PaddingStats:
    """Counts the real and padded positions of this worker's batches, over all ragged features.

    A position is an element of a feature's ragged axes. Each padded position counts under the first of four causes:
    ``own_batch``, up to the longest row of the replica; ``global_maximum``, from there to the longest row of all
    replicas; ``buckets``, from there to the boundary; ``filler_rows``, at the end of an epoch. Positions that
    ``Pad(max_length=...)`` cuts are no positions of the batch: they count as ``truncated_positions``.

    Attributes:
      skipped: the examples that ``on_error="skip"`` left out of the consumed steps, by ``worker``, ``example``
        and ``reason``: the same on all workers.

    >>> import numpy as np
    >>> stats = PaddingStats()
    >>> stats.add_replica([np.array([[3], [1]])], agreed=(4,), sizes=(8,), batch_size=3)
    >>> {cause: count for cause, count in stats.as_dict().items() if cause in ("real", "own_batch", "buckets")}
    {'real': 4, 'own_batch': 2, 'buckets': 8}
    """

    def __init__(self) -> None:
        self.real = 0
        self.padding = dict.fromkeys(_CAUSES, 0)
        self.steps = self.truncated_examples = self.truncated_positions = 0
        self.skipped: list[Skipped] = []
        self.shapes: set[tuple[int, ...]] = set()
        self.plan_seconds = self.source_seconds = self.padding_seconds = 0.0
        self._counts = [0.0, 0.0, 0.0]  # number of groups, mean of their counts, sum of squared distances from the mean

    def add_replica(self, features: Any, agreed: tuple[int, ...], sizes: tuple[int, ...], batch_size: int) -> None:
        """Add one replica's step.

        Args:
          features: for each padded feature, the real sizes ``[rows, axes]``.
          agreed, sizes: longest and padded sizes of all ragged axes, in the order of the features.
          batch_size: rows of the batch, filler rows included.
        """
        self.shapes.add((batch_size, *sizes))
        at = 0
        for table in features:
            rows, axes = table.shape
            here = slice(at, at + axes)
            at += axes
            real = int(table.sum() if axes == 1 else table.prod(axis=1).sum())
            own = rows * int(table.max() if axes == 1 else table.max(axis=0).prod()) if rows else 0
            together, boundary = rows * math.prod(agreed[here]), rows * math.prod(sizes[here])
            self.real += real
            steps = (own - real, together - own, boundary - together, batch_size * math.prod(sizes[here]) - boundary)
            for cause, count in zip(_CAUSES, steps):
                self.padding[cause] += count

    def add(self, other: PaddingStats) -> None:
        """Add the positions and shapes of other batches."""
        self.real += other.real
        for cause, count in other.padding.items():
            self.padding[cause] += count
        self.truncated_examples += other.truncated_examples
        self.truncated_positions += other.truncated_positions
        self.shapes |= other.shapes

    def add_skipped(self, skipped: Iterable[Skipped]) -> None:
        """Add the examples that a step of all workers left out."""
        self.skipped += skipped

    @property
    def skipped_examples(self) -> int:
        """The number of skipped examples, over all workers."""
        return len(self.skipped)

    def add_truncated(self, lost: Any) -> None:
        """Add a step's examples, by the positions that each lost to the ``max_length`` of its features."""
        self.truncated_examples += int((lost > 0).sum())
        self.truncated_positions += int(lost.sum())

    def add_group(self, tokens: float) -> None:
        """Add the global count of one optimiser step."""
        number, mean, squares = self._counts
        distance = tokens - mean
        mean += distance / (number + 1)
        self._counts = [number + 1, mean, squares + distance * (tokens - mean)]

    @property
    def count_variation(self) -> float:
        """The standard deviation of the steps' global counts, divided by their mean.

        If it is large, ``average="token"`` gives tokens in steps with few tokens more weight; a constant ``average``
        does not.
        """
        number, mean, squares = self._counts
        return math.sqrt(squares / number) / mean if number and mean else 0.0

    def state_dict(self) -> dict[str, Any]:
        """All counts, for ``continue_from``: numbers, lists, tuples and dicts."""
        return {name: sorted(held) if isinstance(held, set) else copy.copy(held) for name, held in vars(self).items()}

    def continue_from(self, saved: Sequence[Mapping[str, Any]], worker_index: int, num_workers: int) -> None:
        """Continue the counts of all workers, given as their ``state_dict``, in worker order.

        On another number of workers, worker 0 continues the sum of all positions, and the others begin theirs at 0.
        """
        is_same = len(saved) == num_workers
        for name, held in saved[worker_index if is_same else 0].items():
            setattr(self, name, set(held) if isinstance(getattr(self, name), set) else copy.copy(held))
        self.skipped = [Skipped(*each) for each in self.skipped]
        if is_same:
            return
        total = PaddingStats()
        for state in saved if worker_index == 0 else ():
            each = PaddingStats()
            each.continue_from([state], 0, 1)
            total.add(each)
        self.real, self.padding = total.real, total.padding
        self.truncated_examples, self.truncated_positions = total.truncated_examples, total.truncated_positions

    def as_dict(self) -> dict[str, float]:
        """All figures by name, for logs."""
        total = self.real + sum(self.padding.values())
        counted = {"steps": self.steps, "real": self.real, **self.padding}
        shares = {"real_fraction": self.real / total if total else 1.0, "shapes": len(self.shapes)}
        return {**counted, **shares, **{name: getattr(self, name) for name in (*_ATTRIBUTES, *_WAITS)}}

    def __str__(self) -> str:
        """A table."""
        figures, total, lines = self.as_dict(), max(1, self.real + sum(self.padding.values())), []
        for name, (text, shown) in _TABLE.items():
            unit = f"{figures[name] / total:>8.1%}" if name in ("real", *_CAUSES) else " s" if name in _WAITS else ""
            if figures[name] or not name.startswith(("skipped", "truncated")):
                lines.append(f"{text:<46}{figures[name]:{shown}}{unit}")
        return "\n".join(lines)

    def callback(self, log_dir: str) -> Any:
        """Return a Keras callback that writes all figures as TensorBoard scalars at the end of each epoch.

        Requires the package tensorboard: ``pip install distpad[tensorboard]``.
        """
        import tensorflow as tf

        stats, writer = self, tf.summary.create_file_writer(log_dir)

        class StatsCallback(tf.keras.callbacks.Callback):
            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                stats.write(writer, epoch)

        return StatsCallback()

    def write(self, writer: Any, step: int) -> None:
        """Write all figures as scalars ``distpad/NAME`` with a ``tf.summary`` writer, in a custom loop."""
        import tensorflow as tf

        with writer.as_default():
            for name, figure in self.as_dict().items():
                tf.summary.scalar(f"distpad/{name}", figure, step=step)
        writer.flush()
