"""PaddedBatches: read ahead, agree on a window's plan, pad, and hand over: a step has no collective of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf

from distpad import backends, errors
from distpad.pipeline import epoch, reading, recipe
from distpad.pipeline.features import Features, Name, Pad
from distpad.pipeline.ledger import Ledger
from distpad.pipeline.padder import Batch
from distpad.sampling import LengthSampler

_NAME = "PaddedBatches"


class PaddedBatches:
    """Batches of this worker's examples, padded alike on all replicas of all workers, with the global counts.

    A thread reads ``window`` steps ahead. Then all workers agree on these steps in one small exchange: how long each is
    padded, how many valid positions it has on all replicas, and where the epoch ends. Another thread pads and moves to
    the devices what comes next. The step itself then has static shapes and the exact denominator:

        for batch in batches:
            strategy.run(step, args=(batch,))  # loss_fn(..., lengths=..., denominator=batch.counts)

    Iterating it again is the next epoch. Every example is seen exactly once in each; where workers hold different
    numbers of them, those that ran out get rows that do not count until all are done.

    Args:
      source: this worker's examples: a ``tf.data.Dataset`` of unbatched elements, an iterable of dicts (or tuples, or
        single arrays), or ``(indexable, sampler)`` with a ``LengthSampler``. To be iterated anew for each epoch.
      batch_size: examples per replica; None with a sampler.
      padding: feature names to ``Pad``. A feature of a tuple is named by its place, a single one 0.
      tokens: the padded feature whose valid positions the loss averages over; or a mapping from losses to features.
      weights: a feature with sample weights, one a position or one an example: then counts are sums of weights, and the
        loss must be given the weights. With several losses, a mapping from those that are weighted.
      ladder: what lengths are rounded up to, one for all features or a mapping with equally many rungs.
      window: steps that are planned at once; rounded up to whole groups of ``accumulate``.
      accumulate: micro-batches that make up one optimiser step; ``counts`` are over all of them. The last group of an
        epoch is filled up with batches that do not count.
      drop_remainder: end an epoch before the first optimiser step that is not full on all replicas.
      replicated: allow all workers to read the same examples; with a sampler they never do.
      backend: see ``distpad.backends.resolve``.
      slow_after_s: seconds after which all workers are warned of one whose source is slow.
      limit_s: seconds after which waiting for it, or for a worker that does not come, is an error.

    Raises:
      ValueError, TypeError: wrong arguments; while iterating, on all workers, configurations or examples that differ
        between them, and workers that all read the same examples.
      PeerError: while iterating, when another worker failed, was too slow, or left.

    Iterating is collective among workers: one exchange of a few numbers a step, for ``window`` steps at once. All
    workers leave a loop at the same step.

    >>> source = [{"y": [1, 2, 3]}, {"y": [4]}, {"y": [5, 6]}]
    >>> batches = PaddedBatches(source, 2, padding={"y": Pad()}, tokens="y", backend="local")
    >>> for batch in batches:
    ...     print(batch.data["y"].numpy().tolist(), batch.lengths["y"].numpy(), float(batch.counts.tokens))
    [[1, 2, 3], [4, 0, 0]] [3 1] 4.0
    [[5, 6], [0, 0]] [2 0] 2.0
    """

    def __init__(
        self,
        source: Any,
        batch_size: int | None = None,
        *,
        padding: Mapping[Name, Pad],
        tokens: Any,
        weights: Any = None,
        ladder: Any = None,
        window: int = 32,
        accumulate: int = 1,
        drop_remainder: bool = False,
        replicated: bool = False,
        backend: Any = None,
        slow_after_s: float = 60.0,
        limit_s: float = 600.0,
    ) -> None:
        self._backend = backends.resolve(backend, function=_NAME)
        self._source, self._sampler = _checked_source(source, batch_size, drop_remainder)
        self._recipe = recipe.checked(
            batch_size=batch_size,
            padding=padding,
            tokens=tokens,
            weights=weights,
            ladder=ladder,
            window=window,
            accumulate=accumulate,
            drop_remainder=drop_remainder,
            replicated=replicated or self._sampler is not None,  # a sampler never deals an example twice
            slow_after_s=slow_after_s,
            limit_s=limit_s,
        )
        self.ledger = Ledger()
        self._features: Features | None = None
        self._epoch = self._step = self._opened = 0
        self._begun = False
        self._running: epoch.Epoch | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._running is not None:  # all workers have left that loop
            self._running.close()
        if self._begun:
            self._epoch, self._step = self._epoch + 1, 0
        self._begun = True
        running = epoch.Epoch(
            self._backend,
            self._recipe,
            lambda number=self._epoch, step=self._step: self._steps(number, step),  # type: ignore[misc]
            features=self._features,
            ledger=self.ledger,
            position={"source": self._belongs_to(), "epoch": self._epoch, "step": self._step},
        )
        self._running = running
        return self._consume(running)

    def _consume(self, running: epoch.Epoch) -> Iterator[Batch]:
        try:
            for batch in running.batches():
                self._features = running.features
                self._step += 1  # before it is handed out: who saves while training on it has consumed it
                yield batch
            if running is self._running:
                self._epoch, self._step, self._begun = self._epoch + 1, 0, False
        finally:
            running.close()

    def __len__(self) -> int:
        """The steps of the epoch that runs or is to begin, all of them. TypeError where that is not known."""
        steps = self._known_steps()
        if steps is None:
            raise TypeError(
                f"{_NAME}: the number of steps is not known before all are read; a LengthSampler tells it, and "
                "where there is one worker a source with a length."
            )
        group = self._recipe.accumulate
        return (steps // group if self._recipe.drop_remainder else -(-steps // group)) * group

    def _known_steps(self) -> int | None:
        if self._sampler is not None:
            return len(self._sampler.plan(self._epoch))
        count = _count_of(self._source)
        if self._backend.num_workers > 1 or count is None:
            return None
        size = (self._recipe.batch_size or 1) * self._backend.num_replicas
        return count // size if self._recipe.drop_remainder else -(-count // size)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, for JSON: behind the last whole optimiser step whose batches were handed out.

        With a sampler it holds for any number of workers; without one for as many, with sources in the same order.
        """
        group = self._recipe.accumulate
        return {"epoch": self._epoch, "step": self._step // group * group, "source": self._belongs_to()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there when iterated next: nothing is lost and nothing seen twice.

        Raises ValueError for the state of another source, or no state.
        """
        missing = {"epoch", "step", "source"} - set(state)
        if missing:
            raise ValueError(errors.sentence(_NAME, "state", f"without {sorted(missing)}", "what state_dict returned"))
        mine = self._belongs_to()
        if state["source"] != mine:
            raise ValueError(errors.sentence(_NAME, "state", f"of {state['source']}", f"one of {mine}"))
        self._epoch = errors.whole_number(_NAME, "state's epoch", state["epoch"], least=0)
        self._step = errors.whole_number(_NAME, "state's step", state["step"], least=0)
        self._begun = False

    def _belongs_to(self) -> dict[str, Any]:
        """What a position is a position of: the plan of a sampler, or so many examples of each worker a step."""
        if self._sampler is not None:
            return {"sampler": self._sampler.fingerprint()}
        workers, replicas = self._backend.num_workers, self._backend.num_replicas
        return {"batch_size": self._recipe.batch_size, "workers": workers, "replicas": replicas}

    def _steps(self, number: int, step: int) -> Iterator[reading.Step]:
        """This worker's steps of an epoch, from one on. The reader's thread calls it."""
        here, worker = self._backend.replicas_here, self._backend.worker_index
        if self._sampler is not None:
            mine = range(worker * here, worker * here + here)
            return reading.steps_of_sampler(self._source, self._sampler, mine, self._backend.num_replicas, number, step)
        self._opened += 1
        size = self._recipe.batch_size or 1
        first = step * size * here
        return reading.steps_of_examples(_examples(self._source, first, self._opened), size, here, first)


def _checked_source(source: Any, batch_size: Any, drop_remainder: bool) -> tuple[Any, LengthSampler | None]:
    """The examples, and the sampler that picks from them."""
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], LengthSampler):
        indexable, sampler = source
        if batch_size is not None:
            raise ValueError(errors.sentence(_NAME, "batch_size", batch_size, "None: the sampler decides"))
        if drop_remainder:
            raise ValueError(
                errors.sentence(_NAME, "drop_remainder", True, "False with a sampler, which drops nothing")
            )
        if not hasattr(indexable, "__getitem__"):
            raise TypeError(errors.sentence(_NAME, "source", type(indexable).__name__, "examples to be had by index"))
        count = len(indexable) if hasattr(indexable, "__len__") else None
        if count is not None and count < len(sampler.lengths):
            found = f"of {count} examples"
            raise ValueError(errors.sentence(_NAME, "source", found, f"{len(sampler.lengths)}, as the sampler has"))
        return indexable, sampler
    if not hasattr(source, "__iter__"):
        remedy = "A function that makes a generator? Wrap it in a class with __iter__." if callable(source) else ""
        kinds = "a tf.data.Dataset, an iterable, or (indexable, LengthSampler)"
        raise TypeError(errors.sentence(_NAME, "source", type(source).__name__, kinds, remedy))
    if batch_size is None:
        raise ValueError(errors.sentence(_NAME, "batch_size", None, "examples per replica; only a sampler decides it"))
    return source, None


def _examples(source: Any, first: int, opened: int) -> Iterator[Any]:
    """A source's examples from one on; ``opened`` counts how often it was iterated."""
    if isinstance(source, tf.data.Dataset):
        return iter(source.skip(first).as_numpy_iterator())
    examples = iter(source)
    if examples is source and opened > 1:
        remedy = "Give a list, a tf.data.Dataset, or an object whose __iter__ begins anew."
        found = f"an iterator ({type(source).__name__}), used up by the first epoch"
        raise ValueError(errors.sentence(_NAME, "source", found, "something to be iterated again", remedy))
    return itertools.islice(examples, first, None) if first else examples


def _count_of(source: Any) -> int | None:
    """How many examples there are, where that is known."""
    if isinstance(source, tf.data.Dataset):
        count = int(source.cardinality())
        return count if count >= 0 else None
    return len(source) if hasattr(source, "__len__") else None
