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
from distpad.collectives.shapes import PreLengths
from distpad.data import shutdown
from distpad.data.collate import Batch, blank_filler
from distpad.data.config import Config
from distpad.data.derived import Indices, Lengths, Mask
from distpad.data.schema import Feature, Features
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
        if y_true is None:
            return dict.fromkeys(self._config.tokens)
        if self.predicts:
            raise ValueError(errors.sentence(_NAME, "y_true", repr(y_true), "None where y is None, for predict"))
        of_losses = {None: y_true} if None in self._config.tokens else y_true
        if not isinstance(of_losses, Mapping) or {*of_losses} - {*self._config.tokens}:
            rule = f"a mapping from losses: {[*self._config.tokens]}"
            raise ValueError(errors.sentence(_NAME, "y_true", repr(y_true), rule))
        found = {
            loss: _as_nest("y_true", of_losses[loss]) if loss in of_losses else None for loss in self._config.tokens
        }
        for nest in found.values():
            parts = nest.values() if isinstance(nest, Mapping) else nest if isinstance(nest, tuple) else ()
            if any(tf.nest.is_nested(part) for part in parts):
                raise ValueError(errors.sentence(_NAME, "y_true", repr(nest), "a name, or one tuple or dict of names"))
        return found

    def __str__(self) -> str:
        return ", ".join(f"{argument}={names!r}" for argument, names in self._given.items())

    def of(self, features: Features, batches: Sequence[Batch]) -> Any:
        """Return one element in NumPy: the rows of this worker's replicas, one after the other."""
        parts, (x, *labels) = [], self._named(features)
        counted = {*self._config.tokens.values()}
        for batch in batches:
            value = functools.partial(_value, arrays=features.by_name(batch.data), batch=batch, config=self._config)
            inputs = _mapped(value, x)
            if batch.rows < len(batch.indices):
                # inputs keep a real row in filler rows: a mean over the positions of an empty row would be 0 / 0
                inputs = tf.nest.map_structure(np.copy, inputs)
                blank_filler(features, batch, counted)
            weights = {} if self.predicts else {n: self._counted(n, features, batch) for n in self._config.tokens}
            parts.append((inputs, *_mapped(value, labels), weights.get(None, weights)))
        joined = tf.nest.map_structure(lambda *rows: np.concatenate(rows), *parts)
        if not self.predicts:
            return joined
        indices = np.concatenate([batch.indices for batch in batches])
        real = np.argsort(indices, kind="stable")[np.count_nonzero(indices < 0) :]  # a sampler mixes their order
        return (tf.nest.map_structure(lambda rows: rows[real], joined[0]),)

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

    def signature(self, features: Features, rows: int | None) -> Any:
        """Return the specs of an element, None on ragged axes, so that all lengths share one trace.

        Raises ValueError for names that are not in ``features``.
        """
        known = {feature.name: feature for feature in features.features}

        def spec(name: Any) -> tf.TensorSpec:
            if isinstance(name, Mask):
                return tf.TensorSpec([rows, None], tf.bool)
            if isinstance(name, (Lengths, Indices)):
                return tf.TensorSpec([rows], tf.int32 if isinstance(name, Lengths) else tf.int64)
            feature: Feature = known[name]
            return tf.TensorSpec([rows, *feature.shape], tf.as_dtype(feature.dtype))

        if self.predicts:
            rows = None
            return tuple(_mapped(spec, self._named(features)))
        weights = {}
        for loss in self._config.tokens:
            values = tf.TensorSpec([rows, *[None] * self._rank_of_weights(loss, features)], tf.float32)
            weights[loss] = values
            if self._rank_of_weights(loss, features):
                lengths = {str(name): tf.TensorSpec([rows], tf.int32) for name in self._config.padding}
                labels = {key: spec(name) for key, name in self._labels(loss, features).items()}
                weights[loss] = _Counted(values, tf.TensorSpec([rows, 5], tf.float64), lengths, labels)
        return (*_mapped(spec, self._named(features)), weights.get(None, weights))

    def _named(self, features: Features) -> tuple[Any, ...]:
        """``x`` and ``y`` as nests of feature names; the name of a part of an example becomes a nest."""

        return tuple(
            _mapped(functools.partial(self._feature, features, argument), names)
            for argument, names in self._given.items()
        )

    def _feature(self, features: Features, argument: str, name: Any) -> Any:
        """A name as the nest of the features in this part of an example."""
        if isinstance(name, Indices):
            return name
        if isinstance(name, (Lengths, Mask)):
            if name.feature not in self._config.padding:
                rule = f"a feature of padding: {[*self._config.padding]}"
                raise ValueError(errors.sentence(_NAME, argument, repr(name), rule))
            if isinstance(name, Lengths) and self._config.padding[name.feature].side == "pre":
                remedy = f"Write distpad.Mask({name.feature!r})."
                raise ValueError(errors.sentence(_NAME, argument, repr(name), "a post-padded feature", remedy))
            return name
        try:
            return features.named(name)
        except KeyError:
            rule = f"a feature of an example: {features.names}, distpad.Lengths(...), Mask(...) or Indices()"
            raise ValueError(errors.sentence(_NAME, argument, repr(name), rule)) from None

    def _labels(self, loss: Any, features: Features) -> dict[str, Any]:
        """The names of ``y_true`` of a loss, by their keys or places."""
        nest = self._y_true[loss]
        if nest is None:
            return {}
        parts = nest if isinstance(nest, Mapping) else dict(enumerate(nest if isinstance(nest, tuple) else [nest]))
        named = {str(key): self._feature(features, "y_true", name) for key, name in parts.items()}
        for name in named.values():
            if tf.nest.is_nested(name):
                raise ValueError(errors.sentence(_NAME, "y_true", repr(nest), "names of single features"))
        return named

    def _rank_of_weights(self, loss: Any, features: Features) -> int:
        """The number of axes of a loss's weights after the axis of rows: 0 with one label per row."""
        y = self._named(features)[1]
        labels = tf.nest.flatten(y[loss] if loss is not None and isinstance(y, Mapping) and loss in y else y)
        if not any(name in self._config.padding for name in labels):
            return 0
        return len(self._config.counted_axes[self._config.tokens[loss]])

    def _counted(self, loss: Any, features: Features, batch: Batch) -> Any:
        """The weights, with the counts of the step in each row."""
        weights = self._weights(loss, features, batch)
        if not self._rank_of_weights(loss, features):
            return weights
        counts = (batch.loss_inputs if loss is None else batch.loss_inputs[loss]).counts
        numbers = np.array([counts.tokens, counts.sequences, *counts.local, len(weights)], np.float64)
        arrays = features.by_name(batch.data)
        lengths = {str(name): _lengths(name, batch) for name in self._config.padding}
        named = self._labels(loss, features).items()
        labels = {key: _value(name, arrays, batch, self._config) for key, name in named}
        return _Counted(weights, np.tile(numbers, [len(weights), 1]), lengths, labels)

    def facts(self, features: Features, replicas: int) -> dict[Any, tuple[Any, ...]]:
        """What the CountedWeights of each loss hold for all batches: their replicas, dtype and facts."""
        if self.predicts:
            return {}
        # counts of micro-batches are those of a whole group, while fit averages over each micro-batch
        counted = replicas if self._config.accumulation_steps == 1 else 0
        padded = [name for name in tf.nest.flatten(self._named(features)[0]) if name in self._config.padding]
        inputs = str(padded[0]) if len(padded) == 1 else ""
        pre = tuple(str(name) for name, pad in self._config.padding.items() if pad.side == "pre")
        ranks = {feature.name: len(feature.shape) for feature in features.features}
        found = {}
        for loss, tokens in self._config.tokens.items():
            weights, nest = self._config.weights.get(loss), self._y_true[loss]
            weighs = "" if weights is None else "positions" if ranks[weights] else "rows"
            kind = "dict" if isinstance(nest, Mapping) else "tuple" if isinstance(nest, tuple) else ""
            found[loss] = (counted, tf.float32, *Facts(str(tokens), inputs, weighs, kind, pre))
        return found

    def _weights(self, loss: Any, features: Features, batch: Batch) -> np.ndarray:
        """Weights ``[batch, *positions]``, or ``[batch]`` with one label per row; 0 on padding and filler rows."""
        inputs = batch.loss_inputs if loss is None else batch.loss_inputs[loss]
        given, real = inputs.sample_weight, np.arange(len(batch.indices)) < batch.rows
        rank = self._rank_of_weights(loss, features)
        if not rank:
            weighted = isinstance(given, np.ndarray) and loss in self._config.weights
            if weighted and given.ndim > 1:
                found, rule = "one per position", "one per example, as y has one label per row"
                raise ValueError(errors.sentence(_NAME, f"weights {self._config.weights[loss]!r}", found, rule))
            return np.where(real, given if weighted else 1, 0).astype(np.float32)
        if rank > 1:
            return given
        tokens = self._config.tokens[loss]
        length = features.by_name(batch.data)[tokens].shape[1 + self._config.counted_axes[tokens][0]]
        is_pre = isinstance(inputs.lengths, PreLengths)
        mask = columns.real(inputs.lengths.values if is_pre else inputs.lengths, length, at_end=is_pre)
        weights = given if isinstance(given, np.ndarray) else np.ones([])
        weights = weights[:, np.newaxis] if weights.ndim == 1 else weights
        return np.where(mask, weights, 0).astype(np.float32)  # not a product: the padding of weights may be NaN


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
    if isinstance(given, Mapping) and given:
        return {key: _as_nest(argument, item) for key, item in given.items()}
    if isinstance(given, (list, tuple)) and given:
        return tuple(_as_nest(argument, item) for item in given)
    if isinstance(given, (Mapping, list, tuple)):
        raise ValueError(errors.sentence(_NAME, argument, repr(given), "at least one feature"))
    if isinstance(given, bool) or not isinstance(given, (str, int, Lengths, Mask, Indices)):
        raise TypeError(errors.sentence(_NAME, argument, repr(given), "the name of a feature, or a nest of names"))
    return given


def _lengths(name: Name, batch: Batch) -> np.ndarray:
    """The lengths of a padded feature, 0 in filler rows."""
    real, lengths = np.arange(len(batch.indices)) < batch.rows, batch.lengths[as_key(name)]
    return np.where(real, getattr(lengths, "values", lengths), 0).astype(np.int32)


def _value(name: Any, arrays: Mapping[Name, np.ndarray], batch: Batch, config: Config) -> np.ndarray:
    """The rows of a feature, of lengths, of a mask, or of indices."""
    if isinstance(name, Indices):
        return batch.indices
    if isinstance(name, Lengths):
        return _lengths(name.feature, batch)
    if isinstance(name, Mask):
        pad = config.padding[name.feature]
        size = arrays[name.feature].shape[1 + pad.axes[0]]
        return columns.real(_lengths(name.feature, batch), size, at_end=pad.side == "pre")
    return arrays[name]


def _mapped(function: Callable[[Any], Any], names: Any) -> Any:
    return tf.nest.map_structure(function, names)
