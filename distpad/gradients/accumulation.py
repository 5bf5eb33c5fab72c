"""GradientAccumulator: sums the gradients of several micro-batches for one optimiser step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from distpad import backends, errors, precision
from distpad.backends.variables import empty, replica_variable
from distpad.gradients import compute

_NAME = "GradientAccumulator"


class GradientAccumulator:
    r"""Sum the gradients of any number of micro-batches, for one optimiser step in a custom loop.

    The step equals that of one device with all micro-batches of all replicas concatenated. Each replica adds its
    micro-batches by itself. Only ``take`` communicates, once a step. The sums are variables of each replica: ``add``
    and ``take`` may run in one ``tf.function`` or in two, so that memory holds one micro-batch.

    The denominator of the loss must span all micro-batches. If it is counted before the step, as
    ``PaddedBatches(accumulation_steps=...)`` does, give it to the loss: ``denominator=batch.counts``. Else sum in the
    loss, with ``denominator=1``, and give the count c of each micro-batch to ``add``. With g the gradients of
    micro-batch m on replica r, ``take`` then returns

    .. math:: \sum_{r, m} g_{r, m} / \sum_{r, m} c_{r, m}

    Args:
      variables: a list of TensorFlow or Keras variables.
      backend: the loss's backend; None: detected at each call.

    Raises:
      TypeError: ``variables`` is no list.

    >>> w = tf.Variable(1.0)
    >>> accumulator = GradientAccumulator([w])
    >>> for x in (tf.constant([1.0, 2.0]), tf.constant([9.0])):
    ...     with tf.GradientTape() as tape:
    ...         loss = tf.reduce_sum(w * x)
    ...     accumulator.add(tape, loss, count=tf.size(x))
    >>> [float(gradient) for gradient in accumulator.take()]
    [4.0]
    """

    def __init__(self, variables: Sequence[Any], *, backend: Any = None) -> None:
        if not isinstance(variables, (list, tuple)):
            raise TypeError(errors.sentence(_NAME, "variables", type(variables).__name__, "a list of variables"))
        self._variables = list(variables)
        self._backend = backend
        self._totals: list[_Dense | _Sparse | None] = [None] * len(self._variables)
        self._count: tf.Variable | None = None
        self._counted: bool | None = None  # whether micro-batches have counts; None before the first one

    @tf.autograph.experimental.do_not_convert
    def add(self, tape: tf.GradientTape, loss: tf.Tensor, *, count: Any = None) -> None:
        """Add the gradients of one micro-batch. Not collective.

        Args:
          tape: a plain ``tf.GradientTape``.
          loss: the scalar that the loss returned on this replica for this micro-batch.
          count: the denominator of this micro-batch on this replica, a scalar such as the number of its valid
            positions, for a loss of ``denominator=1``. Give it for all micro-batches or for none.

        Raises:
          TypeError: as ``distpad.gradient``.
          ValueError: ``count`` is no scalar, or is given for some micro-batches only.
        """
        function = f"{_NAME}.add"
        counted = count is not None
        if self._counted not in (None, counted):
            given = "given" if counted else "missing"
            raise ValueError(errors.sentence(function, "count", given, "with all micro-batches, or with none"))
        if counted:
            count = precision.to_tensor(count, f"{function}: count")
            errors.require(function, count.shape.rank == 0, "count", errors.shown(count), "a scalar", "Give its sum.")
            is_number, dtype = count.dtype.is_floating or count.dtype.is_integer, f"of dtype {count.dtype.name}"
            errors.require(function, is_number, "count", dtype, "a number", error=TypeError)
        found = compute.differentiate(function, tape, loss, self._variables)
        for i, (gradient, variable) in enumerate(zip(found, self._variables)):
            if gradient is None:
                continue
            total = self._totals[i]
            if total is None:
                kind = _Sparse if isinstance(gradient, tf.IndexedSlices) else _Dense
                total = self._totals[i] = kind(gradient, tf.TensorShape(variable.shape))
            total.add(gradient)
        if counted:
            if self._count is None:
                self._count = replica_variable([], tf.float64)
            self._count.assign_add(tf.cast(count, tf.float64))
        self._counted = counted

    @tf.autograph.experimental.do_not_convert
    def take(self) -> list[Any]:
        """Return the gradients of this step for ``optimizer.apply_gradients``, and reset the sums to zero.

        Returns: as ``distpad.gradient``, one gradient for each variable. A sparse gradient is a ``tf.IndexedSlices``
          with the rows of all micro-batches. A variable on which no loss depends gives None. A total count of 0 gives
          zeros.

        Raises:
          ValueError: this worker never added a micro-batch. It raises alone, since it knows neither the kinds of the
            gradients nor whether there are counts. Give all workers as many micro-batches, as ``PaddedBatches`` does.

        Collective: under Horovod one fused all-reduce of the gradients; with counts, one all-reduce of them on all
        engines.
        """
        function = f"{_NAME}.take"
        resolved = backends.resolve_step(self._backend, function=function)
        if self._counted is None:
            raise ValueError(f"{function}: nothing was added. Call add for each micro-batch first.")
        factor = None
        if self._count is not None:
            factor = tf.math.divide_no_nan(tf.ones([], tf.float64), resolved.all_reduce(self._count.read_value()))
        found = [None if total is None else total.read(factor) for total in self._totals]
        self.reset()
        return resolved.reduce_gradients(found)

    @tf.autograph.experimental.do_not_convert
    def reset(self) -> None:
        """Reset the sums to zero on all replicas of this worker, to repeat a step after an error. Not collective."""
        held = [variable for total in self._totals if total is not None for variable in total.variables]
        for variable in [*held, *([] if self._count is None else [self._count])]:
            variable.assign(
                empty(variable.shape, variable.dtype), read_value=False
            )  # no value to read outside a replica


class _Dense:
    """The sum of a dense gradient on each replica."""

    def __init__(self, like: tf.Tensor, shape: tf.TensorShape) -> None:
        self._dtype = like.dtype
        self._sum = replica_variable(shape, precision.widened(like.dtype))
        self.variables = [self._sum]

    def add(self, gradient: Any) -> None:
        self._sum.assign_add(tf.cast(tf.convert_to_tensor(gradient), self._sum.dtype))

    def read(self, factor: tf.Tensor | None) -> tf.Tensor:
        return _scaled(self._sum.read_value(), factor, self._dtype)


class _Sparse:
    """The rows of a sparse gradient on each replica, concatenated over micro-batches."""

    def __init__(self, like: tf.IndexedSlices, shape: tf.TensorShape) -> None:
        self._dtype = like.dtype
        self._shape = shape
        self._values = replica_variable([None, *shape[1:]], precision.widened(like.dtype))
        self._indices = replica_variable([None], like.indices.dtype)
        self.variables = [self._values, self._indices]

    def add(self, gradient: Any) -> None:
        if isinstance(gradient, tf.Tensor):  # this loss uses the whole table
            gradient = tf.IndexedSlices(gradient, tf.range(tf.shape(gradient)[0]))
        for held, new in zip(self.variables, (gradient.values, gradient.indices)):
            held.assign(tf.concat([held.read_value(), tf.cast(new, held.dtype)], axis=0))

    def read(self, factor: tf.Tensor | None) -> tf.IndexedSlices:
        values = _scaled(self._values.read_value(), factor, self._dtype)
        return tf.IndexedSlices(values, self._indices.read_value(), tf.constant(self._shape.as_list()))


def _scaled(total: tf.Tensor, factor: tf.Tensor | None, dtype: tf.DType) -> tf.Tensor:
    """Scale, then cast: float16 may hold the mean, but not the sum."""
    return tf.cast(total if factor is None else precision.scale(total, factor), dtype)
