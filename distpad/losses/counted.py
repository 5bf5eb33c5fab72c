"""CountedWeights: the sample weights of ``for_keras``, which carry a step's counts through Keras's fit to the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends
from distpad.collectives.checked import Check
from distpad.collectives.shapes import PreLengths
from distpad.losses.averages import Sums

_TOLERANCE = 1e-4  # of sums of weights: the pipeline and the loss add them in different orders and precisions


class Facts(NamedTuple):
    """What CountedWeights hold for all batches of a dataset.

    Attributes:
      tokens: the counted feature.
      inputs: the padded feature of the model's inputs, "" if there is none or several.
      weighs: "" without sample weights, else what they weigh: "rows" or "positions".
      nest: the kind of nest of the loss's own labels: "tuple", "dict", or "" for one tensor.
      pre: the pre-padded features.
    """

    tokens: str
    inputs: str
    weighs: str
    nest: str
    pre: tuple[str, ...]


class CountedWeights(tf.experimental.BatchableExtensionType):
    """Sample weights with the counts of their step: a tensor for everything but DistributedLoss.

    Keras passes sample weights to the loss unchanged. An operation on the weights returns a plain tensor without
    counts, and then the loss counts in the step: so changed weights never meet counts of other weights.

    Attributes:
      values: ``[rows, *positions]`` float32, the weights.
      counts: ``[rows, 6]`` float64: the tokens and sequences of all replicas, and the tokens, sequences and rows of
        this replica, the same numbers in all its rows, since strategies split a batch by rows; and the example index.
      lengths: of each padded feature ``[rows]`` int32, 0 in filler rows.
      labels: features that the loss gets as its ``y_true``, by key or place; empty: it gets Keras's.
      replicas: the number of replicas that were counted; 0 for counts of other rows, which the loss does not use.
      dtype: the dtype in which operations see the weights.
      tokens, inputs, weighs, nest, pre: see ``Facts``.

    >>> counts = tf.constant([[1.0, 1, 1, 1, 1, 0]], tf.float64)
    >>> weights = CountedWeights([[1.0, 0.0]], counts, {"y": [1]}, {}, 1, tf.float32)
    >>> float(tf.reduce_sum(weights)), (weights * 2).numpy().tolist()
    (1.0, [[2.0, 0.0]])
    """

    __name__ = "distpad.CountedWeights"

    values: tf.Tensor
    counts: tf.Tensor
    lengths: Mapping[str, tf.Tensor]
    labels: Mapping[str, tf.Tensor]
    replicas: int
    dtype: tf.DType
    tokens: str = ""
    inputs: str = ""
    weighs: str = ""
    nest: str = ""
    pre: tuple[str, ...] = ()

    class Spec:  # TensorFlow adds the specs of the attributes
        @property
        def shape(self) -> tf.TensorShape:
            return self.values.shape  # type: ignore[attr-defined]

        def _create_empty_value(self) -> CountedWeights:
            """TensorFlow's hook: what stands for a batch on replicas that get none, when a dataset ends.

            It has the rows that TensorFlow gives other features there, so that static shapes stay known.
            """
            rows = 0 if self.shape.is_fully_defined() else self.shape[0] or 0
            of = lambda spec: tf.zeros([rows, *[size or 0 for size in spec.shape[1:]]], spec.dtype)
            parts = (
                tf.nest.map_structure(of, getattr(self, name)) for name in ("values", "counts", "lengths", "labels")
            )
            facts = (getattr(self, name) for name in ("replicas", "dtype", *Facts._fields))
            return CountedWeights(*parts, *facts)

    @property
    def shape(self) -> tf.TensorShape:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.shape.rank

    @property
    def device(self) -> str:
        return self.values.device

    def get_shape(self) -> tf.TensorShape:
        return self.values.shape

    def numpy(self) -> np.ndarray:
        return tf.cast(self.values, self.dtype).numpy()

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        return np.asarray(self.numpy(), *args, **options)

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[tf.Tensor]:
        return iter(tf.convert_to_tensor(self))

    @property
    def indices(self) -> tf.Tensor:
        """The example index of each row, ``[rows]`` int64, -1 in filler rows."""
        return tf.cast(self.counts[:, 5], tf.int64)

    def count_of(self, average: str | float) -> tf.Tensor:
        """Return the number that this average divides by, a float64 scalar."""
        if not isinstance(average, str):
            return tf.constant(average, tf.float64)
        return tf.reduce_max(self.counts, axis=0)[0 if average == "token" else 1]

    def check(self, sums: Sums) -> Check:
        """Check that the rows are those of one step of this replica, and that the loss averages over their weights."""
        text = (
            "sample_weight counts other positions than this call averages over, expected the rows of one batch of "
            "for_keras. Filter examples before PaddedBatches, and leave batches whole; or pass weights * 1.0, which "
            "are counted in the step (found: tokens and rows that were counted, and those of this call)"
        )
        counts = self.counts[:, :5]
        lowest, highest = tf.reduce_min(counts, axis=0), tf.reduce_max(counts, axis=0)
        rows = tf.cast(tf.shape(counts)[0], tf.float64)
        counted, here = highest[2:], tf.stack([sums.tokens, sums.sequences, rows])
        is_close = tf.abs(counted - here) <= _TOLERANCE * tf.maximum(tf.abs(counted), tf.abs(here))
        is_whole = tf.reduce_all(lowest == highest)
        found = highest[2], highest[4], sums.tokens, rows
        return Check(text, found, tf.logical_and(is_whole, tf.reduce_all(is_close)))

    def labels_of(self, y_true: Any, y_pred: Any, loss: Any) -> Any:
        """Return the ``y_true`` of the loss: the labels that ``for_keras`` names, or those that the loss makes."""
        if self.labels:
            parts = dict(self.labels)
            places = tuple(parts.get(str(place)) for place in range(len(parts)))
            return parts if self.nest == "dict" else places if self.nest else parts["0"]
        return loss.labels_in_fit(y_true, y_pred, self) if hasattr(loss, "labels_in_fit") else y_true

    def sources(self, per: str) -> dict[str, Any]:
        """Return the arguments of the loss that tell which positions, or sequences, count."""
        if per == "position":
            return {"sample_weight": self.values}
        if self.weighs == "positions":
            raise ValueError(
                "DistributedLoss: sample_weight weighs positions, expected one weight an example: the loss has one "
                "value a sequence."
            )
        weight = tf.reduce_max(self.values, axis=range(1, self.values.shape.rank)) if self.weighs else None
        return {"lengths": self.lengths_of(self.tokens), "sample_weight": weight}

    def lengths_of(self, feature: str) -> Any:
        """Return the lengths of a feature, ``[rows]``, or ``PreLengths``."""
        return PreLengths(self.lengths[feature]) if feature in self.pre else self.lengths[feature]

    def has_counts(self, backend: backends.Backend, sources: dict[str, Any], loss: Any) -> bool:
        """Return whether the counts are those of a call with these further sources; known when a step is traced.

        Counts do not include what another mask or the loss itself drops. They are for a fixed number of
        replicas.
        """
        others = [name for name, source in sources.items() if source is not None]
        is_same_engine = not backend.is_elastic and backend.num_replicas == self.replicas
        return is_same_engine and not others and not getattr(loss, "drops_invalid", False)


def _as_tensor(weights: CountedWeights, dtype: Any = None, name: str | None = None, as_ref: bool = False) -> tf.Tensor:
    return tf.convert_to_tensor(tf.cast(weights.values, weights.dtype), dtype=dtype, name=name)


def _operator(name: str) -> Any:
    return lambda self, *others: getattr(tf.convert_to_tensor(self), name)(*others)


tf.register_tensor_conversion_function(CountedWeights, _as_tensor)
for _name in tf.Tensor.OVERLOADABLE_OPERATORS:
    setattr(CountedWeights, _name, _operator(_name))


@tf.experimental.dispatch_for_api(tf.cast, {"x": CountedWeights})
def _cast(x: CountedWeights, dtype: Any, name: str | None = None) -> CountedWeights:
    """Keep the counts: Keras 2 casts all weights to the dtype of the predictions. The values keep their precision."""
    facts = (getattr(x, name) for name in Facts._fields)
    return CountedWeights(x.values, x.counts, x.lengths, x.labels, x.replicas, tf.as_dtype(dtype), *facts)
