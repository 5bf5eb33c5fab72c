"""What a custom training loop needs beside the loss: gradients, the first broadcast, regularisation, logging."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import backends, errors


@tf.autograph.experimental.do_not_convert
def gradient(tape: tf.GradientTape, loss: tf.Tensor, variables: Sequence[Any], *, backend: Any = None) -> list[Any]:
    """Differentiate a DistributedLoss, ready for ``optimizer.apply_gradients``.

    Under strategies the optimiser sums the replicas' gradients itself, so they are returned as they are. Under Horovod
    they are reduced here, as the loss expects. Works with Keras 2 and 3 variables, for which Horovod's tape fails.

    Args:
      tape: a plain ``tf.GradientTape``.
      loss: what the loss returned on this replica.
      variables: TensorFlow or Keras variables.
      backend: the loss's backend; left out, it is detected.

    Returns: a gradient for each variable, sparse ones as ``tf.IndexedSlices``; None where the loss does not depend on
      the variable.

    Raises:
      TypeError: the tape is Horovod's own, which reduces by itself, or no tape; ``variables`` is no list.

    Collective under Horovod: one fused all-reduce.

    >>> x = tf.Variable(3.0)
    >>> with tf.GradientTape() as tape:
    ...     y = x * x
    >>> [float(g) for g in gradient(tape, y, [x])]
    [6.0]
    """
    resolved = backends.resolve_step(backend, function="gradient")
    return resolved.reduce_gradients(differentiate("gradient", tape, loss, variables))


def differentiate(function: str, tape: tf.GradientTape, loss: tf.Tensor, variables: Sequence[Any]) -> list[Any]:
    """This replica's own gradients, for the public ``function``."""
    if not hasattr(tape, "gradient"):
        raise TypeError(errors.sentence(function, "tape", repr(tape), "a tf.GradientTape"))
    if not isinstance(variables, (list, tuple)):
        raise TypeError(errors.sentence(function, "variables", type(variables).__name__, "a list of variables"))
    if hasattr(tape, "register_local_source"):
        raise TypeError(
            f"{function}: tape is Horovod's DistributedGradientTape, expected a plain tf.GradientTape: gradients would "
            "be reduced twice. Drop hvd.DistributedGradientTape, or call tape.gradient."
        )
    return tape.gradient(loss, list(variables))


def broadcast_variables(variables: Iterable[Any], *, root: int = 0, backend: Any = None) -> None:
    """Give all workers the variables of worker ``root``, before the first step.

    Strategies create variables alike on all workers, so that nothing is done there.

    Args:
      variables: Keras 2, Keras 3 or TensorFlow variables; the optimiser's too, once it is built.
      root: the worker whose values count.
      backend: left out, it is detected.

    Raises:
      ValueError: on all workers, when they do not hold the same number of variables with the same shapes and dtypes
        (an optimiser that was built on some of them only); a root that is no worker.

    Collective.

    >>> broadcast_variables([tf.Variable(1.0)])
    """
    resolved = backends.resolve(backend, function="broadcast_variables")
    if not isinstance(root, (int, np.integer)) or not 0 <= root < resolved.num_workers:
        raise ValueError(f"broadcast_variables: root is {root!r}, expected a worker, 0 to {resolved.num_workers - 1}.")
    held = [backends.tensorflow_variable(variable, "broadcast_variables") for variable in variables]
    if resolved.num_workers > 1:
        backends.check_alike(held, resolved, "broadcast_variables")
    resolved.broadcast(held, root)


@tf.autograph.experimental.do_not_convert
def scale_regularization(losses: Iterable[Any], *, backend: Any = None) -> tf.Tensor:
    """Sum penalties so that, added to every replica's DistributedLoss, they count once globally.

    Penalties (``model.losses``) depend on the weights alone and are the same on all replicas; where the engine sums,
    R of them would count R times.

    Args:
      losses: scalars; none gives 0.
      backend: left out, it is detected.

    Returns: a scalar of the widest of their dtypes, the same on all replicas.

    Raises:
      ValueError: a penalty that is no scalar.

    >>> float(scale_regularization([tf.constant(1.0), tf.constant(2.0)]))
    3.0
    """
    resolved = backends.resolve_step(backend, function="scale_regularization")
    penalties = [tf.convert_to_tensor(loss) for loss in losses] or [tf.constant(0.0)]
    if any(penalty.shape.rank for penalty in penalties):
        shapes = [tuple(penalty.shape) for penalty in penalties]
        raise ValueError(errors.sentence("scale_regularization", "losses", f"of shapes {shapes}", "scalars"))
    widest = max((penalty.dtype for penalty in penalties), key=lambda dtype: dtype.size)
    total = tf.add_n([tf.cast(penalty, widest) for penalty in penalties])
    gradient_scale, replicas = (tf.cast(n, total.dtype) for n in (resolved.gradient_scale, resolved.replica_count()))
    return total * (gradient_scale / replicas)


@tf.autograph.experimental.do_not_convert
def global_value(loss: Any, *, backend: Any = None) -> tf.Tensor:
    """The global mean that a replica's loss is a share of, for logging.

    Args:
      loss: what a DistributedLoss returned; outside ``strategy.run``, what ``strategy.run`` returned.
      backend: left out, it is detected.

    Returns: a scalar, the same on all workers.

    Raises:
      ValueError: per-replica values outside the scope of their strategy, without ``backend=strategy``.

    Collective.

    >>> float(global_value(tf.constant(2.0)))
    2.0
    """
    resolved = backends.resolve_step(backend, function="global_value")
    return resolved.reduce_loss(loss)
