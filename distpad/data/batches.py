"""PaddedBatches: reads ahead, synchronises a window of steps between workers, and pads: the step has no collective."""

from __future__ import annotations

import contextlib
import json
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf

from distpad import backends, errors
from distpad.data import collate, config, keras, progress, sources, watch
from distpad.data.collate import Batch
from distpad.data.schema import Pad
from distpad.data.stats import PaddingStats
from distpad.data.structure import Name

_NAME = "PaddedBatches"


class PaddedBatches(tf.train.experimental.PythonState):
    """Batches of this worker's examples, padded alike on all replicas of all workers, with the global counts.

    A thread reads a window of steps ahead. Then one small exchange synchronises the window between all workers: the
    padded length of each step, its number of valid positions over all replicas, and the end of the epoch. The windows
    of an epoch have 1, 2, 4 ... and at last ``lookahead`` steps, so that the first batch does not wait for many reads.
    Another thread pads the next batches and moves them to the devices. The step itself has static shapes and the exact
    denominator:

        for batch in batches:
            strategy.run(step, args=(batch,))  # loss_fn(y_true, y_pred, batch=batch)

    Each iteration is the next epoch. An epoch yields every example exactly once. If workers hold different numbers of
    examples, a worker that has no more yields filler rows, which do not count, until all workers are done.

    Args:
      source: this worker's examples, dicts, tuples or single arrays: ``distpad.Columns``; a ``tf.data.Dataset`` of
        unbatched elements, which tf.data batches; an indexable (an object with ``__getitem__`` and ``__len__``), whose
        ``__getitems__(indices)`` is called once a step if it has one; any iterable; or ``(indexable, sampler)`` with a
        ``LengthSampler``. Each epoch reads it again. Only a list or an iterable may change between two epochs, since
        the next epoch of the others is read while the last steps of an epoch train.
      batch_size: examples per replica; None with a sampler.
      padding: mapping from feature names to ``Pad``. A feature of a tuple is named by its index, a single array 0.
      tokens: the padded feature whose valid positions the loss averages over; or a mapping from losses to features.
      weights: a feature with sample weights, one per position or one per example: then counts are sums of weights, and
        the loss needs the weights too. With several losses, a mapping from the weighted losses to features.
      buckets: the lengths to which batches are padded, so that a step has few shapes. ``"auto"``: with a sampler, its
        buckets or the best 8 boundaries for its lengths (with ``max_tokens`` and without buckets, the longest length);
        else ``Buckets.auto()``, where sizes that are at most two boundaries apart share the higher one. A ``Buckets``
        for all features, or a mapping with equally many boundaries: a step uses the highest boundary that a feature
        needs. None: the longest length, exactly.
      lookahead: steps in the longest window; rounded up to a multiple of ``accumulation_steps``.
      accumulation_steps: micro-batches in one optimiser step; ``counts`` are over all of them. Batches without valid
        positions complete the last group of an epoch.
      num_parallel_reads: threads that call an indexable at once, for reads that wait for a disk or a network; batches
        keep their order. A ``tf.data.Dataset`` reads in parallel by ``map(..., num_parallel_calls=...)`` instead.
      drop_remainder: end an epoch before the first optimiser step that is not full on all replicas.
      replicated: allow all workers to read the same examples; with a sampler they never do.
      on_error: "raise" the error of an example that cannot be read or does not fit (a wrong dtype, rank or size, a
        missing feature, a weight below 0); or "skip" the example. ``stats.skipped`` then holds the skipped examples of
        all workers; filler rows take their places. The first example that is possible defines the features. An iterator
        that ends with its error, as a generator does, is an error. A ``tf.data.Dataset`` is then read element by
        element, which costs about 0.15 ms each.
      max_skipped: how many examples an epoch may skip, over all workers: a number, or below 1 a fraction of those that
        were read so far, but always 10. More are an error on all workers.
      backend: see ``distpad.backends.resolve``.
      warn_after_s: seconds after which all workers warn of a slow source, naming its worker.
      timeout_s: seconds after which a slow source, or a worker that does not come to an exchange, is an error.

    Raises:
      ValueError, TypeError: wrong arguments; while iterating, on all workers: configurations or examples that differ
        between workers, or workers that all read the same examples.
      PeerError: while iterating, if another worker failed, was too slow, or left.
      DistpadError: while iterating, on all workers: more examples were skipped than ``max_skipped``.

    Collective: all workers iterate together and leave a loop at the same step. Iterating makes one exchange per window,
    of a few numbers per step.

    The object is trackable: ``tf.train.Checkpoint(model=model, optimizer=optimizer, batches=batches)`` saves and
    restores the position in the data with the variables.

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
        num_parallel_reads: int = 1,
        drop_remainder: bool = False,
        replicated: bool = False,
        on_error: str = "raise",
        max_skipped: float = 0.01,
        backend: Any = None,
        warn_after_s: float = 60.0,
        timeout_s: float = 600.0,
    ) -> None:
        self._backend, self._is_detected = backends.resolve(backend, function=_NAME), backend is None
        options = lookahead, accumulation_steps, num_parallel_reads, drop_remainder, replicated, warn_after_s, timeout_s
        skipping = on_error, max_skipped
        self._config = config.Config(batch_size, padding, tokens, weights, buckets, *options, *skipping)
        self._source = sources.Source(source, self._backend, self._config)
        weakref.finalize(self, self._source.close_ahead, 0.0)
        self.stats = PaddingStats()
        self._watch = watch.Watch(self._backend)
        self._progress = progress.Progress(self._source, self.stats, self._watch)

    def __iter__(self) -> Iterator[Batch]:
        self._check_engine()
        self._progress.leave()
        # The first batch opens the epoch: an iterator that is never advanced starts no threads.
        yield from self._progress.consume(self._progress.open())

    def watch(self, variables: Any) -> None:
        """Compare variables between all replicas of all workers in loops, once a window and at the end of an epoch.

        A checksum of their bits travels with the window sync: only if it differs is there another exchange, which finds
        the variables and replicas. So the first comparison precedes the first step, and shows a forgotten
        ``broadcast_variables``. It reads each variable once a window. ``fit`` compares weights by itself, at the end of
        each epoch.

        Operations that are not deterministic on a GPU, such as sparse updates, may let copies drift apart by a bit,
        which is an error here too: ``tf.config.experimental.enable_op_determinism()``.

        Args:
          variables: a list of variables of TensorFlow, Keras 2 or Keras 3 that must be equal on all replicas, such as
            ``model.trainable_variables``. It replaces the list of an earlier call; an empty list ends watching.

        Raises:
          TypeError: not a list of variables of numbers.
          ValueError: variables of which each replica has its own part.
          DistpadError: in the loop over the batches, on all workers: a variable differs, or not all workers watch it.

        No collective; all workers call it before the same epoch.

        >>> weight = tf.Variable([1.0, 2.0])
        >>> batches = PaddedBatches([{"y": [1]}], 1, padding={"y": Pad()}, tokens="y")
        >>> batches.watch([weight])
        >>> len(list(batches))
        1
        """
        self._watch.set(variables)

    def repeat(self) -> Iterator[Batch]:
        """Iterate one epoch after another, without an end, for a loop that counts steps.

        Raises: ValueError: an epoch without any batch; what iterating raises. Collective among workers, as iterating.

        >>> batches = PaddedBatches([{"y": [1]}, {"y": [2]}], 1, padding={"y": Pad()}, tokens="y")
        >>> [int(batch.data["y"][0, 0]) for _, batch in zip(range(5), batches.repeat())]
        [1, 2, 1, 2, 1]
        """
        while True:
            batch = None
            for batch in self:
                yield batch
            if batch is None:
                raise ValueError(errors.sentence(_NAME, "source", "empty on all workers", "at least one example"))

    @property
    def element_spec(self) -> Batch:
        """The ``tf.TensorSpec`` of each part of one replica's batch. Sizes are None on ragged axes and where unknown.

        Raises: ValueError: an iterable of which no epoch has begun, or a source without examples. No collective.

        >>> batches = PaddedBatches([{"y": [1]}, {"y": [2, 3]}], 2, padding={"y": Pad()}, tokens="y")
        >>> batches.element_spec.data["y"].shape.as_list(), batches.element_spec.counts.tokens.dtype.name
        ([2, None], 'float64')
        """
        features = self._progress.features or self._source.features()
        if features is None:
            remedy = "Begin an epoch first."
            found = f"unknown for this {type(self._source.given).__name__}"
            raise ValueError(errors.sentence(_NAME, "element_spec", found, "known before an epoch", remedy))
        return collate.spec_of(self._config, features, self._source.rows, lambda batch: batch)

    def __bool__(self) -> bool:
        return True  # whether or not the length is known

    def _check_engine(self, *, of_workers: bool = False) -> None:
        """Raise ValueError if the active engine has more replicas (or workers) than the engine at construction.

        Each replica would train on batches and counts that ignore the other replicas.
        """
        if not self._is_detected:
            return
        now = None
        with contextlib.suppress(ValueError, errors.DistpadError):  # outside the scope of the constructor
            now = backends.resolve(function=_NAME)
        what = "workers" if of_workers else "replicas"
        before, after = (getattr(engine, f"num_{what}", 0) for engine in (self._backend, now))
        remedy = "Make PaddedBatches in strategy.scope(), or after hvd.init(), or give backend=strategy."
        found = f"an engine of {before} {what}, detected in the constructor"
        errors.require(_NAME, after <= before, "backend", found, f"the active one, of {after} {what}", remedy)

    def for_keras(self, *, x: Any, y: Any, y_true: Any = None, repeat: bool = False) -> Any:
        """Return a ``tf.data.Dataset`` of this worker's batches for ``fit``: ``(x, y, weights)``.

        Each iteration of the dataset is an epoch. The weights are the mask of the ``tokens`` feature, times its
        ``weights``: plain losses and weighted metrics ignore padding. They also carry the step's counts and lengths to
        ``DistributedLoss``.

            model.compile(loss=distpad.DistributedLoss(...), ...)
            model.fit(batches.for_keras(x="image", y="text"), epochs=3)

        Args:
          x, y: the inputs and the labels: a feature's name, or a list, tuple or dict of names. The name of a part of an
            example selects all features in that part. ``y=None`` is for ``predict``: the dataset then yields ``(x,)``,
            without filler rows, in the order of the source. ``predict`` on a dataset with ``y`` is an error.
            ``distpad.Lengths(name)`` and ``distpad.Indices()`` stand for lengths of a feature and example indices.
          y_true: names that the loss inside ``DistributedLoss`` gets as its ``y_true``, in place of ``y``: one, or a
            tuple or dict of them, where Keras takes one tensor a prediction. None: the loss gets ``y``, and ``CTC`` the
            label lengths and frames too. A mapping by loss if ``tokens`` is a mapping.
          repeat: continue with the next epoch, for ``fit(..., steps_per_epoch=...)``. Keras 2 needs it with several
            workers of a MultiWorkerMirroredStrategy.

        Returns:
          A ``tf.data.Dataset`` of ``(x, y, weights)``. With several workers of a MultiWorkerMirroredStrategy, which
          would shard a dataset again, a ``tf.distribute.DistributedDataset`` of each replica's batches. Features are
          ``[rows, *shape]``, the rows of this worker's replicas one after the other, as MirroredStrategy splits them.
          Weights are ``[rows, length]`` float32 (``[rows, n, m]`` for two ragged axes), 0 on padding and filler rows;
          ``[rows]`` if no feature of ``y`` is padded, as with one class per row; a dict by loss if ``tokens`` is a
          mapping. Static shapes are None on ragged axes and, with ``max_tokens``, for the rows: all lengths share one
          trace.

        Keras gives all epochs of one ``fit`` the number of steps of the first. If that number varies (``max_tokens``),
        write ``repeat=True`` and ``fit(dataset, steps_per_epoch=len(batches))``: then no batch is left out. After an
        epoch was left early, the next iteration is the next epoch, as in a loop. There is one exception: an epoch that
        was left within the batches that Keras consumes to infer shapes (up to four, in Keras 3 under MirroredStrategy)
        begins again.

        ``state_dict`` counts the batches that tf.data requested. Under strategies these are up to three more than fit
        trained on, and workers may differ: save the state of one worker, and load it on all. With other backends they
        are exactly the batches that fit consumed. If fit requested no more than these batches of an epoch, the next
        call of ``fit`` begins the epoch again.
        Under Horovod, do not add ``prefetch``: workers that leave an epoch must have requested the same batches.

        ``fit`` raises an error of the source as a ``tf.errors.OpError`` with the original message.

        Raises:
          ValueError: ``x`` or ``y`` is not a feature, no worker has an example, or ``repeat`` is required.
          TypeError: ``x`` or ``y`` is not a name.
          Also every error of the first window.

        Collective among workers: all call it, in the same order. Iterating the dataset is collective too.

        >>> source = [{"x": [1.0, 2.0], "y": [1, 2]}, {"x": [3.0], "y": [3]}]
        >>> batches = PaddedBatches(source, 2, padding={"x": Pad(), "y": Pad()}, tokens="y", buckets=None)
        >>> for x, y, weights in batches.for_keras(x="x", y="y"):
        ...     print(x.numpy().tolist(), y.numpy().tolist(), weights.numpy().tolist())
        [[1.0, 2.0], [3.0, 0.0]] [[1, 2], [3, 0]] [[1.0, 1.0], [1.0, 0.0]]
        """
        behaviour = self._progress.behaviour
        workers = f"with {self._backend.num_workers} workers of a strategy"
        remedy = "Let each worker predict in a loop: for batch in batches: strategy.run(...)."
        can_predict = y is not None or not behaviour.leaves_apart
        errors.require("for_keras", can_predict, "y", f"None {workers}", "a feature", remedy)
        found, remedy = f"False {workers} in Keras 2", "Then write fit(dataset, steps_per_epoch=...)."
        repeat = errors.flag("for_keras", "repeat", repeat)
        errors.require("for_keras", repeat or not behaviour.must_repeat, "repeat", found, "True", remedy)
        self._check_engine(of_workers=True)
        elements = keras.Elements(self._config, x, y, y_true, repeat, behaviour.leaves_apart)
        self._progress.leave(elements)
        first = self._progress.open(elements)
        try:
            features = self._progress.features = first.begin()
            if features is None:
                raise ValueError(errors.sentence("for_keras", "source", "empty on all workers", "at least one example"))
            rows, here = None if elements.predicts else self._source.rows, self._backend.replicas_here
            element_of = lambda batch: elements.of_all_rows([batch] * here)
            signature = collate.spec_of(self._config, features, rows, element_of)
        except BaseException:
            first.close()
            raise
        if self._progress.at.step and not repeat and y is not None:
            at = self._progress.at
            warnings.warn(
                f"for_keras: the position is step {at.step} of epoch {at.epoch}, and Keras gives all epochs of one fit "
                "the steps of the first, which are the rest of this one. Write fit(..., epochs=1) for it, or "
                "repeat=True and steps_per_epoch=.",
                stacklevel=2,
            )
        # predict gets no batch that only completes a group, or that follows this worker's last example
        every = None if self._progress.at.step else self._source.length(None)
        is_whole = self._config.accumulation_steps == self._backend.num_workers == 1
        feed = progress.Feeder(self._progress, elements, first, every)
        made = keras.dataset(feed, signature, every if is_whole or not elements.predicts else None, repeats=repeat)
        dataset = keras.distributed(made, self._backend, elements.facts(self._backend.num_replicas))
        elements.dataset = weakref.ref(dataset)
        return dataset

    def __len__(self) -> int:
        """The steps of the running or the next epoch, consumed ones included. TypeError if the number is unknown."""
        steps = self._source.length(self._progress.at.epoch)
        if steps is None:
            raise TypeError(
                f"{_NAME}: the number of steps is unknown before the source is read, expected a LengthSampler, or one "
                "worker and a source with a length."
            )
        return steps

    def serialize(self) -> str:
        """Return the position as JSON, for ``tf.train.Checkpoint``."""
        return json.dumps(self.state_dict())

    def deserialize(self, string_value: str) -> None:
        """Load the position of a checkpoint, by ``load_state_dict``."""
        try:
            state = json.loads(string_value)
        except (ValueError, RecursionError) as error:
            raise ValueError(errors.sentence(_NAME, "state of a checkpoint", f"no JSON ({error})", "JSON")) from None
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as a dict for JSON: after the last whole optimiser step whose batches were yielded.

        After the last step of an epoch, the position is the beginning of the next epoch. With a sampler the state is
        valid for any number of workers; without one, for the same number, with sources in the same order.
        """
        return self._progress.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position in the next iteration, without repeating or skipping an example.

        For a position within an epoch, the next iteration compares the first examples of the source with those at the
        time of saving. They differ, for example, if the source shuffles again in each iteration: then some examples
        would be repeated and others left out.

        Raises:
          TypeError, ValueError: not a state, the state of another source, or a position out of range. In the next
            iteration, on all workers: a source that begins with other examples.
        """
        self._progress.load(state)
