"""Losses of empty batches, with one value a sequence: tf.nn.ctc_loss fails on a batch without rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def losses_of(loss: Callable[[Any, Any], tf.Tensor], y_true: Any, y_pred: Any, traces: dict[Any, Any]) -> tf.Tensor:
    """Call a loss ``[batch]``, but not with a batch without rows.

    Args:
      loss: ``(y_true, y_pred) -> [batch]``.
      y_true, y_pred: labels and predictions.
      traces: the traces of earlier calls without rows, kept by the caller.
    """
    leaves = filter(tf.is_tensor, tf.nest.flatten(y_pred))
    first = next((leaf for leaf in leaves if leaf.dtype.is_floating), None)
    if first is None or not first.shape.rank or (first.shape[0] or 0) > 0:
        return loss(y_true, y_pred)
    if first.shape[0] == 0:
        return _traced_for_any_rows(loss, y_true, y_pred, traces)

    def empty() -> tf.Tensor:
        return tf.reduce_sum(first, axis=list(range(1, first.shape.rank)))

    return tf.cond(tf.shape(first)[0] > 0, lambda: tf.cast(loss(y_true, y_pred), first.dtype), empty)


def _traced_for_any_rows(
    loss: Callable[[Any, Any], tf.Tensor], y_true: Any, y_pred: Any, traces: dict[Any, Any]
) -> tf.Tensor:
    """The losses of no rows, from a trace for any number of rows.

    The trace holds the operations of a batch with rows, so gradients reach the same tensors and variables, as zeros.
    Without a gradient here, Horovod's other ranks would wait for it.
    """
    leaves = tf.nest.flatten((y_true, y_pred))
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, tf.Tensor)]
    specs = [
        tf.TensorSpec([None, *leaf.shape[1:]] if leaf.shape[:1] == [0] else leaf.shape, leaf.dtype)
        for leaf in (leaves[i] for i in tensors)
    ]
    others = [leaf for leaf in leaves if not isinstance(leaf, tf.Tensor)]
    key = (repr(tf.nest.map_structure(lambda _: 0, (y_true, y_pred))), tuple(specs), tuple(map(id, others)))
    if key not in traces:

        @tf.function(input_signature=specs, autograph=False)
        def of_any_rows(*given: tf.Tensor) -> tf.Tensor:
            named = dict(zip(tensors, given))
            every = [named.get(i, leaf) for i, leaf in enumerate(leaves)]
            any_true, any_pred = tf.nest.pack_sequence_as((y_true, y_pred), every)
            return losses_of(loss, any_true, any_pred, traces)

        # concrete, so that it is a graph also under tf.config.run_functions_eagerly
        traces[key] = of_any_rows.get_concrete_function()
    return traces[key](*(leaves[i] for i in tensors))
