"""GradientAccumulator: many micro-batches, one optimiser step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from distpad import backends, errors, precision
from distpad.backends.variables import empty, replica_variable
from distpad.gradients import compute

_NAME = "GradientAccumulator"


class GradientAccumulator:
    """Add up the gradients of any number of micro-batches, for one step of the optimiser in a custom loop.

    The step is that of one device with all micro-batches of all replicas concatenated. Micro-batches are added on each
    replica alone; only ``take`` communicates, once a step however many there were. The sums stand in variables of each
    replica: ``add`` and ``take`` may be in one ``tf.function`` or in two, so that no more than one micro-batch is held
    in memory.

    What the loss is divided by must span them all. Where it is known beforehand, as
    ``PaddedBatches(accumulation_steps=...)`` counts it, give it to the loss: ``denominator=batch.counts``. Else let the
    loss sum, by ``denominator=1``, and give each micro-batch's count to ``add``: ``take`` divides by the counts of all
    micro-batches of all replicas.

    Args:
      variables: a list of TensorFlow or Keras variables.
      backend: the loss's backend; left out, it is detected at each call.

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
        self._counted: bool | None = None  # None: nothing was added yet

    @tf.autograph.experimental.do_not_convert
    def add(self, tape: tf.GradientTape, loss: tf.Tensor, *, count: Any = None) -> None:
        """Add the gradients of one micro-batch.

        Args:
          tape: a plain ``tf.GradientTape``.
          loss: what the loss returned on this replica for this micro-batch.
          count: what this replica's loss is to be divided by, a scalar such as its number of valid positions, where the
            loss was given ``denominator=1``; of all micro-batches, or of none.

        Raises:
          TypeError: as ``distpad.gradient``. ValueError: a count that is no scalar; counts of some micro-batches only.
        """
        function = f"{_NAME}.add"
        counted = count is not None
        if self._counted not in (None, counted):
            given = "given" if counted else "missing"
            raise ValueError(errors.sentence(function, "count", given, "with all micro-batches, or with none"))
        if counted and tf.convert_to_tensor(count).shape.rank != 0:
            raise ValueError(errors.sentence(function, "count", repr(count), "a scalar", "Give its sum."))
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
        """Take out the step's gradients, ready for ``optimizer.apply_gradients``; the next step begins at zero.

        Returns: as ``distpad.gradient``: a gradient for each variable, sparse ones as ``tf.IndexedSlices`` with the
          rows of all micro-batches; None where no loss depended on the variable. Counts of 0 alone give zeros.

        Raises:
          ValueError: nothing was ever added on this worker, which raises alone, since it knows neither the gradients'
            kinds nor whether counts were given. Have as many micro-batches on all workers, as ``PaddedBatches`` does.

        Collective under Horovod: one fused all-reduce; and one of the counts, on all engines, where they were given.
        """
        function = f"{_NAME}.take"
        resolved = backends.resolve_step(self._backend, function=function)
        if self._counted is None:
            raise ValueError(f"{function}: nothing was added. Call add for each micro-batch first.")
        share = None
        if self._count is not None:
            share = tf.math.divide_no_nan(tf.ones([], tf.float64), resolved.all_reduce(self._count.read_value()))
        found = [None if total is None else total.read(share) for total in self._totals]
        self.reset()
        return resolved.reduce_gradients(found)

    @tf.autograph.experimental.do_not_convert
    def reset(self) -> None:
        """Forget what was added, on all replicas of this worker, to begin a step again that an error ended midway."""
        held = [variable for total in self._totals if total is not None for variable in total.variables]
        for variable in [*held, *([] if self._count is None else [self._count])]:
            variable.assign(empty(variable.shape, variable.dtype), read_value=False)  # outside a replica there is none


class _Dense:
    """The sum of a dense gradient on each replica."""

    def __init__(self, like: tf.Tensor, shape: tf.TensorShape) -> None:
        self._dtype = like.dtype
        self._sum = replica_variable(shape, precision.widened(like.dtype))
        self.variables = [self._sum]

    def add(self, gradient: Any) -> None:
        self._sum.assign_add(tf.cast(tf.convert_to_tensor(gradient), self._sum.dtype))

    def read(self, share: tf.Tensor | None) -> tf.Tensor:
        return _shared(self._sum.read_value(), share, self._dtype)


class _Sparse:
    """The rows of a sparse gradient on each replica, one micro-batch's behind the other's."""

    def __init__(self, like: tf.IndexedSlices, shape: tf.TensorShape) -> None:
        self._dtype = like.dtype
        self._shape = shape
        self._values = replica_variable([None, *shape[1:]], precision.widened(like.dtype))
        self._indices = replica_variable([None], like.indices.dtype)
        self.variables = [self._values, self._indices]

    def add(self, gradient: Any) -> None:
        if isinstance(gradient, tf.Tensor):  # another loss uses the whole table
            gradient = tf.IndexedSlices(gradient, tf.range(tf.shape(gradient)[0]))
        for held, new in zip(self.variables, (gradient.values, gradient.indices)):
            held.assign(tf.concat([held.read_value(), tf.cast(new, held.dtype)], axis=0))

    def read(self, share: tf.Tensor | None) -> tf.IndexedSlices:
        values = _shared(self._values.read_value(), share, self._dtype)
        return tf.IndexedSlices(values, self._indices.read_value(), tf.constant(self._shape.as_list()))


def _shared(total: tf.Tensor, share: tf.Tensor | None, dtype: tf.DType) -> tf.Tensor:
    """Divided before it is narrowed: a sum may be too large for float16 where the mean is not."""
    return tf.cast(total if share is None else precision.scale(total, share), dtype)
