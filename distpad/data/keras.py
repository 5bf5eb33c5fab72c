"""What Keras's fit is fed: a batch as (x, y, weights), and the tf.data.Dataset of them."""

from __future__ import annotations

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
from distpad.data.collate import Batch
from distpad.data.config import Config
from distpad.data.schema import Feature, Features, Name
from distpad.data.sync import Channel

_NAME = "for_keras"
_PEEKS = "_maybe_symbolic_build"
_CHANNELS = itertools.count(1)  # of exchanges: each dataset has one, since tf.data's threads iterate several at once


class Elements:
    """Batches as fit takes them: the features that ``x`` and ``y`` name, and the mask as sample weights.

    Args:
      x, y: names of features, or nests of them; ``y`` is None for ``predict``, which gets the real rows of ``x`` alone.
      repeats: whether the dataset goes on with the next epoch.
      leaves_apart: see ``FitBehavior``.

    Raises TypeError for what is no name, ValueError for an empty nest.
    """

    def __init__(self, config: Config, x: Any, y: Any, repeats: bool, leaves_apart: bool) -> None:
        self._config, self.repeats = config, repeats
        self.channel = Channel(next(_CHANNELS), handshakes=leaves_apart)
        self.predicts = y is None
        self._given = {"x": _as_nest("x", x)} if self.predicts else {"x": _as_nest("x", x), "y": _as_nest("y", y)}
        self.dataset: Callable[[], Any] = lambda: None  # what fit is given

    def __str__(self) -> str:
        return ", ".join(f"{argument}={names!r}" for argument, names in self._given.items())

    def of(self, features: Features, batches: Sequence[Batch]) -> Any:
        """One element in NumPy: the rows of this worker's replicas behind one another."""
        parts, names = [], self._named(features)
        for batch in batches:
            arrays = features.by_name(batch.data)
            weights = {} if self.predicts else {n: self._weights(n, features, batch) for n in self._config.tokens}
            parts.append((*_mapped(arrays.__getitem__, names), weights.get(None, weights)))
        joined = tf.nest.map_structure(lambda *rows: np.concatenate(rows), *parts)
        if not self.predicts:
            return joined
        places = np.concatenate([batch.indices for batch in batches])
        real = np.argsort(places, kind="stable")[np.count_nonzero(places < 0) :]  # as a sampler dealt them out
        return (tf.nest.map_structure(lambda rows: rows[real], joined[0]),)

    def refuse_predict(self) -> None:
        """Raise where Keras's predict iterates a dataset that holds filler rows, or what was made of it: no batch can
        tell it to leave them out. The frame of predict is the only trace of it. One in a callback of fit's may be about
        other data."""
        if self.predicts:
            return
        dataset = self.dataset()
        frames = [frame for frame in _frames() if isinstance(frame.f_locals.get("self"), tf.keras.Model)]
        given = [frame.f_locals.get("x") for frame in frames if frame.f_code.co_name == "predict"]
        trains = any(frame.f_code.co_name in ("fit", "evaluate") for frame in frames)
        if any(x is dataset or (isinstance(x, tf.data.Dataset) and not trains) for x in given if x is not None):
            remedy = "Write for_keras(x=..., y=None): then predict gets the real rows alone."
            raise ValueError(errors.sentence(_NAME, "y", "given for predict", "None", remedy))

    def signature(self, features: Features, rows: int | None) -> Any:
        """The specs of an element; ragged axes are None in all, so that all lengths share one trace.

        Raises ValueError for names that are none of ``features``.
        """
        known = {feature.name: feature for feature in features.features}

        def spec(name: Name) -> tf.TensorSpec:
            feature: Feature = known[name]
            return tf.TensorSpec([rows, *feature.shape], tf.as_dtype(feature.dtype))

        if self.predicts:
            rows = None
            return tuple(_mapped(spec, self._named(features)))
        ranks = {loss: self._rank_of_weights(loss, features) for loss in self._config.tokens}
        weights = {loss: tf.TensorSpec([rows, *[None] * rank], tf.float32) for loss, rank in ranks.items()}
        return (*_mapped(spec, self._named(features)), weights.get(None, weights))

    def _named(self, features: Features) -> tuple[Any, ...]:
        """``x`` and ``y`` as nests of names of features: the name of a part of an example stands for all in it."""

        def named(argument: str, name: Name) -> Any:
            try:
                return features.named(name)
            except KeyError:
                rule = f"a feature of an example: {features.names}"
                raise ValueError(errors.sentence(_NAME, argument, repr(name), rule)) from None

        return tuple(_mapped(functools.partial(named, argument), names) for argument, names in self._given.items())

    def _rank_of_weights(self, loss: Any, features: Features) -> int:
        """The axes of a loss's weights beside that of rows: none where its labels are one for each row."""
        y = self._named(features)[1]
        labels = tf.nest.flatten(y[loss] if loss is not None and isinstance(y, Mapping) and loss in y else y)
        if not any(name in self._config.padding for name in labels):
            return 0
        return len(self._config.counted_axes(self._config.tokens[loss]))

    def _weights(self, loss: Any, features: Features, batch: Batch) -> np.ndarray:
        """Of each position, ``[batch, *positions]``, or of each row, ``[batch]``: 0 on padding and in filler rows."""
        inputs = batch.loss_inputs if loss is None else batch.loss_inputs[loss]
        given, real = inputs.sample_weight, np.arange(len(batch.indices)) < batch.rows
        rank = self._rank_of_weights(loss, features)
        if not rank:
            weighted = isinstance(given, np.ndarray) and loss in self._config.weights
            if weighted and given.ndim > 1:
                found, rule = "one a position", "one an example where y is one label a row"
                raise ValueError(errors.sentence(_NAME, f"weights {self._config.weights[loss]!r}", found, rule))
            return np.where(real, given if weighted else 1, 0).astype(np.float32)
        if rank > 1:
            return given
        tokens = self._config.tokens[loss]
        length = features.by_name(batch.data)[tokens].shape[1 + self._config.counted_axes(tokens)[0]]
        mask = np.arange(length) < inputs.lengths[:, np.newaxis]
        weights = given if isinstance(given, np.ndarray) else np.ones([])
        weights = weights[:, np.newaxis] if weights.ndim == 1 else weights
        return np.where(mask, weights, 0).astype(np.float32)  # chosen, not multiplied: a weight's padding may be NaN


class FitBehavior(NamedTuple):
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


def behavior_of(backend: backends.Backend) -> FitBehavior:
    """How fit consumes datasets under this backend."""
    if not isinstance(backend, backends.StrategyBackend):
        return FitBehavior()
    # Keras 3 builds the model from one batch, then iterates again. A strategy requests up to three batches ahead of the
    # steps, whatever its InputOptions are. Several workers get a DistributedDataset, which Keras 3 does not peek into,
    # and whose size Keras 2 does not know.
    several, keras_3 = backend.num_workers > 1, versions.KERAS >= 3
    return FitBehavior(4 if keras_3 and not several else 0, 3, several and not keras_3, several)


def distributed(dataset: tf.data.Dataset, backend: backends.Backend) -> Any:
    """Return a dataset of this worker's batches in the form that fit takes under the backend."""
    if not isinstance(backend, backends.StrategyBackend) or backend.num_workers == 1:
        return dataset  # fit splits each batch between the replicas
    # Fit would shard a tf.data.Dataset between the workers; each replica takes the next element of this one.
    here = backend.replicas_here
    if here > 1:
        dataset = dataset.flat_map(lambda *batch: split(batch, here))
    return backend.strategy.distribute_datasets_from_function(lambda _: dataset)


def split(batch: Any, replicas: int) -> tf.data.Dataset:
    """A worker's batch as a dataset of one batch for each of its replicas."""
    rows_of = lambda leaf: tf.concat([[replicas, -1], tf.shape(leaf)[1:]], axis=0)
    return tf.data.Dataset.from_tensor_slices(
        tf.nest.map_structure(lambda leaf: tf.reshape(leaf, rows_of(leaf)), batch)
    )


def dataset(
    epochs: Callable[[], Iterator[Any]], signature: Any, steps: int | None, *, repeats: bool
) -> tf.data.Dataset:
    """Each iteration goes through ``epochs()``; ``steps`` are those of every epoch, where they are known."""
    made = tf.data.Dataset.from_generator(functools.partial(shutdown.until_exit, epochs), output_signature=signature)
    if steps or repeats:
        number = tf.data.INFINITE_CARDINALITY if repeats else steps
        made = made.apply(tf.data.experimental.assert_cardinality(number))
    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False  # what was handed out is what was asked for
    # There is nothing to tune. And the thread that would do so may sleep through the iterator's end, for a minute:
    # TensorFlow wakes it before it says that all is cancelled. Whoever collects the iterator waits, with Python's lock.
    options.autotune.enabled = False
    return made.with_options(options)


def is_peeking(*, otherwise: bool) -> bool:
    """Whether Keras 3 consumes a first batch now, to build the model, in an iteration that it drops.

    Each call of fit under a strategy does so. While Keras waits for the batch, a private method of its is on a stack;
    if Keras has no method of that name, the answer is ``otherwise`` (tests/replicas/test_fit_epochs.py would fail).
    """
    if not hasattr(tf.keras.Model, _PEEKS):
        return otherwise
    return any(frame.f_code.co_name == _PEEKS for frame in _frames())


def _frames() -> Iterator[types.FrameType]:
    """Of all threads."""
    for frame in sys._current_frames().values():
        caller: types.FrameType | None = frame
        while caller is not None:
            yield caller
            caller = caller.f_back


def _as_nest(argument: str, given: Any) -> Any:
    """Lists become tuples, since tf.data takes lists for arrays."""
    if isinstance(given, Mapping) and given:
        return {key: _as_nest(argument, item) for key, item in given.items()}
    if isinstance(given, (list, tuple)) and given:
        return tuple(_as_nest(argument, item) for item in given)
    if isinstance(given, (Mapping, list, tuple)):
        raise ValueError(errors.sentence(_NAME, argument, repr(given), "at least one feature"))
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise TypeError(errors.sentence(_NAME, argument, repr(given), "the name of a feature, or a nest of names"))
    return given


def _mapped(function: Callable[[Any], Any], names: Any) -> Any:
    return tf.nest.map_structure(function, names)
