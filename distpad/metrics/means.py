"""MaskedMean: the mean of any function of labels and predictions over the valid positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from distpad import errors
from distpad.backends import keras_masks
from distpad.collectives import checked
from distpad.losses import arguments, averages, weights
from distpad.metrics import ratio


class PositionMean(ratio.Ratio):
    """A mean of one value a position: :math:`\\sum w v / \\sum w` over all positions of all replicas."""

    def _values(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """Values ``[batch, length, ...]`` of labels and predictions in which padding was replaced."""
        raise NotImplementedError

    def _checks(self, y_true: Any, y_pred: Any) -> list[checked.Check]:
        """Checks of labels and predictions in which padding was replaced."""
        return []

    def _sums(self, y_true: Any, y_pred: Any, sources: dict[str, Any]) -> tuple[averages.Sums, list[checked.Check]]:
        sources = {**sources, "keras_mask": keras_masks.of(y_pred)}
        y_true, y_pred = self._tensor("y_true", y_true), self._tensor("y_pred", y_pred)
        valid, checks = self._valid(y_true, y_pred, sources)
        counted = valid.effective_mask
        cleaned = [weights.clean(y, counted, prediction=i == 1) for i, y in enumerate((y_true, y_pred))]
        checks += self._checks(*cleaned)
        values = tf.cast(self._values(*cleaned), tf.float64)
        if not values.shape.rank:
            found = f"of rank {values.shape.rank}"
            raise ValueError(
                errors.sentence(self._kind, "the function's result", found, "[batch, length, ...], unreduced")
            )
        valid, check = weights.broadcast_to(self._kind, values, valid)
        return averages.sum_up(values, valid, "token"), [*checks, check]


@tf.keras.utils.register_keras_serializable("distpad")
class MaskedMean(PositionMean):
    r"""The mean of a function over valid positions, :math:`\sum w v / \sum w`.

    Args:
      function: ``(y_true, y_pred) -> [batch, length, ...]``, such as a Keras loss, whose default reduction is
        omitted. None averages ``y_pred`` itself. Axes after those of the mask are averaged first. Padding is replaced
        before the call.
      padding_value, backend, name: see ``distpad.metrics``.

    Raises:
      TypeError: ``function`` is not callable.

    >>> metric = MaskedMean(lambda y_true, y_pred: abs(y_true - y_pred))
    >>> metric.update_state([[1.0, 2.0], [3.0, 9.0]], [[1.0, 1.0], [5.0, float("nan")]], lengths=[2, 1])
    >>> float(metric.result())
    1.0
    """

    def __init__(self, function: Callable[[Any, Any], Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        if function is not None and not callable(function):
            raise TypeError(
                errors.sentence(self._kind, "function", errors.shown(function), "a callable (y_true, y_pred)")
            )
        is_loss = isinstance(function, tf.keras.losses.Loss)
        self.function = arguments.unreduced(function, self._kind) if is_loss else function

    def _values(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        return y_pred if self.function is None else self.function(y_true, y_pred)

    def get_config(self) -> dict[str, Any]:
        """As in Keras."""
        function = None if self.function is None else tf.keras.utils.serialize_keras_object(self.function)
        return {**super().get_config(), "function": function}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MaskedMean:
        function = config["function"]
        return cls(**{**config, "function": function and tf.keras.utils.deserialize_keras_object(function)})
