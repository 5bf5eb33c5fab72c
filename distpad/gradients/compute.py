"""Functions of a custom training loop: gradients, the first broadcast, regularisation, logging."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from distpad import backends, errors, precision


@tf.autograph.experimental.do_not_convert
def gradient(tape: tf.GradientTape, loss: tf.Tensor, variables: Sequence[Any], *, backend: Any = None) -> list[Any]:
    """Differentiate a DistributedLoss, for ``optimizer.apply_gradients``.

    Under strategies the optimiser sums the local gradients, so this function returns them unreduced. Under Horovod
    this function reduces them. It also takes Keras 3 variables, for which Horovod's own tape fails.

    Args:
      tape: a plain ``tf.GradientTape``.
      loss: the scalar that the loss returned on this replica.
      variables: a list of TensorFlow or Keras variables.
      backend: the loss's backend; None: detected.

    Returns: one gradient for each variable, of its shape and dtype; a sparse gradient as ``tf.IndexedSlices``; None for
      a variable on which the loss does not depend. Equal on all replicas under Horovod, local under strategies.

    Raises:
      TypeError: ``tape`` is no tape, or Horovod's own, which reduces by itself; ``variables`` is no list.

    Collective under Horovod: all ranks call this the same number of times; one fused all-reduce.

    >>> x = tf.Variable(3.0)
    >>> with tf.GradientTape() as tape:
    ...     y = x * x
    >>> [float(g) for g in gradient(tape, y, [x])]
    [6.0]
    """
    resolved = backends.resolve_step(backend, function="gradient")
    return resolved.reduce_gradients(differentiate("gradient", tape, loss, variables))


def differentiate(function: str, tape: tf.GradientTape, loss: tf.Tensor, variables: Sequence[Any]) -> list[Any]:
    """Return the local gradients. Raises: TypeError, in the name of the public ``function``."""
    if not hasattr(tape, "gradient"):
        raise TypeError(errors.sentence(function, "tape", errors.shown(tape), "a tf.GradientTape"))
    if not isinstance(variables, (list, tuple)):
        raise TypeError(errors.sentence(function, "variables", type(variables).__name__, "a list of variables"))
    if hasattr(tape, "register_local_source"):
        raise TypeError(
            f"{function}: tape is Horovod's DistributedGradientTape, expected a plain tf.GradientTape: gradients would "
            "be reduced twice. Drop hvd.DistributedGradientTape, or call tape.gradient."
        )
    for variable in variables:
        is_known = tf.is_tensor(variable) or hasattr(variable, "assign")
        errors.require(function, is_known, "variables", errors.shown(variable), "a list of variables", error=TypeError)
    if not tf.is_tensor(loss):
        raise TypeError(errors.sentence(function, "loss", errors.shown(loss), "a tensor"))
    return tape.gradient(loss, list(variables))


def broadcast_variables(variables: Iterable[Any], *, root: int = 0, backend: Any = None) -> None:
    """Assign the values of worker ``root`` to the variables of all workers, before the first step.

    Strategies create equal variables on all workers, so this function changes nothing there.

    Args:
      variables: Keras 2, Keras 3 or TensorFlow variables, those of a built optimiser included.
      root: the index of the worker, an integer from 0 to the number of workers - 1.
      backend: see ``distpad.backends.resolve``; None: detected.

    Raises:
      ValueError: ``root`` is no worker; on all workers, numbers, shapes or dtypes of the variables differ between
        workers (for example, only some optimisers are built).

    Collective among workers: all workers call this the same number of times.

    >>> broadcast_variables([tf.Variable(1.0)])
    """
    resolved = backends.resolve(backend, function="broadcast_variables")
    is_worker, last = errors.is_integer(root) and 0 <= root < resolved.num_workers, resolved.num_workers - 1
    errors.require("broadcast_variables", is_worker, "root", errors.shown(root), f"a worker, 0 to {last}")
    held = [backends.tensorflow_variable(variable, "broadcast_variables") for variable in variables]
    if resolved.num_workers > 1:
        backends.check_alike(held, resolved, "broadcast_variables")
    resolved.broadcast(held, root)


@tf.autograph.experimental.do_not_convert
def scale_regularization(losses: Iterable[Any], *, backend: Any = None) -> tf.Tensor:
    r"""Sum penalties so that they count once globally when each replica adds the sum to its DistributedLoss.

    Penalties p (``model.losses``) depend on the weights alone and are equal on all R replicas. An engine that sums the
    replicas' gradients would count them R times. With s the gradient scale (1 where the engine sums, R where it
    averages), the result is

    .. math:: s / R \cdot \sum p

    Args:
      losses: floating scalars; an empty list gives 0.
      backend: see ``distpad.backends.resolve``; None: detected.

    Returns: a scalar of the widest dtype of the penalties, equal on all replicas.

    Raises:
      ValueError: a penalty is no scalar.
      TypeError: a penalty is not floating.

    >>> float(scale_regularization([tf.constant(1.0), tf.constant(2.0)]))
    3.0
    """
    resolved = backends.resolve_step(backend, function="scale_regularization")
    penalties = [precision.to_tensor(loss, "scale_regularization: a loss") for loss in losses] or [tf.constant(0.0)]
    if any(penalty.shape.rank for penalty in penalties):
        shapes = [tuple(penalty.shape) for penalty in penalties]
        raise ValueError(errors.sentence("scale_regularization", "losses", f"of shapes {shapes}", "scalars"))
    dtypes = [penalty.dtype.name for penalty in penalties]
    is_floating, rule = all(penalty.dtype.is_floating for penalty in penalties), "floating scalars"
    errors.require("scale_regularization", is_floating, "losses", f"of dtypes {dtypes}", rule, error=TypeError)
    widest = max((penalty.dtype for penalty in penalties), key=lambda dtype: dtype.size)
    total = tf.add_n([tf.cast(penalty, widest) for penalty in penalties])
    gradient_scale, replicas = (tf.cast(n, total.dtype) for n in (resolved.gradient_scale, resolved.replica_count()))
    return total * (gradient_scale / replicas)


@tf.autograph.experimental.do_not_convert
def global_value(loss: Any, *, backend: Any = None) -> tf.Tensor:
    """Return the global mean from the losses of all replicas, for logging.

    Args:
      loss: the scalar that a DistributedLoss returned; outside ``strategy.run``, the value that ``strategy.run``
        returned.
      backend: the loss's backend; None: detected.

    Returns: a scalar of the loss's dtype, equal on all replicas.

    Raises:
      ValueError: per-replica values outside the scope of their strategy, without ``backend=strategy``.

    Collective: one all-reduce.

    >>> float(global_value(tf.constant(2.0)))
    2.0
    """
    resolved = backends.resolve_step(backend, function="global_value")
    return resolved.reduce_loss(loss)
