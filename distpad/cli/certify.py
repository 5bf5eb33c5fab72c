"""``distpad certify``: proof on the engine that the command is started under."""

from __future__ import annotations

import os
from typing import Any, Optional

import typer


def certify(
    backend: str = typer.Option("auto", help="auto, local, mirrored, multiworker or horovod."),
    replicas: Optional[int] = typer.Option(None, min=1, help="How many replicas there must be."),  # noqa: UP045 (typer reads it on Python 3.9)
    cases: int = typer.Option(32, min=1, help="How many random steps."),
    seed: int = typer.Option(0, min=0, help="Of the random steps."),
    naive: bool = typer.Option(
        False, help="Certify the usual mean of each replica's own mean instead, and see it fail."
    ),
) -> None:
    """Compare the gradients of random steps on all replicas with those of one device.

    Exits with 1 where they differ.

    Examples:

      distpad certify --replicas 4

      horovodrun -np 2 distpad certify

      launch/multiworker.sh -np 2 -- distpad certify
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # its note is printed at any level of the log
    import tensorflow as tf

    import distpad

    tf.get_logger().setLevel("ERROR")  # each case is a graph of its own, which TensorFlow would warn of
    try:
        engine = distpad.backends.start(backend, replicas)
    except (ValueError, ImportError, distpad.DistpadError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    certificate = distpad.certify(loss=_mean_of_own if naive else None, cases=cases, seed=seed, backend=engine)
    if engine.worker_index == 0:
        typer.echo(str(certificate))
    engine.close()
    raise typer.Exit(0 if certificate.passed else 1)


def _mean_of_own(y_true: Any, y_pred: Any, sample_weight: Any = None, *, lengths: Any, mask: Any = None) -> Any:
    """What loops usually do: each replica divides by its own count, and the engine takes the mean of the means."""
    import tensorflow as tf

    from distpad import backends

    valid = tf.sequence_mask(lengths, tf.shape(y_true)[1])
    weight = tf.cast(valid if mask is None else valid & mask, y_pred.dtype)
    weight = weight if sample_weight is None else weight * sample_weight
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(y_true, y_pred)
    mean = tf.math.divide_no_nan(tf.reduce_sum(each * weight), tf.reduce_sum(weight))
    engine = backends.resolve()
    return mean / (engine.num_replicas if engine.gradient_reduction == "sum" else 1)
