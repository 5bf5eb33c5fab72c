"""BatchNormalization: Keras's layer, with moments over the valid positions of all replicas."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors, precision
from distpad.backends import keras_masks
from distpad.collectives import checked, shapes

_NAME = "BatchNormalization"


class Moments(NamedTuple):
    """The moments of the valid positions of all replicas.

    Attributes:
      count: the number of valid positions, a float64 scalar.
      mean, variance: ``[channels]``, float32 at least; 0 without valid positions.
    """

    count: tf.Tensor
    mean: tf.Tensor
    variance: tf.Tensor


@tf.keras.utils.register_keras_serializable("distpad")
class BatchNormalization(tf.keras.layers.BatchNormalization):
    r"""Normalize each channel by the moments of the valid positions of all replicas.

    A drop-in for ``tf.keras.layers.BatchNormalization``: its arguments, weights and saved form are the same. In
    training, with m the mask and n the number of valid positions on all replicas,

    .. math:: \mu = \sum m x / n, \quad \sigma^2 = \sum m (x - \mu)^2 / n,
              \quad y = \gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta

    at valid positions, and y = 0 at the others. Gradients go through both sums, so that N replicas train as one device
    with the concatenated batch. The moving averages move by the same moments on all replicas. What stands at invalid
    positions (NaN, infinity) changes no bit of a valid output or of a gradient, and the gradient there is 0. Without
    valid positions on any replica, the output is :math:`\beta` and the moving averages stay.

    Args:
      axis, momentum, epsilon, ...: as in Keras. ``synchronized`` has no effect: the moments are always of all replicas.

    Raises: ValueError: ``renorm=True`` or ``virtual_batch_size``, whose moments are not those of the global batch.

    >>> layer = BatchNormalization()
    >>> x = tf.constant([[[1.0], [3.0], [9.0]]])
    >>> layer(x, training=True, lengths=[2]).numpy().round(2).tolist()
    [[[-1.0], [1.0], [0.0]]]

    Source: S. Ioffe and C. Szegedy, Batch Normalization, 2015. The parts' moments are combined as in T. Chan, G. Golub
    and R. LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """

    def __init__(self, axis: int = -1, momentum: float = 0.99, epsilon: float = 1e-3, **options: Any) -> None:
        for name in ("renorm", "virtual_batch_size"):
            if options.get(name):
                rule = "no such moments, which are not those of the global batch"
                raise ValueError(errors.sentence(_NAME, name, options[name], rule))
        momentum, epsilon = errors.number(_NAME, "momentum", momentum), errors.number(_NAME, "epsilon", epsilon)
        axes = axis if isinstance(axis, (list, tuple)) and len(axis) == 1 else [axis]  # Keras 2 saves a list
        axis = errors.integer(_NAME, "axis", axes[0], least=-precision.MOST_AXES, most=precision.MOST_AXES)
        if options.get("fused"):
            options.pop("fused")  # Keras 2's kernel, which takes no mask
        # Keras would round gamma and beta to half precision
        super().__init__(axis=axis, momentum=momentum, epsilon=epsilon, **{"autocast": False, **options})

    def build(self, input_shape: Any) -> None:
        """As in Keras. Raises: ValueError: inputs without the axis of channels."""
        rank, axis = len(input_shape), self.axis[0] if isinstance(self.axis, list) else self.axis
        errors.require(_NAME, -rank <= axis < rank, "axis", axis, f"an axis of inputs of rank {rank}")
        super().build(input_shape)

    @tf.autograph.experimental.do_not_convert
    def call(self, inputs: Any, training: Any = None, mask: Any = None, lengths: Any = None) -> tf.Tensor:
        """Normalize the inputs.

        Args:
          inputs: floating ``[batch, ..., channels, ...]``, channels on ``axis``. Moments are computed in float32 at
            least.
          training: whether to use the moments of the batch, not the moving averages; a Python bool.
          mask: bool, leading axes of the inputs without the axis of channels. Keras passes on the mask of the layer
            before.
          lengths: ``[batch]`` integers, the valid positions of each row along the first axis after the batch.

        Returns: a tensor of the inputs' shape, in the layer's compute dtype.

        Raises:
          ValueError, TypeError: wrong arguments; in training, all replicas raise.
          tf.errors.InvalidArgumentError: wrong lengths or shapes inside a ``tf.function``.

        Collective in training: one all-reduce, and one for the gradient.
        """
        if isinstance(training, (tf.Tensor, tf.Variable)) and not tf.executing_eagerly():
            rule = "True, False or None: a collective cannot stand in a branch that a replica may not take"
            raise TypeError(errors.sentence(_NAME, "training", "a tensor", rule))
        trains = bool(training) and self.trainable
        x = precision.as_tensor(tf.cast(inputs, self.compute_dtype))
        (axis,) = (self.axis,) if isinstance(self.axis, int) else self.axis
        last = x.shape.rank - 1
        axis %= x.shape.rank
        order = [*(i for i in range(last + 1) if i != axis), axis]
        x = x if axis == last else tf.transpose(x, order)
        gamma, beta = (
            tf.cast(weight, x.dtype) if weight is not None else tf.fill([x.shape[-1]], tf.constant(default, x.dtype))
            for weight, default in ((self.gamma, 1), (self.beta, 0))
        )
        backend = backends.resolve_step(function=_NAME) if trains else None
        valid: tf.Tensor | None = None
        checks: list[checked.Check] = []
        error: Exception | None = None
        if trains and mask is None and lengths is None and x.shape.rank > 2:
            effect = (
                f"{_NAME}: no mask reached layer {self.name!r}, so that its moments are of all positions, padding too."
            )
            keras_masks.warn_unmasked(self, inputs, effect, "Call the layer with lengths= or mask=.")
        try:
            valid, checks = _valid(x, mask, lengths)
        except (ValueError, TypeError) as caught:
            if not trains or backend is None or backend.num_replicas == 1:
                raise
            error = caught
        if backend is None:
            checked.check_locally(backends.LocalBackend(), _NAME, checks)
            mean, variance = (tf.cast(each, x.dtype) for each in (self.moving_mean, self.moving_variance))
            y = (x - mean) * (tf.math.rsqrt(variance + self.epsilon) * gamma) + beta
            y = y if valid is None else tf.where(valid, y, tf.zeros([], y.dtype))
        else:
            moments = _moments(backend, x, valid, checks, error)
            self._move(moments)
            y = _trained(backend, x, gamma, beta, valid, moments, self.epsilon)
        y = y if axis == last else tf.transpose(y, np.argsort(order))
        return tf.cast(y, self.compute_dtype)

    def _move(self, moments: Moments) -> None:
        """Move the moving averages, by the same numbers on all replicas."""
        for moving, moment in ((self.moving_mean, moments.mean), (self.moving_variance, moments.variance)):
            old = tf.convert_to_tensor(moving)
            new = old * self.momentum + tf.cast(moment, old.dtype) * (1 - self.momentum)
            moving.assign(tf.where(moments.count > 0, new, old))


def _valid(x: tf.Tensor, mask: Any, lengths: Any) -> tuple[tf.Tensor | None, list[checked.Check]]:
    """Return which positions are valid, bool of x's rank with size 1 on axes that it does not tell apart, or None.

    Args:
      x: ``[batch, ..., channels]``.

    Raises: ValueError, TypeError: a mask or lengths of wrong rank, dtype or static shape.
    """
    sources, checks = [], []
    sizes = shapes.sizes_of(x, x.shape.rank - 1)
    if lengths is not None:
        lengths, mask_of = shapes.read_lengths(lengths)
        if x.shape.rank < 3:
            found = f"given for inputs of rank {x.shape.rank}"
            raise ValueError(
                errors.sentence(_NAME, "lengths", found, "inputs with an axis of positions after the batch")
            )
        checks = shapes.length_checks(lengths, tf.shape(x)[1])
        sources.append(shapes.Source("lengths", mask_of(tf.shape(x)[1])))
    if mask is not None:
        mask = precision.to_tensor(mask, f"{_NAME}: mask")
        if mask.dtype != tf.bool or not 0 < (mask.shape.rank or 0) < x.shape.rank:
            found = f"of shape {tuple(mask.shape)} and dtype {mask.dtype.name}"
            rule = f"bool, of the leading axes of inputs {tuple(x.shape)} without channels"
            raise ValueError(errors.sentence(_NAME, "mask", found, rule))
        sources.append(shapes.Source("mask", mask))
    fits = []
    fitted = []
    for source in sources:
        given, fit = shapes.broadcast(source, sizes)
        fitted.append(source._replace(mask=given))
        fits.append(fit)
    valid, _ = shapes.all_of(fitted)
    if valid is None:
        return None, []
    text = "mask or lengths do not match inputs, expected their leading axes (found: the rows of inputs)"
    checks.append(checked.Check(text, tf.shape(x)[0], tf.reduce_all(tf.stack(fits))))
    return shapes.widen(valid, x.shape.rank), checks


def _moments(
    backend: backends.Backend,
    x: tf.Tensor,
    valid: tf.Tensor | None,
    checks: list[checked.Check],
    error: Exception | None,
) -> Moments:
    """The moments of all replicas, from one all-gather of each one's own: no sum of squares, which would cancel."""
    axes = [*range(x.shape.rank - 1)]
    x = tf.stop_gradient(x)
    positions = tf.reduce_prod(tf.cast(tf.shape(x)[:-1], tf.float64))
    if valid is None:
        count = positions
        inner = tf.ones([], x.dtype)
    else:
        x = tf.where(valid, x, tf.zeros([], x.dtype))
        shares = tf.reduce_prod(tf.cast(tf.shape(valid)[:-1], tf.float64))
        count = tf.math.divide_no_nan(
            tf.cast(tf.math.count_nonzero(valid, dtype=tf.int64), tf.float64) * positions, shares
        )
        inner = tf.cast(valid, x.dtype)
    mean = tf.math.divide_no_nan(tf.reduce_sum(x, axes), tf.cast(count, x.dtype))
    squares = tf.reduce_sum(tf.square((x - mean) * inner), axes)
    channels = x.shape[-1]
    payload = tf.concat([count[tf.newaxis], tf.cast(mean, tf.float64), tf.cast(squares, tf.float64)], 0)
    table = checked.all_gather(backend, _NAME, payload, checks, error)
    counts, means, squares = tf.split(table, [1, channels, channels], axis=1)
    count = tf.reduce_sum(counts)
    mean = tf.math.divide_no_nan(tf.reduce_sum(counts * means, 0), count)
    squares = tf.reduce_sum(squares + counts * tf.square(means - mean), 0)
    variance = tf.math.divide_no_nan(squares, count)
    return Moments(count, tf.cast(mean, x.dtype), tf.cast(variance, x.dtype))


def _trained(
    backend: backends.Backend,
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    valid: tf.Tensor | None,
    moments: Moments,
    epsilon: float,
) -> tf.Tensor:
    """The output of a training step. Its gradient goes through the moments, over all replicas, in one all-reduce."""
    axes, zero = [*range(x.shape.rank - 1)], tf.zeros([], x.dtype)
    scale = tf.math.rsqrt(moments.variance + tf.cast(epsilon, x.dtype))
    clean = lambda tensor, other=zero: tensor if valid is None else tf.where(valid, tensor, other)

    @tf.custom_gradient
    def normalized(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
        unit = clean((clean(x) - moments.mean) * scale)

        def gradient(upstream: tf.Tensor) -> Any:
            d = clean(upstream)
            sums = tf.stack([tf.reduce_sum(d, axes), tf.reduce_sum(d * unit, axes)])
            total = backend.all_reduce(tf.cast(sums, tf.float64))
            d_mean, d_scale = tf.unstack(tf.cast(tf.math.divide_no_nan(total, moments.count), x.dtype))
            return clean((d - d_mean - unit * d_scale) * scale * gamma), sums[1], sums[0]

        elsewhere = tf.where(moments.count > 0, tf.zeros_like(beta), beta)
        return clean(unit * gamma + beta, elsewhere), gradient

    return normalized(x, gamma, beta)
