"""Ratio, the base of all metrics: a sum divided by a count, both over all valid positions of all replicas."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from distpad import backends, errors, precision
from distpad.backends import keras_masks
from distpad.collectives import checked
from distpad.losses import averages, weights


class Ratio(tf.keras.metrics.Metric):
    """A sum divided by a count. Each replica holds both in float64, exact for integers up to 2**53.

    A metric belongs to the engine where it was made, as its variables do: make it inside ``with strategy.scope():``.
    Subclasses define the sum and the count (``_sums``) and a function of the ratio (``_final``).

    Args:
      padding_value: labels equal to it are padding (vectors: where all components are equal to it).
      backend: see ``distpad.backends.resolve``; by default it is detected when the metric is made. "local" makes
        a metric of this worker alone.
      name: as in Keras.
    """

    def __init__(self, *, padding_value: Any = None, backend: Any = None, name: str | None = None) -> None:
        super().__init__(name=name, dtype="float64")
        if padding_value is not None and not (np.isscalar(padding_value) or tf.is_tensor(padding_value)):
            raise TypeError(
                errors.sentence(self._kind, "padding_value", errors.shown(padding_value), "one number or string")
            )
        self.padding_value = padding_value
        self._engine = backends.resolve(backend, function=self._kind)
        self._given = backend
        with self._engine.scope():  # one variable, so that a result costs one all-reduce
            self._parts = self.add_weight(name="parts", shape=(2,), initializer="zeros", dtype="float64")

    @property
    def _kind(self) -> str:
        return type(self).__name__

    @tf.autograph.experimental.do_not_convert
    def update_state(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None, *, lengths: Any = None, mask: Any = None
    ) -> None:
        """Add a batch to this replica's sums. Values at padded positions do not change the result.

        Args:
          y_true: labels ``[batch, length, ...]``; see the class.
          y_pred: predictions ``[batch, length, ...]``; see the class.
          sample_weight: weights ``[batch]`` or with more leading axes of the positions. Weight 0 is padding.
          lengths: ``[batch]`` integers, the number of valid positions of each row. Padding follows them.
          mask: bool, leading axes of the positions. A mask that Keras's layers attached to ``y_pred`` counts too;
            several sources are combined with AND.

        Raises:
          ValueError, TypeError: the arguments do not fit together, or the metric was made outside the scope of the
            strategy. A check that fails while a ``tf.function`` runs raises ``tf.errors.InvalidArgumentError``;
            inside XLA, it makes the result NaN.

        Not collective: replicas may have different numbers of updates.
        """
        self._update(y_true, y_pred, sample_weight=sample_weight, lengths=lengths, mask=mask)

    def _update(self, y_true: Any, y_pred: Any, **sources: Any) -> None:
        here = backends.resolve(self._given, function=self._kind)
        if here.num_replicas > 1 and here.name != self._engine.name:
            raise ValueError(
                f"{self._kind}: made for {self._engine.name}, expected {here.name}, where it is updated. Make it "
                "inside `with strategy.scope():`, or after hvd.init()."
            )
        if not here.in_replica() and not tf.executing_eagerly():
            return self._rehearse()
        sources["sample_weight"] = keras_masks.unmasked_weights(sources["sample_weight"])
        try:
            sums, checks = self._sums(y_true, y_pred, sources)
        except (
            tf.errors.InvalidArgumentError,
            tf.errors.UnimplementedError,
        ) as error:  # of an operation that runs eagerly
            raise ValueError(
                f"{self._kind}: labels, predictions and masks do not fit together: {error.message}"
            ) from error
        ok = checked.check_locally(here, self._kind, checks)
        parts = tf.stack([tf.cast(part, tf.float64) for part in (sums.total, sums.tokens)])
        if ok is not True:  # XLA drops assertions
            parts = tf.where(ok, parts, tf.constant(np.nan, tf.float64))
        self._parts.assign_add(parts)

    def _rehearse(self) -> None:
        """Stand for an update in the trace that Keras 3 makes once outside any replica, and never runs.

        That trace has plain tensors in place of the weights of ``for_keras``.
        """
        text = f"{self._kind}: updated outside strategy.run, expected inside it, where a replica's code runs."
        with tf.control_dependencies([tf.debugging.Assert(False, [text])]):
            self._parts.assign_add(tf.constant([np.nan, np.nan], tf.float64))

    def _sums(self, y_true: Any, y_pred: Any, sources: dict[str, Any]) -> tuple[averages.Sums, list[checked.Check]]:
        raise NotImplementedError

    def _final(self, ratio: tf.Tensor) -> tf.Tensor:
        return ratio

    @tf.autograph.experimental.do_not_convert
    def result(self) -> tf.Tensor:
        """The metric over the batches of all replicas of all workers, a float64 scalar, the same on all replicas.

        The ratio is 0 where no position is valid.

        Collective, inside ``strategy.run`` and outside: all replicas, or all workers, call it. Keras calls it in every
        step of ``fit`` and ``evaluate``, so under Horovod all ranks must have the same number of steps.
        """
        total, count = tf.unstack(self._engine.total_of(self._parts))
        return self._final(tf.math.divide_no_nan(total, count))

    def reset_state(self) -> None:
        """Set sum and count to 0 on all replicas of this worker. Not collective."""
        self._parts.assign(tf.zeros([2], tf.float64))

    def get_config(self) -> dict[str, Any]:
        """As in Keras. A backend that is not a string is left out, and detected when the metric is made again."""
        given = self._given if isinstance(self._given, str) else None
        return {"name": self.name, "padding_value": self.padding_value, "backend": given}

    def _tensor(self, name: str, given: Any) -> Any:
        """Labels or predictions as tensors, half precision as float32."""
        tensor = precision.as_tensor(given, nests=True)
        if isinstance(tensor, (tf.RaggedTensor, tf.SparseTensor)):
            kind = type(tensor).__name__
            raise TypeError(errors.sentence(self._kind, name, f"a {kind}", "a padded tensor", "Use distpad.pad."))
        return tensor

    def _valid(self, y_true: Any, y_pred: Any, sources: dict[str, Any]) -> tuple[weights.Weights, list[checked.Check]]:
        """The valid positions, from all sources."""
        try:
            return weights.of_positions(y_true, y_pred, **sources, padding_value=self.padding_value)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{self._kind}: {error}.") from error


def row_weight(weight: tf.Tensor | None) -> tf.Tensor | None:
    """Sample weights ``[batch]`` of sequences; None where weights are of positions."""
    if weight is None or any(size != 1 for size in weight.shape[1:]):
        return None
    return tf.reshape(weight, [-1])
