"""CountedWeights: the sample weights of ``for_keras``, which carry a step's counts through Keras's fit to the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import backends
from distpad.collectives.checked import Check
from distpad.losses.averages import Sums

_TOLERANCE = 1e-4  # of sums of weights: the pipeline and the loss add them in different orders and precisions


class CountedWeights(tf.experimental.BatchableExtensionType):
    """Sample weights with the counts of their step: a tensor for everything but DistributedLoss.

    Keras passes sample weights to the loss unchanged. An operation on the weights returns a plain tensor without
    counts, and then the loss counts in the step: so changed weights never meet counts of other weights.

    Attributes:
      values: ``[rows, *positions]`` float32, the weights.
      counts: ``[rows, 5]`` float64: the tokens and sequences of all replicas, and the tokens, sequences and rows of
        this replica. All rows of a replica hold the same numbers, since strategies split a batch by rows.
      replicas: the number of replicas that were counted.
      dtype: the dtype in which operations see the weights.

    >>> weights = CountedWeights([[1.0, 0.0]], tf.constant([[1.0, 1, 1, 1, 1]], tf.float64), 1, tf.float32)
    >>> float(tf.reduce_sum(weights)), (weights * 2).numpy().tolist()
    (1.0, [[2.0, 0.0]])
    """

    __name__ = "distpad.CountedWeights"

    values: tf.Tensor
    counts: tf.Tensor
    replicas: int
    dtype: tf.DType

    class Spec:  # TensorFlow adds the specs of the attributes
        @property
        def shape(self) -> tf.TensorShape:
            return self.values.shape  # type: ignore[attr-defined]

        def _create_empty_value(self) -> CountedWeights:
            """TensorFlow's hook: what stands for a batch on replicas that get none, when a dataset ends.

            It has the rows that TensorFlow gives other features there, so that static shapes stay known.
            """
            specs = self.values, self.counts  # type: ignore[attr-defined]
            rows = 0 if self.shape.is_fully_defined() else self.shape[0] or 0
            values, counts = (tf.zeros([rows, *[size or 0 for size in spec.shape[1:]]], spec.dtype) for spec in specs)
            return CountedWeights(values, counts, self.replicas, self.dtype)  # type: ignore[attr-defined]

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
        lowest, highest = tf.reduce_min(self.counts, axis=0), tf.reduce_max(self.counts, axis=0)
        rows = tf.cast(tf.shape(self.counts)[0], tf.float64)
        counted, here = highest[2:], tf.stack([sums.tokens, sums.sequences, rows])
        is_close = tf.abs(counted - here) <= _TOLERANCE * tf.maximum(tf.abs(counted), tf.abs(here))
        is_whole = tf.reduce_all(lowest == highest)
        found = highest[2], highest[4], sums.tokens, rows
        return Check(text, found, tf.logical_and(is_whole, tf.reduce_all(is_close)))

    def has_counts(self, backend: backends.Backend, sources: dict[str, Any], loss: Any) -> bool:
        """Return whether the counts are those of a call with these sources, which is known when a step is traced.

        Counts do not include what another mask or the loss itself drops. They are for a fixed number of
        replicas.
        """
        others = [source for name, source in sources.items() if name != "sample_weight" and source is not None]
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
    return CountedWeights(x.values, x.counts, x.replicas, tf.as_dtype(dtype))
