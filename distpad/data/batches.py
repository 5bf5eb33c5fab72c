"""PaddedBatches: read ahead, agree on a window's plan, pad, and hand over: a step has no collective of its own."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from distpad import backends, errors
from distpad.data import config, epoch, feeder, keras, progress, reader, sources, sync
from distpad.data.collate import Batch
from distpad.data.schema import Name, Pad
from distpad.data.stats import PaddingStats
from distpad.padding.buckets import Buckets

_NAME = "PaddedBatches"
_BOUNDARIES = 8  # for the lengths of a sampler


class PaddedBatches:
    """Batches of this worker's examples, padded alike on all replicas of all workers, with the global counts.

    A thread reads ``lookahead`` steps ahead. Then all workers agree on these steps in one small exchange: how long each
    is padded, how many valid positions it has on all replicas, and where the epoch ends. Another thread pads and moves
    to the devices what comes next. The step itself then has static shapes and the exact denominator:

        for batch in batches:
            strategy.run(step, args=(batch,))  # loss_fn(..., lengths=..., denominator=batch.counts)

    Iterating it again is the next epoch. Every example is seen exactly once in each; where workers hold different
    numbers of them, those that ran out get rows that do not count until all are done.

    Args:
      source: this worker's examples: a ``tf.data.Dataset`` of unbatched elements, an iterable of dicts (or tuples, or
        single arrays), or ``(indexable, sampler)`` with a ``LengthSampler``. To be iterated again for each epoch.
      batch_size: examples per replica; None with a sampler.
      padding: feature names to ``Pad``. A feature of a tuple is named by its place, a single one 0.
      tokens: the padded feature whose valid positions the loss averages over; or a mapping from losses to features.
      weights: a feature with sample weights, one a position or one an example: then counts are sums of weights, and the
        loss must be given the weights. With several losses, a mapping from those that are weighted.
      buckets: what lengths are rounded up to, so that a step has few shapes. ``"auto"``: where a sampler plans by a
        length, its buckets or the best 8 boundaries for all its lengths (with ``max_tokens`` and without buckets, the
        longest); else ``Buckets.auto()``, alike for sizes that are at most two boundaries apart. A ``Buckets`` for
        all features, or a mapping with equally many boundaries: a step uses the highest that a feature needs. None: to
        the longest, exactly.
      lookahead: steps that are planned at once; rounded up to whole groups of ``accumulation_steps``.
      accumulation_steps: micro-batches that make up one optimiser step; ``counts`` are over all of them. The last group
        of an epoch is filled up with batches that do not count.
      drop_remainder: end an epoch before the first optimiser step that is not full on all replicas.
      replicated: allow all workers to read the same examples; with a sampler they never do.
      backend: see ``distpad.backends.resolve``.
      warn_after_s: seconds after which all workers are warned of one whose source is slow.
      timeout_s: seconds after which waiting for it, or for a worker that does not come, is an error.

    Raises:
      ValueError, TypeError: wrong arguments; while iterating, on all workers, configurations or examples that differ
        between them, and workers that all read the same examples.
      PeerError: while iterating, when another worker failed, was too slow, or left.

    Iterating is collective among workers: one exchange of a few numbers a step, for ``lookahead`` steps at once. All
    workers leave a loop at the same step.

    >>> source = [{"y": [1, 2, 3]}, {"y": [4]}, {"y": [5, 6]}]
    >>> batches = PaddedBatches(source, 2, padding={"y": Pad()}, tokens="y", buckets=None)
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
        buckets: Any = "auto",
        lookahead: int = 32,
        accumulation_steps: int = 1,
        drop_remainder: bool = False,
        replicated: bool = False,
        backend: Any = None,
        warn_after_s: float = 60.0,
        timeout_s: float = 600.0,
    ) -> None:
        self._backend, self._is_detected = backends.resolve(backend, function=_NAME), backend is None
        self._source, self._sampler = sources.checked(source, batch_size, drop_remainder)
        self._config = config.checked(
            batch_size=batch_size,
            padding=padding,
            tokens=tokens,
            weights=weights,
            buckets=buckets,
            lookahead=lookahead,
            accumulation_steps=accumulation_steps,
            drop_remainder=drop_remainder,
            replicated=replicated or self._sampler is not None,  # a sampler never deals an example twice
            warn_after_s=warn_after_s,
            timeout_s=timeout_s,
        )
        self.stats = PaddingStats()
        self._opened = 0
        self._progress = progress.Progress(self._make_epoch)
        self._requests = feeder.Requests(self._backend, self._config, self._progress)

    def __iter__(self) -> Iterator[Batch]:
        self._check_engine()
        self._requests.leave()
        yield from self._progress.consume(
            self._progress.open()
        )  # opened by the first batch: an iterator that nobody uses has no threads

    def __bool__(self) -> bool:
        return True  # whether or not its length is known

    def _check_engine(self, *, of_workers: bool = False) -> None:
        """Raise where an engine is active now that was not when this was made: each replica, or with ``of_workers``
        each worker, would train on batches and counts of one that knows nothing of the others."""
        if not self._is_detected:
            return
        now = None
        with contextlib.suppress(ValueError, errors.DistpadError):  # outside of the scope that it was made in
            now = backends.resolve(function=_NAME)
        what = "workers" if of_workers else "replicas"
        if now is not None and getattr(now, f"num_{what}") > getattr(self._backend, f"num_{what}"):
            mine, others = getattr(self._backend, f"num_{what}"), getattr(now, f"num_{what}")
            remedy = "Make it in strategy.scope(), or after hvd.init(), or give backend=strategy."
            found = f"that of {mine} {what}, when it was made"
            raise ValueError(errors.sentence(_NAME, "backend", found, f"that of the {others} {what} now", remedy))

    def _make_epoch(self, cursor: epoch.Cursor, elements: keras.Elements | None) -> epoch.Epoch:
        number, step, begins = cursor
        samples = self._sampler is not None
        checked = 1 if samples else min(step, len(begins)) if step else epoch.BEGINNING
        return epoch.Epoch(
            self._backend,
            self._config,
            lambda: self._steps(number, step, checked if step else 0),
            cursor=cursor,
            features=self._progress.features,
            stats=self.stats,
            compared={"source": self._belongs_to(), "for_keras": str(elements)},
            beginning=reader.Beginning(None if samples else self._backend.worker_index, checked),
            sizes_of=functools.partial(self._padded_sizes, number),
            to_device=elements.of if elements else None,
            channel=elements.channel if elements else sync.Channel(),
            repeats=bool(elements and elements.repeats),
        )

    def for_keras(self, *, x: Any, y: Any, repeat: bool = False) -> Any:
        """A ``tf.data.Dataset`` of this worker's batches for ``fit``: ``(x, y, weights)``. Each iteration is an epoch.

        The weights are the mask of the ``tokens`` feature, times its ``weights``: so ``DistributedLoss`` averages over
        what counts, and plain losses and weighted metrics leave padding out.

            model.compile(loss=distpad.DistributedLoss(...), ...)
            model.fit(batches.for_keras(x="image", y="text"), epochs=3)

        Args:
          x, y: a feature's name, or a list, tuple or dict of names: what the model takes and is held against. The name
            of a part of an example stands for all features in it. ``y=None``: for ``predict``, which then gets the real
            rows of ``x`` alone, in order (``(x,)``, without weights); of a dataset with ``y`` it is refused.
          repeat: go on with the next epoch, for ``fit(..., steps_per_epoch=...)``. With several workers of a
            MultiWorkerMirroredStrategy, Keras 2 takes nothing else.

        Returns:
          A ``tf.data.Dataset`` of ``(x, y, weights)``; with several workers of a MultiWorkerMirroredStrategy, which
          would deal out a dataset once more, a ``tf.distribute.DistributedDataset`` of each replica's. Features
          ``[rows, *shape]``, the rows of this worker's replicas behind one another, as MirroredStrategy deals them out;
          weights ``[rows, length]`` float32 (``[rows, n, m]`` for two ragged axes), 0 on padding and in filler rows;
          ``[rows]`` where no feature of ``y`` is padded: one label a row, such as a class; in a dict with the losses'
          names where ``tokens`` is a mapping. Its shapes are None on ragged axes and,
          with ``max_tokens``, for the rows: all lengths share one trace.

        Keras holds all epochs of one ``fit`` to the number of steps of the first. Where it varies (``max_tokens``),
        write ``repeat=True`` and ``fit(dataset, steps_per_epoch=len(batches))``: then nothing is left out. Leaving an
        epoch early goes on with the next, as in a loop. But under MirroredStrategy Keras 3 looks at a first batch in an
        iteration of its own: there an epoch that was left within the four batches that are read for it begins again.
        ``state_dict`` counts the batches that tf.data asked for: under strategies up to three more than were trained
        on, on one worker perhaps more than on another (save that of one, and load it on all); else those alone that
        ``fit`` has taken. An epoch of which no more than these were asked for begins again when ``fit`` is called
        again.

        Under Horovod, do not add ``prefetch``: who leaves an epoch must have asked for the same batches.

        What goes wrong in a source is raised by ``fit`` as a ``tf.errors.OpError`` with the original's message.

        Raises:
          ValueError: ``x`` or ``y`` is no feature, no worker has an example, or ``repeat`` is needed and was not given.
          TypeError: ``x`` or ``y`` is no name.
          And what the first iteration would raise while its first window is read.

        Collective among workers: all call it, in the same order; then as iterating.

        >>> source = [{"x": [1.0, 2.0], "y": [1, 2]}, {"x": [3.0], "y": [3]}]
        >>> batches = PaddedBatches(source, 2, padding={"x": Pad(), "y": Pad()}, tokens="y", buckets=None)
        >>> for x, y, weights in batches.for_keras(x="x", y="y"):
        ...     print(x.numpy().tolist(), y.numpy().tolist(), weights.numpy().tolist())
        [[1.0, 2.0], [3.0, 0.0]] [[1, 2], [3, 0]] [[1.0, 1.0], [1.0, 0.0]]
        """
        behavior = self._requests.behavior
        if y is None and behavior.leaves_apart:
            remedy = "Let each worker predict in a loop: for batch in batches: strategy.run(...)."
            found = f"None with {self._backend.num_workers} workers of a strategy"
            raise ValueError(errors.sentence("for_keras", "y", found, "a feature", remedy))
        if behavior.must_repeat and not repeat:
            found = f"False with {self._backend.num_workers} workers of a strategy in Keras 2"
            remedy = "Then write fit(dataset, steps_per_epoch=...)."
            raise ValueError(errors.sentence("for_keras", "repeat", found, "True", remedy))
        self._check_engine(of_workers=True)
        elements = keras.Elements(self._config, x, y, repeat, behavior.leaves_apart)
        self._requests.leave(elements)
        first = self._progress.open(elements)
        try:
            features = self._progress.features = first.begin()
            if features is None:
                raise ValueError(errors.sentence("for_keras", "source", "empty on all workers", "at least one example"))
            signature = elements.signature(features, self._rows())
        except BaseException:
            first.close()
            raise
        # predict gets no batch that only fills up a group of steps, or that follows this worker's last example
        every = self._steps_of_all()
        is_whole = self._config.accumulation_steps == self._backend.num_workers == 1
        feed = feeder.Feeder(self._progress, self._requests, elements, first, every)
        made = keras.dataset(feed, signature, every if is_whole or not elements.predicts else None, repeats=repeat)
        dataset = keras.distributed(made, self._backend)
        elements.dataset = weakref.ref(dataset)
        return dataset

    def _rows(self) -> int | None:
        """Of a batch for fit, where all have as many."""
        size = self._config.batch_size
        if self._sampler is not None and self._sampler.global_batch_size:
            size = -(-self._sampler.global_batch_size // self._backend.num_replicas)
        return size and size * self._backend.replicas_here

    def _steps_of_all(self) -> int | None:
        """Of each epoch to come, where it is known that they have as many."""
        if self._progress.at.step or (self._sampler is not None and self._sampler.max_tokens):
            return None
        return self._length()

    def __len__(self) -> int:
        """The steps of the epoch that runs or is to begin, all of them. TypeError where that is not known."""
        steps = self._length()
        if steps is None:
            raise TypeError(
                f"{_NAME}: the number of steps is not known before all are read; a LengthSampler tells it, and "
                "where there is one worker a source with a length."
            )
        return steps

    def _length(self) -> int | None:
        steps = self._known_steps()
        if steps is None:
            return None
        group = self._config.accumulation_steps
        return (steps // group if self._config.drop_remainder else -(-steps // group)) * group

    def _known_steps(self) -> int | None:
        if self._sampler is not None:
            return len(self._sampler.plan(self._progress.at.epoch))
        count = sources.count_of(self._source)
        if self._backend.num_workers > 1 or count is None:
            return None
        size = (self._config.batch_size or 1) * self._backend.num_replicas
        return count // size if self._config.drop_remainder else -(-count // size)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, for JSON: behind the last whole optimiser step whose batches were handed out. Behind the
        last of an epoch, that is the beginning of the next.

        With a sampler it holds for any number of workers; without one for as many, with sources in the same order.
        """
        at, group = self._requests.untrained() or self._progress.at, self._config.accumulation_steps
        step = at.step // group * group
        begins = list(at.begins if step else ())
        return {"epoch": at.epoch, "step": step, "begins": begins, "source": self._belongs_to()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there when iterated next: nothing is lost and nothing seen twice.

        A position within an epoch is compared with what the source gives when it is read next: its first steps must
        hold the same examples as when the position was saved. Else, as where it shuffles again in each iteration, some
        examples would be repeated and others left out.

        Raises ValueError for the state of another source, a position that there is not, or no state; when iterated
        next, on all workers, for a source that begins with other examples.
        """
        if not isinstance(state, Mapping):
            raise TypeError(errors.sentence(_NAME, "state", repr(state), "what state_dict returned"))
        missing = {"epoch", "step", "begins", "source"} - set(state)
        if missing:
            raise ValueError(errors.sentence(_NAME, "state", f"without {sorted(missing)}", "what state_dict returned"))
        mine = self._belongs_to()
        if state["source"] != mine:
            raise ValueError(errors.sentence(_NAME, "state", f"of {state['source']}", f"one of {mine}"))
        number = errors.integer(_NAME, "state's epoch", state["epoch"], least=0)
        step = errors.integer(_NAME, "state's step", state["step"], least=0)
        group = self._config.accumulation_steps
        if step % group:
            raise ValueError(
                errors.sentence(_NAME, "state's step", step, f"a multiple of accumulation_steps, which is {group}")
            )
        if self._sampler is not None and step > -(-len(self._sampler.plan(number)) // group) * group:
            rule = f"at most the {len(self._sampler.plan(number))} of epoch {number}"
            raise ValueError(errors.sentence(_NAME, "state's step", step, rule))
        if not isinstance(state["begins"], (list, tuple)) or (step and not state["begins"]):
            found = f"{state['begins']!r} at step {step}"
            rule = "fingerprints of the epoch's first steps, as state_dict returned them"
            raise ValueError(errors.sentence(_NAME, "state's begins", found, rule))
        begins = tuple(errors.integer(_NAME, "state's begins", each, least=0) for each in state["begins"])
        self._progress.stop()
        self._progress.move_to(epoch.Cursor(number, step, begins if step else ()))
        self._requests.clear()

    def _belongs_to(self) -> dict[str, Any]:
        """What a position is a position of: the plan of a sampler, or so many examples of each worker a step."""
        if self._sampler is not None:
            return {"sampler": self._sampler.fingerprint()}
        workers, replicas = self._backend.num_workers, self._backend.num_replicas
        return {"batch_size": self._config.batch_size, "workers": workers, "replicas": replicas}

    @functools.cached_property
    def _sampled(self) -> Buckets | None:
        """What the lengths of a sampler are padded to by "auto"."""
        if self._sampler is None or not len(self._sampler.lengths):
            return None
        if self._sampler.max_tokens and not self._sampler.buckets:  # it counted on no more padding than that
            return Buckets.multiples(1)
        return self._sampler.buckets or Buckets.from_lengths(self._sampler.lengths, _BOUNDARIES)

    def _padded_sizes(self, number: int, step: int, agreed: tuple[int, ...]) -> tuple[int, ...]:
        """What the axes of a step are padded to. With "auto", an axis whose longest size is the length that the sampler
        planned by has the sampler's buckets."""
        if self._sampler is None:
            return self._config.padded_sizes(agreed, None, None)
        longest = max(1, int(self._sampler.lengths[self._sampler.plan(number)[step]].max()))
        return self._config.padded_sizes(agreed, self._sampled, longest)

    def _steps(self, number: int, step: int, checks: int) -> Iterator[sources.Step]:
        """This worker's steps of an epoch, from one on, and before them the first ``checks`` to be compared. The
        reader's thread calls it."""
        here, worker = self._backend.replicas_here, self._backend.worker_index
        if self._sampler is not None:
            mine = range(worker * here, worker * here + here)
            return sources.steps_of_sampler(self._source, self._sampler, mine, self._backend.num_replicas, number, step)
        self._opened += 1
        size = self._config.batch_size or 1
        tokens = [*self._config.tokens.values()]
        examples = sources.examples_of(self._source, checks * size * here, step * size * here, self._opened, tokens)
        return sources.steps_of_examples(examples, size, here, checks, step)
