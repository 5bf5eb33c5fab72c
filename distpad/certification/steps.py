"""The step that is certified, on all replicas, and the same on one device beside the engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors, gradients, losses
from distpad.certification import reference, rows

_OPTIONAL = ("lengths", "mask")

Gradients = list[np.ndarray]


class Device(NamedTuple):
    """What one device gives for rows: gradients, the value of the loss, what an average is divided by, and the
    narrowest dtype of it all. Where only gradients are known, the others are 0."""

    gradients: Gradients
    value: float
    divisor: float
    dtype: str


def on_replicas(
    model: Any, loss: Any, training: bool, backend: backends.Backend
) -> Callable[[Callable[[int], Any]], list[Gradients]]:
    """A step of ``model`` and ``loss``: of each replica's micro-batches the sum of gradients, reduced by the engine."""
    ask = _asked(loss)

    def step(given: tuple[list[rows.Fields], Any]) -> list[tf.Tensor]:
        micro_batches, denominator = given
        parts = []
        for batch in micro_batches:
            with tf.GradientTape() as tape:
                value = ask(batch, predict(model, batch["x"], training), *denominator)
            found = gradients.gradient(tape, value, model.trainable_variables, backend=backend)
            parts.append(_dense(found, model.trainable_variables))
        return backend.reduce_in_optimizer([tf.add_n(column) for column in zip(*parts)])

    return _in_numpy(backend.graph(step))


def own_on_replicas(
    step: Callable[[Any], Any], form: Callable[[rows.Fields], Any], model: Any, backend: backends.Backend
) -> Callable[[Callable[[int], Any]], list[Gradients]]:
    """The user's own step, which takes its batch in the form that it was given to ``certify``."""
    called = _plain(step)
    return _in_numpy(backend.graph(lambda given: _returned(called(form(given[0][0])), model)))


def on_one_device(model: Any, loss: Any, training: bool) -> Callable[[rows.Fields], Device]:
    """``model`` and ``loss`` on one device.

    A DistributedLoss is replaced by a plain average; any other loss is taken at its word.
    """
    ask = _asked(loss)

    def step(batch: rows.Fields) -> tuple[Any, ...]:
        with tf.GradientTape() as tape:
            y_pred = predict(model, batch["x"], training)
            if isinstance(loss, losses.DistributedLoss):
                value, count = reference.of_rows(loss, batch, y_pred)
            else:
                value, count = ask(batch, y_pred), tf.zeros([])
        found = tape.gradient(value, model.trainable_variables)
        return _dense(found, model.trainable_variables), value, count, [leaf[:0] for leaf in tf.nest.flatten(y_pred)]

    traced = tf.function(step)

    def run(batch: rows.Fields) -> Device:
        found, value, count, predicted = backends.run_alone(lambda: traced(_tensors(batch)))
        dtype = _narrowest([*(tensor.dtype for tensor in (*found, *predicted)), *_computed_in(model)])
        return Device([gradient.numpy() for gradient in found], float(value), float(count), dtype)

    return run


def own_on_one_device(
    step: Callable[[Any], Any], form: Callable[[rows.Fields], Any], model: Any
) -> Callable[[rows.Fields], Device]:
    """The user's own step, where this process is all there is."""
    called = _plain(step)
    traced = tf.function(lambda batch: _returned(called(form(batch)), model))

    def run(batch: rows.Fields) -> Device:
        found = backends.run_alone(lambda: traced(_tensors(batch)))
        return Device(
            [gradient.numpy() for gradient in found],
            0.0,
            0.0,
            _narrowest([*(gradient.dtype for gradient in found), *_computed_in(model)]),
        )

    return run


def predict(model: Any, x: Any, training: bool) -> Any:
    """Call the model, in training mode where it knows one."""
    parameters = inspect.signature(getattr(model, "call", model)).parameters
    knows = "training" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return model(x, training=training) if knows else model(x)


def _asked(loss: Any) -> Callable[..., tf.Tensor]:
    """The loss, called with what the batch has and the loss takes. What Keras's own cannot take becomes weights."""
    function = getattr(loss, "__call__", loss) if not inspect.isroutine(loss) else loss  # noqa: B004
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):
        parameters = inspect.signature(lambda y_true, y_pred, **named: None).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    takes = {name for name in (*_OPTIONAL, "sample_weight", "denominator") if takes_all or name in parameters}

    def ask(batch: rows.Fields, y_pred: Any, *denominator: Any) -> tf.Tensor:
        named = {name: batch[name] for name in (*_OPTIONAL, "sample_weight") if name in batch and name in takes}
        if isinstance(loss, tf.keras.losses.Loss) and not takes & set(_OPTIONAL):
            named = _as_weights(batch, y_pred)
        if denominator:
            named["denominator"] = denominator[0]
        value = tf.convert_to_tensor(loss(batch["y"], y_pred, **named))
        if value.shape.rank != 0:
            shape = tuple(value.shape)
            remedy = "Wrap it in distpad.DistributedLoss."
            raise ValueError(errors.sentence("certify", "loss", f"of shape {shape}", "a scalar", remedy))
        return value

    return ask


def _as_weights(batch: rows.Fields, y_pred: Any) -> dict[str, Any]:
    """Lengths, mask and weights as one ``sample_weight``, as loops hand them to Keras's own losses."""
    factors = [tf.cast(batch[name], y_pred.dtype) for name in ("mask", "sample_weight") if name in batch]
    if "lengths" in batch:
        factors.append(tf.sequence_mask(batch["lengths"], tf.shape(y_pred)[1], y_pred.dtype))
    if not factors:
        return {}
    rank = max(factor.shape.rank for factor in factors)
    product = tf.ones([], y_pred.dtype)
    for factor in factors:
        product *= tf.reshape(factor, tf.concat([tf.shape(factor), [1] * (rank - factor.shape.rank)], 0))
    return {"sample_weight": product}


def _plain(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Without its own tf.function, whose trace on one device would be used again on many."""
    return getattr(step, "python_function", step)


def _returned(result: Any, model: Any) -> list[tf.Tensor]:
    """What a user's step returned, as a list of dense gradients: of the model's variables, where it is known."""
    leaves = tf.nest.flatten(result)
    if model is not None and len(leaves) != len(model.trainable_variables):
        number = len(model.trainable_variables)
        expected = f"{number}, one for each trainable variable of the model"
        raise ValueError(errors.sentence("certify", "step", f"one that returns {len(leaves)} gradients", expected))
    if all(leaf is None for leaf in leaves):
        raise ValueError(errors.sentence("certify", "step", "one that returns nothing", "the reduced gradients"))
    if model is not None:
        leaves = _dense(leaves, model.trainable_variables)
    # without a model nothing tells the shape of None, on one device and on many
    return [tf.identity(tf.convert_to_tensor(leaf)) for leaf in leaves if leaf is not None]


def _dense(found: Sequence[Any], variables: Sequence[Any]) -> list[tf.Tensor]:
    return [
        tf.zeros(variable.shape, variable.dtype) if gradient is None else tf.convert_to_tensor(gradient)
        for gradient, variable in zip(found, variables)
    ]


def _in_numpy(run: Callable[..., list[Any]]) -> Callable[[Callable[[int], Any]], list[Gradients]]:
    def called(given: Callable[[int], Any]) -> list[Gradients]:
        try:
            return [[gradient.numpy() for gradient in result] for result in run(given)]
        except tf.errors.InvalidArgumentError as error:  # what a graph finds only while it runs
            raise ValueError(f"certify: the step refused its batch: {error.message}") from error

    return called


def _tensors(batch: rows.Fields) -> rows.Fields:
    return tf.nest.map_structure(tf.convert_to_tensor, batch)


def _narrowest(dtypes: Sequence[tf.DType]) -> str:
    floats = [dtype for dtype in dtypes if dtype.is_floating]
    return min(floats, key=lambda dtype: (dtype.size, dtype.name)).name if floats else "float32"


def _computed_in(model: Any) -> list[tf.DType]:
    """Half precision that a model computes in, whatever its variables and predictions are."""
    named = {getattr(layer, "compute_dtype", None) for layer in (model, *getattr(model, "layers", []))}
    return [tf.as_dtype(name) for name in named & {"float16", "bfloat16"}]
