"""Datasets for Keras: batches as (x, y, weights), the tf.data.Dataset of them, and how fit consumes it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors, versions
from distpad.data import shutdown
from distpad.data.collate import Batch, blank_filler, masked
from distpad.data.config import Config
from distpad.data.derived import Indices, Lengths, Mask
from distpad.data.schema import Features
from distpad.data.structure import Name, as_key
from distpad.data.sync import Channel
from distpad.losses.counted import CountedWeights, Facts
from distpad.padding import columns

_NAME = "for_keras"
_PEEKS = "_maybe_symbolic_build"
_CHANNELS = itertools.count(1)  # one for each dataset, since threads of tf.data may iterate several datasets at once


class _Counted(NamedTuple):
    """The weights of a batch, and what its rows carry to the loss, of which ``distributed`` makes CountedWeights."""

    values: Any
    counts: Any
    lengths: Mapping[str, Any]
    labels: Mapping[str, Any]


class Elements:
    """Makes the elements of one dataset: the features that ``x`` and ``y`` name, and the mask as sample weights.

    Args:
      x, y: names of features, or nests of names. ``y=None`` is for ``predict``: elements hold the real rows of ``x``.
      y_true: a name, a tuple or a dict of names, which reach the loss in place of ``y``; None: ``y`` does. A mapping by
        loss if ``tokens`` is a mapping.
      repeats: whether an iteration continues with the next epoch.
      leaves_apart: see ``FitBehaviour``.

    ``bind`` it to the features of the examples first.

    Attributes:
      channel: the channel of the dataset's exchanges.
      predicts: whether ``y`` is None.
      dataset: returns the dataset for fit, or None after it was deleted.

    Raises:
      TypeError: not a name. ValueError: an empty nest.
    """

    def __init__(self, config: Config, x: Any, y: Any, y_true: Any, repeats: bool, leaves_apart: bool) -> None:
        self._config, self.repeats = config, repeats
        self.channel = Channel(next(_CHANNELS), handshakes=leaves_apart)
        self.predicts = y is None
        self._given = {"x": _as_nest("x", x)} if self.predicts else {"x": _as_nest("x", x), "y": _as_nest("y", y)}
        self._y_true = self._labels_of(y_true)
        self.dataset: Callable[[], Any] = lambda: None

    def _labels_of(self, y_true: Any) -> dict[Any, Any]:
        """``y_true`` by loss: a name, a tuple or a dict of names, or None."""
        losses = [*self._config.tokens]
        if y_true is None:
            return dict.fromkeys(losses)
        errors.require(_NAME, not self.predicts, "y_true", errors.shown(y_true), "None where y is None, for predict")
        of_losses = {None: y_true} if None in losses else y_true
        is_by_loss = isinstance(of_losses, Mapping) and not {*of_losses} - {*losses}
        errors.require(_NAME, is_by_loss, "y_true", errors.shown(y_true), f"a mapping from losses: {losses}")
        found = {loss: _as_nest("y_true", of_losses[loss]) if loss in of_losses else None for loss in losses}
        for nest in found.values():
            is_flat = not any(map(tf.nest.is_nested, _parts(nest).values()))
            errors.require(_NAME, is_flat, "y_true", errors.shown(nest), "a name, or one tuple or dict of names")
        return found

    def __str__(self) -> str:
        return ", ".join(f"{argument}={names!r}" for argument, names in self._given.items())

    def bind(self, features: Features) -> None:
        """Resolve the names in the features of an example. Raises: ValueError: names of no feature."""
        self._features = features
        self._names = tuple(
            tf.nest.map_structure(functools.partial(self._feature, argument), names)
            for argument, names in self._given.items()
        )
        self._labels = {
            loss: {str(key): self._feature("y_true", name) for key, name in _parts(nest).items()}
            for loss, nest in self._y_true.items()
        }
        for loss, named in self._labels.items():
            are_single, rule = not any(map(tf.nest.is_nested, named.values())), "names of single features"
            errors.require(_NAME, are_single, "y_true", errors.shown(self._y_true[loss]), rule)
        self._ranks = {loss: self._rank_of_weights(loss) for loss in self._config.tokens if not self.predicts}

    def _feature(self, argument: str, name: Any) -> Any:
        """A name; that of a part of an example as the nest of the part's features."""
        if isinstance(name, Indices):
            return name
        if isinstance(name, (Lengths, Mask)):
            padding = self._config.padding
            rule = f"a feature of padding: {[*padding]}"
            errors.require(_NAME, name.feature in padding, argument, errors.shown(name), rule)
            is_right = isinstance(name, Mask) or padding[name.feature].side == "post"
            remedy = f"Write distpad.Mask({name.feature!r})."
            errors.require(_NAME, is_right, argument, errors.shown(name), "a post-padded feature", remedy)
            return name
        try:
            return self._features.named(name)
        except KeyError:
            rule = f"a feature of an example: {self._features.names}, distpad.Lengths(...), Mask(...) or Indices()"
            raise ValueError(errors.sentence(_NAME, argument, errors.shown(name), rule)) from None

    def _rank_of_weights(self, loss: Any) -> int:
        """The number of axes of a loss's weights after the axis of rows: 0 with one label per row."""
        y = self._names[1]
        labels = tf.nest.flatten(y[loss] if loss is not None and isinstance(y, Mapping) and loss in y else y)
        is_padded = any(name in self._config.padding for name in labels)
        return len(self._config.counted_axes[self._config.tokens[loss]]) if is_padded else 0

    def of(self, batches: Sequence[Batch]) -> Any:
        """Return one element in NumPy: the rows of this worker's replicas, one after the other."""
        joined = self.of_all_rows(batches)
        if not self.predicts:
            return joined
        indices = np.concatenate([batch.indices for batch in batches])
        real = np.argsort(indices, kind="stable")[np.count_nonzero(indices < 0) :]  # a sampler mixes their order
        return tf.nest.map_structure(lambda rows: rows[real], joined)

    def of_all_rows(self, batches: Sequence[Batch]) -> Any:
        """As ``of``, with filler rows also for ``predict``."""
        parts, (x, *labels) = [], self._names
        for batch in batches:
            value = functools.partial(self._value, arrays=self._features.by_name(batch.data), batch=batch)
            inputs = tf.nest.map_structure(value, x)
            if batch.rows < len(batch.indices):
                # inputs keep a real row in filler rows: a mean over the positions of an empty row would be 0 / 0
                inputs = tf.nest.map_structure(np.copy, inputs)
                blank_filler(self._config, self._features, batch)
            weights = {loss: self._counted(loss, rank, batch, value) for loss, rank in self._ranks.items()}
            last = () if self.predicts else (weights.get(None, weights),)
            parts.append((inputs, *tf.nest.map_structure(value, labels), *last))
        return tf.nest.map_structure(lambda *rows: np.concatenate(rows), *parts)

    def _value(self, name: Any, arrays: Mapping[Name, np.ndarray], batch: Batch) -> np.ndarray:
        """The rows of a feature, of lengths or a mask, which are 0 in filler rows, or of indices."""
        if isinstance(name, (Lengths, Mask)):
            real, lengths = np.arange(len(batch.indices)) < batch.rows, batch.lengths[as_key(name.feature)]
            lengths = np.where(real, getattr(lengths, "values", lengths), 0).astype(np.int32)
            if isinstance(name, Lengths):
                return lengths
            pad = self._config.padding[name.feature]
            return columns.real(lengths, arrays[name.feature].shape[1 + pad.axes[0]], at_end=pad.side == "pre")
        return batch.indices if isinstance(name, Indices) else arrays[name]

    def _counted(self, loss: Any, rank: int, batch: Batch, value: Callable[[Any], np.ndarray]) -> Any:
        """The weights ``[batch, *positions]``, 0 on padding and filler rows, with the counts of the step in each row.

        With one label per row, weights ``[batch]`` alone.
        """
        inputs = batch.loss_inputs if loss is None else batch.loss_inputs[loss]
        weights = inputs.sample_weight if loss in self._config.weights else np.float32(1)
        if not rank:
            found, rule = f"weights {self._config.weights.get(loss)!r}", "one per example, as y has one label per row"
            errors.require(_NAME, np.ndim(weights) < 2, found, "one per position", rule)
            return masked(np.arange(len(batch.indices)) < batch.rows, weights)
        weights = masked(value(Mask(self._config.tokens[loss])), weights) if rank == 1 else inputs.sample_weight
        counts = inputs.counts
        numbers = np.array([counts.tokens, counts.sequences, *counts.local, len(weights)], np.float64)
        lengths = {str(name): value(Lengths(name)) for name in self._config.padding}
        labels = {key: value(name) for key, name in self._labels[loss].items()}
        table = np.column_stack([np.tile(numbers, [len(weights), 1]), batch.indices])
        return _Counted(weights, table, lengths, labels)

    def facts(self, replicas: int) -> dict[Any, tuple[Any, ...]]:
        """What the CountedWeights of each loss hold for all batches: their replicas, dtype and facts."""
        # counts of micro-batches are those of a whole group, while fit averages over each micro-batch
        counted = replicas if self._config.accumulation_steps == 1 else 0
        padded = [name for name in tf.nest.flatten(self._names[0]) if name in self._config.padding]
        inputs = str(padded[0]) if len(padded) == 1 else ""
        pre = tuple(str(name) for name, pad in self._config.padding.items() if pad.side == "pre")
        ranks = {feature.name: len(feature.shape) for feature in self._features.features}
        found = {}
        for loss in self._ranks:
            weights, nest = self._config.weights.get(loss), self._y_true[loss]
            weighs = "" if weights is None else "positions" if ranks[weights] else "rows"
            kind = "dict" if isinstance(nest, Mapping) else "tuple" if isinstance(nest, tuple) else ""
            found[loss] = (counted, tf.float32, *Facts(str(self._config.tokens[loss]), inputs, weighs, kind, pre))
        return found

    def refuse_predict(self) -> None:
        """Raise ValueError if Keras's predict iterates a dataset with filler rows, or a dataset made from it.

        A batch cannot tell predict to ignore rows. Only the stack frame of predict shows that predict runs. A call of
        predict in a callback of fit may concern other data.
        """
        if self.predicts:
            return
        dataset = self.dataset()
        with _frames() as frames:
            models = [frame for frame in frames if isinstance(frame.f_locals.get("self"), tf.keras.Model)]
            given = [frame.f_locals.get("x") for frame in models if frame.f_code.co_name == "predict"]
            trains = any(frame.f_code.co_name in ("fit", "evaluate") for frame in models)
            models.clear()
        if any(x is dataset or (isinstance(x, tf.data.Dataset) and not trains) for x in given if x is not None):
            remedy = "Write for_keras(x=..., y=None): then predict gets only real rows."
            raise ValueError(errors.sentence(_NAME, "y", "given for predict", "None", remedy))


class FitBehaviour(NamedTuple):
    """How fit consumes datasets under a backend.

    Attributes:
      peeks: Maximum number of batches that Keras consumes to infer shapes before training.
      reads_ahead: Maximum number of batches that tf.data requests beyond those that fit has trained on.
      must_repeat: whether fit cannot restart the dataset between epochs.
      leaves_apart: whether workers that leave fit at the same step may have requested different numbers of batches.
    """

    peeks: int = 0
    reads_ahead: int = 0
    must_repeat: bool = False
    leaves_apart: bool = False


def behaviour_of(backend: backends.Backend) -> FitBehaviour:
    """How fit consumes datasets under this backend."""
    if not isinstance(backend, backends.StrategyBackend):
        return FitBehaviour()
    # Keras 3 builds the model from one batch, then iterates again. A strategy requests up to three batches ahead of the
    # steps, whatever its InputOptions are. Several workers get a DistributedDataset, which Keras 3 does not peek into,
    # and whose size Keras 2 does not know.
    several, keras_3 = backend.num_workers > 1, versions.KERAS >= 3
    return FitBehaviour(4 if keras_3 and not several else 0, 3, several and not keras_3, several)


def distributed(dataset: tf.data.Dataset, backend: backends.Backend, facts: Mapping[Any, Any]) -> Any:
    """Return a dataset of this worker's batches in the form that fit takes under the backend.

    Args:
      facts: of each loss, what ``Elements.facts`` returned.
    """
    if not isinstance(backend, backends.StrategyBackend) or backend.num_workers == 1:
        return _carrying_counts(dataset, facts)  # fit splits each batch between the replicas
    # Fit would shard a tf.data.Dataset between the workers; each replica takes the next element of this one.
    here = backend.replicas_here
    if here > 1:
        dataset = dataset.flat_map(lambda *batch: split(batch, here))
    dataset = _carrying_counts(dataset, facts)
    return backend.strategy.distribute_datasets_from_function(lambda _: dataset)


def _carrying_counts(dataset: tf.data.Dataset, facts: Mapping[Any, Any]) -> tf.data.Dataset:
    """Return the dataset with CountedWeights, whose counts reach DistributedLoss through fit."""
    if len(dataset.element_spec) < 3:  # for predict
        return dataset

    def carried(part: Any, loss: Any = None) -> Any:
        return CountedWeights(*part, *facts[loss]) if isinstance(part, _Counted) else part

    @tf.autograph.experimental.do_not_convert
    def element(x: Any, y: Any, weights: Any) -> Any:
        several = isinstance(weights, Mapping)
        return x, y, {loss: carried(part, loss) for loss, part in weights.items()} if several else carried(weights)

    return dataset.map(element)


def split(batch: Any, replicas: int) -> tf.data.Dataset:
    """A worker's batch as a dataset of one batch for each of its replicas."""
    rows_of = lambda leaf: tf.concat([[replicas, -1], tf.shape(leaf)[1:]], axis=0)
    return tf.data.Dataset.from_tensor_slices(
        tf.nest.map_structure(lambda leaf: tf.reshape(leaf, rows_of(leaf)), batch)
    )


def dataset(
    epochs: Callable[[], Iterator[Any]], signature: Any, steps: int | None, *, repeats: bool
) -> tf.data.Dataset:
    """Return a dataset whose iterations call ``epochs``; ``steps`` is the number in every epoch, or None."""
    made = tf.data.Dataset.from_generator(functools.partial(shutdown.until_exit, epochs), output_signature=signature)
    if steps or repeats:
        number = tf.data.INFINITE_CARDINALITY if repeats else steps
        made = made.apply(tf.data.experimental.assert_cardinality(number))
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False  # a prefetched batch would count as consumed
    # The dataset has no parameter to tune. The tuning thread may sleep for a minute after the iterator was cancelled,
    # while Python's garbage collector, which destroys the iterator, waits for it and holds the interpreter lock.
    options.autotune.enabled = False
    return made.with_options(options)


def is_peeking(*, otherwise: bool) -> bool:
    """Whether Keras 3 consumes a first batch now, to build the model, in an iteration that it drops.

    Each call of fit under a strategy does so. While Keras waits for the batch, a private method of its is on a stack;
    if Keras has no method of that name, the answer is ``otherwise`` (tests/replicas/test_fit_epochs.py would fail).
    """
    if not hasattr(tf.keras.Model, _PEEKS):
        return otherwise
    with _frames() as frames:
        return any(frame.f_code.co_name == _PEEKS for frame in frames)


@contextlib.contextmanager
def _frames() -> Iterator[list[types.FrameType]]:
    """The stack frames of all threads, in a list that is empty after the context.

    A list that stays in a frame would be a cycle, which keeps the iterator of a running ``fit`` until Python collects
    garbage: another worker would wait for it.
    """
    found = []
    at: types.FrameType | None
    for at in sys._current_frames().values():
        while at is not None:
            found.append(at)
            at = at.f_back
    try:
        yield found
    finally:
        found.clear()


def _as_nest(argument: str, given: Any) -> Any:
    """The nest with tuples for lists, since tf.data converts lists to arrays."""
    if isinstance(given, (Mapping, list, tuple)):
        errors.require(_NAME, not errors.is_deep(given), argument, "nested more than 32 times", "a short nest of names")
        errors.require(_NAME, given, argument, errors.shown(given), "at least one feature")
        if isinstance(given, Mapping):
            return {key: _as_nest(argument, item) for key, item in given.items()}
        return tuple(_as_nest(argument, item) for item in given)
    is_name = isinstance(given, (str, int, Lengths, Mask, Indices)) and not isinstance(given, bool)
    errors.require(
        _NAME, is_name, argument, errors.shown(given), "the name of a feature, or a nest of names", error=TypeError
    )
    return given


def _parts(nest: Any) -> dict[Any, Any]:
    """The names in a name, a tuple or a dict of names, by their keys or places."""
    if nest is None or isinstance(nest, Mapping):
        return dict(nest or {})
    return dict(enumerate(nest if isinstance(nest, tuple) else [nest]))
