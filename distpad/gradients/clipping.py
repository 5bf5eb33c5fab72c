"""Clipping by the norm of the global gradient, which is the gradient of the concatenated batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from distpad import backends, errors, precision
from distpad.collectives import checked

_NAME = "clip_by_global_norm"


@tf.autograph.experimental.do_not_convert
def clip_by_global_norm(
    gradients: Sequence[Any], clip_norm: Any, *, backend: Any = None
) -> tuple[list[Any], tf.Tensor]:
    r"""Clip gradients so that the norm of the global gradient is at most ``clip_norm``, before ``apply_gradients``.

    With g the gradient of the global batch, over all variables together, the optimiser gets

    .. math:: g \cdot \min(1, clip\_norm / \lVert g \rVert)

    Under strategies each replica holds a local gradient, and g is their sum. The norm is computed from g, and all
    replicas scale their local gradients by the same factor. The optimiser then sums them to the clipped g. (Keras 3's
    ``global_clipnorm`` clips the local gradients before it sums them.)

    A norm that is not finite makes every gradient NaN on all replicas. So a loss scale (Keras's
    ``LossScaleOptimizer``, which in Keras 3 checks the first replica alone) skips the step on all replicas. With
    ``clip_norm=float("inf")`` this is the only effect.

    Args:
      gradients: the list that ``distpad.gradient`` or ``GradientAccumulator.take`` returned: floating tensors,
        ``tf.IndexedSlices`` or None.
      clip_norm: the largest norm, a number or a scalar tensor above 0, equal on all replicas.
      backend: the loss's backend; None: detected.

    Returns:
      The clipped gradients, each of its own dtype, sparse or None as before; and the norm before clipping, a scalar of
      the widest dtype (float32 at least), equal on all replicas.

    Raises:
      TypeError: ``gradients`` is no list, ``clip_norm`` no number.
      ValueError: ``clip_norm`` is not above 0; for a tensor inside a ``tf.function``, a
        ``tf.errors.InvalidArgumentError``.

    Collective under strategies: one all-reduce of the gradients. Not collective under Horovod, where the gradients are
    reduced already.

    >>> clipped, norm = clip_by_global_norm([tf.constant([3.0, 4.0]), None], 1.0)
    >>> float(norm), [round(float(g), 3) for g in clipped[0]], clipped[1]
    (5.0, [0.6, 0.8], None)

    Source: R. Pascanu, T. Mikolov, Y. Bengio, On the difficulty of training recurrent neural networks, 2013.
    """
    if not isinstance(gradients, (list, tuple)):
        raise TypeError(errors.sentence(_NAME, "gradients", type(gradients).__name__, "a list of gradients"))
    for gradient in gradients:
        is_tensor = tf.is_tensor(gradient) or isinstance(gradient, tf.IndexedSlices)
        is_known = gradient is None or (is_tensor and gradient.dtype.is_floating)
        rule = "a list of floating tensors, IndexedSlices or None"
        errors.require(_NAME, is_known, "gradients", errors.shown(gradient), rule, error=TypeError)
    resolved = backends.resolve_step(backend, function=_NAME)
    if not tf.is_tensor(clip_norm):
        clip_norm = errors.number(_NAME, "clip_norm", clip_norm, finite=False)  # checked below, on all replicas
    positive = checked.Check("clip_norm is expected to be above 0", clip_norm, clip_norm > 0)
    ok = checked.check_locally(resolved, _NAME, [positive])
    held = [i for i, gradient in enumerate(gradients) if gradient is not None]
    norm = _norm(resolved.reduce_in_optimizer([gradients[i] for i in held]))
    limit = tf.cast(tf.convert_to_tensor(clip_norm, dtype_hint=norm.dtype), norm.dtype)  # float32 would round a number
    factor = tf.minimum(tf.ones([], norm.dtype), limit / norm)
    factor = tf.where(tf.logical_and(ok, tf.math.is_finite(norm)), factor, float("nan"))
    clipped = list(gradients)
    for i in held:
        clipped[i] = precision.scale(gradients[i], factor)
    return clipped, norm


def _norm(gradients: Sequence[Any]) -> tf.Tensor:
    """Return the norm over all gradients together."""
    squares = [_sum_of_squares(gradient) for gradient in gradients] or [tf.constant(0.0)]
    widest = max((square.dtype for square in squares), key=lambda dtype: dtype.size)
    return tf.sqrt(tf.add_n([tf.cast(square, widest) for square in squares]))


def _sum_of_squares(gradient: Any) -> tf.Tensor:
    gradient = tf.cast(gradient, precision.widened(gradient.dtype))
    if isinstance(gradient, tf.IndexedSlices):  # rows of one index add up
        rows, segments = tf.unique(gradient.indices)
        gradient = tf.math.unsorted_segment_sum(gradient.values, segments, tf.size(rows))
    return tf.reduce_sum(tf.square(gradient))
