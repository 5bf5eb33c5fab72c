"""``distpad certify``: proof on the engine that the command is started under."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any, Optional

import typer

_TAKEN = ("model", "loss", "step", "batch")


def certify(
    target: Optional[str] = typer.Argument(  # noqa: UP045 (typer reads it on Python 3.9)
        None,
        metavar="[MODULE:FUNCTION]",
        help="A function without arguments, importable from here: it returns a dict of model, loss, step and batch, as "
        "distpad.certify takes them. Left out, a built-in model is certified.",
    ),
    backend: str = typer.Option("auto", help="auto, local, mirrored, multiworker or horovod."),
    replicas: Optional[int] = typer.Option(None, min=1, help="How many replicas there must be."),  # noqa: UP045 (typer reads it on Python 3.9)
    cases: int = typer.Option(32, min=1, help="How many random steps."),
    seed: int = typer.Option(0, min=0, help="Of the random steps."),
    naive: bool = typer.Option(
        False, help="Certify the usual mean of each replica's own mean instead, and see it fail."
    ),
) -> None:
    """Compare the gradients of random steps on all replicas with those of one device.

    FUNCTION is called in the scope of the engine, where it makes its model. Workers get the variables of the first; the
    batch must be the same on all of them.

    Exits with 0 where gradients are equal, with 1 where they differ, and with 2 where it could not be told.

    Examples:

      distpad certify --replicas 4

      distpad certify my_training:to_certify --replicas 2

      horovodrun -np 2 distpad certify my_training:to_certify

      distpad launch -np 2 -- python -m distpad certify my_training:to_certify

      horovodrun -np 2 distpad certify

      launch/multiworker.sh -np 2 -- distpad certify
    """
    if target is not None and (naive or ":" not in target):
        typer.echo(
            "certify: --naive is of the built-in model, expected without MODULE:FUNCTION."
            if naive
            else f"certify: {target!r} is no MODULE:FUNCTION, expected such as my_training:to_certify.",
            err=True,
        )
        raise typer.Exit(2)
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
    own = {"loss": _mean_of_own if naive else None}
    try:
        with engine.scope():
            own = own if target is None else _made_by(target)
            certificate = distpad.certify(**own, cases=cases, seed=seed, backend=engine)
    except _Unusable as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    except (ValueError, TypeError) as error:
        if target is None:
            raise
        typer.echo(f"{target} cannot be certified: {error}", err=True)
        raise typer.Exit(2) from error
    if engine.worker_index == 0:
        typer.echo(str(certificate))
    engine.close()
    raise typer.Exit(0 if certificate.passed else 1)


class _Unusable(Exception):
    """What the command line names is not there, or fails, or returns something else."""


def _made_by(target: str) -> dict[str, Any]:
    """What the named function returns: arguments of ``distpad.certify``."""
    module_name, _, name = target.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise _Unusable(f"certify: {module_name} does not import. {traceback.format_exc()}") from error
        raise _Unusable(
            f"certify: module {module_name!r} is not found, expected one in {here} or installed. {error}."
        ) from error
    except Exception as error:
        raise _Unusable(f"certify: {module_name} does not import. {traceback.format_exc()}") from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = ", ".join(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise _Unusable(f"certify: {module_name} has no function {name!r}, expected one of: {functions or 'none'}.")
    try:
        made = function()
    except Exception as error:
        raise _Unusable(f"certify: {target} failed. {traceback.format_exc()}") from error
    if not isinstance(made, dict) or set(made) - set(_TAKEN) or not set(made) & {"model", "step"}:
        found = f"dict with {', '.join(map(str, made))}" if isinstance(made, dict) else type(made).__name__
        raise _Unusable(
            f"certify: {target} returned a {found}, expected a dict of model, loss and batch, or of step and batch."
        )
    return made


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
