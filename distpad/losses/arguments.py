"""Argument checks of DistributedLoss: the loss, the ranks, and the place of a call."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import tensorflow as tf

from distpad import backends, errors, versions
from distpad.losses.weights import Weights

_NAME = "DistributedLoss"


def as_keras_casts(loss: Any, y_true: Any, y_pred: Any) -> Any:
    """Cast labels to the predictions' dtype, as Keras does before ``Loss.call``: floats, and in Keras 3 integers too.

    Integers for Keras's own losses keep their dtype, since float32 holds no classes above 2**24.
    """
    if not (isinstance(y_true, tf.Tensor) and isinstance(y_pred, tf.Tensor) and y_pred.dtype.is_floating):
        return y_true
    own = _is_of_keras(loss)
    wanted = y_true.dtype.is_floating or (y_true.dtype.is_integer and hasattr(loss, "dtype") and not own)
    return tf.cast(y_true, y_pred.dtype) if wanted else y_true


def unreduced(loss: Any, user: str = _NAME) -> Any:
    """Return the loss with reduction none: itself, a copy, or the Keras loss of that name. ``user`` is for messages.

    Raises: TypeError: no loss, a class, or a DistributedLoss. ValueError: another reduction; an unknown name.
    """
    if isinstance(loss, str):
        loss = _named(loss)
    if hasattr(loss, "average") or not callable(loss):
        kinds = "a Keras loss, its name, or a callable (y_true, y_pred)"
        raise TypeError(errors.sentence(user, "loss", errors.shown(loss), kinds))
    if isinstance(loss, type):
        found = f"the class {loss.__name__}"
        raise TypeError(errors.sentence(user, "loss", found, "an instance", f"Write {loss.__name__}()."))
    reduction = getattr(loss, "reduction", None)
    if reduction in (None, "none"):
        return loss
    if reduction != ("sum_over_batch_size" if versions.KERAS >= 3 else "auto"):
        found = f"a {type(loss).__name__} of reduction {reduction!r}"
        remedy = f'Write {type(loss).__name__}(..., reduction="none").'
        raise ValueError(errors.sentence(user, "loss", found, "one of reduction none", remedy))
    copied = object.__new__(type(loss))  # copy.copy uses get_config, which may omit attributes
    copied.__dict__.update(loss.__dict__, reduction="none")
    return copied


def _named(name: str) -> Any:
    """Return Keras's loss of this name: an instance of the class, if there is one, else the function.

    In Keras 2, only the class gives labels and predictions the same rank.
    """
    try:
        found = tf.keras.losses.get(name)
    except ValueError:
        found = None
    if found is None:
        raise ValueError(errors.sentence(_NAME, "loss", errors.shown(name), "Keras's name of a loss, such as 'mse'"))
    plain = getattr(found, "__name__", "").replace("_", "").lower()
    classes = (getattr(tf.keras.losses, word) for word in dir(tf.keras.losses) if word.lower() == plain)
    return next((each() for each in classes if isinstance(each, type)), found)


def check_ignored(loss: Any, padding_value: Any) -> None:
    """Raise ValueError if the loss ignores a class that counts: Keras makes its losses 0, but it stays in the mean."""
    # Keras 2 has ignore_class in the config alone.
    ignored = loss.get_config().get("ignore_class") if isinstance(loss, tf.keras.losses.Loss) else None
    if ignored is not None and ignored != padding_value:
        remedy = f"Write padding_value={ignored!r}, so that an ignored label does not count."
        raise ValueError(errors.sentence(_NAME, "the loss's ignore_class", ignored, "the padding value", remedy))


def check_rank(losses: tf.Tensor, per: str, w: Weights, y_true: Any, y_pred: Any) -> None:
    """Raise ValueError if the rank of the loss contradicts ``per`` or the rank of masks and weights."""
    rank = losses.shape.rank
    if rank is None:
        raise ValueError(f"{_NAME}: the loss has no known rank, expected [batch, ...]. Set its shape with set_shape.")
    if rank == 0:
        raise ValueError(f"{_NAME}: the loss has rank 0, expected [batch, ...]. It must not reduce by itself.")
    if per == "sequence" and rank != 1:
        raise ValueError(f'{_NAME}: the loss has rank {rank}, expected [batch] with per="sequence".')
    if per == "sequence":
        return
    longer = _with_one_more_axis(y_true, y_pred)
    if longer and (rank == 1 or (rank == longer.rank and losses.shape[-1] != 1) or (w.rank or 0) > rank):
        name, other = ("y_true", "y_pred") if longer.of == "y_pred" else ("y_pred", "y_true")
        raise ValueError(
            f"{_NAME}: {name} has shape {longer.short} and {other} {longer.long}, expected the same number of axes: "
            f"this loss, of shape {tuple(losses.shape)}, takes positions for features. Write {name}[..., None]."
        )
    is_weight_of_rows = w.mask is None and w.weight is not None and w.weight.shape[1:] == [1]  # Keras 2 adds an axis
    if rank == 1 and (w.rank or 1) > 1 and not is_weight_of_rows:
        raise ValueError(
            f"{_NAME}: the loss has shape [batch], expected [batch, length, ...], since lengths, a mask or weights of "
            'positions were given. Write per="sequence" if it has one value a sequence. If it averages over positions '
            "because they are its last axis, write y_true[..., None] and y_pred[..., None]."
        )


def refuse_positions(loss: Any, y_true: Any, y_pred: Any) -> None:
    """Raise ValueError for a Keras loss that takes positions for features: its mean includes padding."""
    longer = _with_one_more_axis(y_true, y_pred)
    if longer and _is_of_keras(loss):
        name, other = ("y_true", "y_pred") if longer.of == "y_pred" else ("y_pred", "y_true")
        raise ValueError(
            f'{_NAME}: {name} has shape {longer.short} and {other} {longer.long}, expected with per="sequence" and '
            "lengths or a padding value a loss that leaves padding out: this one takes positions for features. Write "
            f"{name}[..., None], and leave per= away."
        )


def _is_of_keras(loss: Any) -> bool:
    module = loss.__module__ if inspect.isfunction(loss) else type(loss).__module__
    return module.split(".")[0] in ("keras", "tf_keras", "tensorflow_addons")


class _Longer(NamedTuple):
    """Labels or predictions with one axis more than the other, of size 1.

    Attributes:
      of: "y_true" or "y_pred".
      rank: the number of its axes.
      long: its shape.
      short: the shape of the other.
    """

    of: str
    rank: int
    long: tuple
    short: tuple


def _with_one_more_axis(y_true: Any, y_pred: Any) -> _Longer | None:
    if not (isinstance(y_true, tf.Tensor) and isinstance(y_pred, tf.Tensor)):
        return None
    for name, long, short in (("y_pred", y_pred.shape, y_true.shape), ("y_true", y_true.shape, y_pred.shape)):
        if None not in (long.rank, short.rank) and long.rank == short.rank + 1 > 2 and long[-1] == 1:
            return _Longer(name, long.rank, tuple(long), tuple(short))
    return None


def refuse_layers(backend: backends.Backend) -> None:
    """Raise ValueError for a call inside a Keras layer: Keras divides the losses of add_loss by the replicas."""
    if backend.gradient_reduction != "sum" or backend.num_replicas == 1:
        return
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_name
        if name in ("__call__", "losses") and isinstance(frame.f_locals.get("self"), tf.keras.layers.Layer):
            layer = type(frame.f_locals["self"]).__name__
            remedy = "Let the layer return its predictions, and give the loss to compile or call it in the step."
            expected = "outside of layers: Keras divides a loss of add_loss by the number of replicas"
            raise ValueError(errors.sentence(_NAME, "the place of the call", f"the layer {layer}", expected, remedy))
        frame = frame.f_back
