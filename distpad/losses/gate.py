"""Gate: gradients that are NaN where a check fails, since XLA drops assertions."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf


class Gate:
    """Chooses by a mask, as ``tf.where`` does. Towards places that are not chosen the gradient is 0, or NaN where a
    check failed: there a 0 would look like the gradient of a step that went well.

    Attributes:
      ok: whether the checks hold, True or a bool scalar. It may be set after the choices, before gradients are traced.

    >>> gate, x = Gate(), tf.constant([1.0, 2.0])
    >>> gate.choose(tf.constant([True, False]), x, 0.5).numpy().tolist()
    [1.0, 0.5]
    """

    def __init__(self) -> None:
        self.ok: Any = True

    def choose(self, mask: tf.Tensor, tensor: tf.Tensor, filling: Any) -> tf.Tensor:
        """``tensor`` where ``mask`` holds, else ``filling``; ``mask`` broadcasts to the tensor's shape."""
        filling = tf.cast(filling, tensor.dtype)
        if tf.executing_eagerly() or not tensor.dtype.is_floating:
            return tf.where(mask, tensor, filling)

        @tf.custom_gradient
        def chosen(given: tf.Tensor) -> Any:
            def gradient(upstream: tf.Tensor) -> tf.Tensor:
                return tf.where(mask, upstream, tf.cast(self.zero_or_nan(), upstream.dtype))

            return tf.where(mask, given, filling), gradient

        return chosen(tensor)

    def zero_or_nan(self) -> Any:
        """0 where the checks hold, else NaN."""
        return 0.0 if self.ok is True else tf.where(self.ok, 0.0, np.nan)
