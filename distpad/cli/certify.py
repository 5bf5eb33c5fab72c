"""``distpad certify``: compare gradients on all replicas with those of one device, on the engine of this process."""

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
        help="A function without arguments, importable from the current folder. It returns a dict of model, loss, step "
        "and batch, the arguments of distpad.certify. Default: a built-in model.",
    ),
    backend: str = typer.Option("auto", help="auto, local, mirrored, multiworker or horovod."),
    replicas: Optional[int] = typer.Option(None, min=1, help="The required number of replicas."),  # noqa: UP045 (typer reads it on Python 3.9)
    cases: int = typer.Option(32, min=1, help="The least number of random steps."),
    seed: int = typer.Option(0, min=0, help="The seed of the random steps."),
    naive: bool = typer.Option(
        False, help="Certify the usual mean of each replica's own mean instead, which does not pass."
    ),
) -> None:
    """Compare the gradients of random steps on all replicas with those of one device.

    FUNCTION is called in the engine's scope, where it makes the model. All workers get the variables of worker 0, and
    must have the same batch.

    Examples:

      distpad certify --replicas 4

      distpad certify my_training:to_certify --replicas 2

      horovodrun -np 2 distpad certify my_training:to_certify

      distpad launch -np 2 -- python -m distpad certify my_training:to_certify

      horovodrun -np 2 distpad certify

      launch/multiworker.sh -np 2 -- distpad certify

    Exit codes: 0 the gradients are equal, 1 the gradients differ, 2 the gradients could not be compared.
    """
    if target is not None and naive:
        raise _refused(
            "certify: --naive is given with MODULE:FUNCTION, expected --naive with the built-in model alone."
        )
    if target is not None and ":" not in target:
        raise _refused(f"certify: the target is {target!r}, expected MODULE:FUNCTION, such as my_training:to_certify.")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # oneDNN prints its note at any log level
    import tensorflow as tf

    import distpad

    tf.get_logger().setLevel("ERROR")  # TensorFlow warns about many traces, and cases need many
    try:
        engine = distpad.backends.start(backend, replicas)
    except (ValueError, ImportError, distpad.DistpadError) as error:
        raise _refused(str(error)) from error
    own = {"loss": _mean_of_own if naive else None}
    try:
        with engine.scope():
            own = own if target is None else _made_by(target)
            certificate = distpad.certify(**own, cases=cases, seed=seed, backend=engine)
    except (ValueError, TypeError) as error:
        if target is None:
            raise
        raise _refused(f"{target} cannot be certified: {error}") from error
    if engine.worker_index == 0:
        typer.echo(str(certificate))
    engine.close()
    raise typer.Exit(0 if certificate.passed else 1)


def _refused(why: str) -> typer.Exit:
    typer.echo(why, err=True)
    return typer.Exit(2)


def _made_by(target: str) -> dict[str, Any]:
    """Import and call the function, and return its arguments of ``distpad.certify``."""
    module_name, _, name = target.partition(":")
    sys.path.insert(0, os.getcwd())
    doing = f"{module_name} does not import"
    try:
        module = importlib.import_module(module_name)
        function, doing = getattr(module, name, None), f"{target} failed"
        made = function() if callable(function) else None
    except Exception as error:
        why = f"{doing}. {traceback.format_exc()}"
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            why = f"module {module_name!r} is not found, expected one in {os.getcwd()} or installed. {error}."
        raise _refused(f"certify: {why}") from error
    if not callable(function):
        functions = ", ".join(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise _refused(f"certify: {module_name} has no function {name!r}, expected one of: {functions or 'none'}.")
    if not isinstance(made, dict) or set(made) - set(_TAKEN) or not set(made) & {"model", "step"}:
        found = f"dict with {', '.join(map(str, made))}" if isinstance(made, dict) else type(made).__name__
        rule = "a dict of model, loss and batch, or of step and batch"
        raise _refused(f"certify: {target} returned a {found}, expected {rule}.")
    return made


def _mean_of_own(y_true: Any, y_pred: Any, sample_weight: Any = None, *, lengths: Any, mask: Any = None) -> Any:
    """The usual mean of means: each replica divides by its own count, and the engine averages."""
    import tensorflow as tf

    from distpad import backends

    valid = tf.sequence_mask(lengths, tf.shape(y_true)[1])
    weight = tf.cast(valid if mask is None else valid & mask, y_pred.dtype)
    weight = weight if sample_weight is None else weight * sample_weight
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(y_true, y_pred)
    mean = tf.math.divide_no_nan(tf.reduce_sum(each * weight), tf.reduce_sum(weight))
    engine = backends.resolve()
    return mean / (engine.num_replicas if engine.gradient_reduction == "sum" else 1)
