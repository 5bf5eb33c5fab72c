"""The step that is certified, on all replicas, and the same step on one device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from distpad import backends, errors, gradients, losses
from distpad.certification import batch as batches
from distpad.certification import deviation, reference, rows

_MASKS = ("lengths", "mask")
_ARGUMENTS = (*_MASKS, "sample_weight")


class Device(NamedTuple):
    """The result of one device.

    Attributes:
      gradients: one for each variable.
      value: of the loss; 0 where only gradients are known.
      divisor: of the average; 0 where only gradients are known.
      dtype: the narrowest of variables, gradients and predictions.
    """

    gradients: deviation.Gradients
    value: float
    divisor: float
    dtype: str


OneDevice = Callable[[rows.Fields], Device]
# Takes a function from the replica's number to its micro-batches and a list of at most one denominator; returns the
# reduced gradients on each replica of this worker.
Replicas = Callable[[Callable[[int], tuple[list[rows.Fields], list[Any]]]], list[deviation.Gradients]]


def on_replicas(model: Any, loss: Any, training: bool, backend: backends.Backend) -> Replicas:
    """The step of ``model`` and ``loss``: it sums gradients over micro-batches, and the engine reduces the sums."""
    call_loss = _caller(loss)

    def step(given: tuple[list[rows.Fields], Any]) -> list[tf.Tensor]:
        micro_batches, denominator = given
        parts = []
        for batch in micro_batches:
            with tf.GradientTape() as tape:
                value = call_loss(batch, predict(model, batch["x"], training), *denominator)
            found = gradients.gradient(tape, value, model.trainable_variables, backend=backend)
            parts.append(_dense(found, model.trainable_variables))
        return backend.reduce_in_optimizer([tf.add_n(column) for column in zip(*parts)])

    return _in_numpy(backend.graph(step))


def own_on_replicas(
    step: Callable[[Any], Any], given: batches.Given, model: Any, backend: backends.Backend
) -> Replicas:
    """The user's step, which gets its batch in the form of the batch that was given to ``certify``."""
    untraced = _untraced(step)
    return _in_numpy(backend.graph(lambda case: _returned(untraced(given.form(case[0][0])), model)))


def on_one_device(model: Any, loss: Any, training: bool) -> OneDevice:
    """The step of ``model`` and ``loss`` on one device. A plain average replaces a ``DistributedLoss``; any other loss
    is called as it is."""
    call_loss = _caller(loss)

    def step(batch: rows.Fields) -> tuple[Any, ...]:
        with tf.GradientTape() as tape:
            y_pred = predict(model, batch["x"], training)
            if isinstance(loss, losses.DistributedLoss):
                value, divisor = reference.of_rows(loss, batch, y_pred)
            else:
                value, divisor = call_loss(batch, y_pred), tf.zeros([])
        found = tape.gradient(value, model.trainable_variables)
        return _dense(found, model.trainable_variables), value, divisor, [leaf[:0] for leaf in tf.nest.flatten(y_pred)]

    return _alone(step, model)


def own_on_one_device(step: Callable[[Any], Any], given: batches.Given, model: Any) -> OneDevice:
    """The user's step, run as if this process were the only one."""
    untraced = _untraced(step)
    run = _alone(lambda batch: (_returned(untraced(given.form(batch)), model), 0.0, 0.0, []), model)
    return lambda batch: run(given.counted(batch))


def _alone(step: Callable[[rows.Fields], tuple[Any, ...]], model: Any) -> OneDevice:
    """Run ``step(batch) -> (gradients, value, divisor, predictions)`` outside the engine."""
    traced = tf.function(step)

    def run(batch: rows.Fields) -> Device:
        tensors = lambda: tf.nest.map_structure(tf.convert_to_tensor, batch)
        found, value, divisor, predicted = backends.run_alone(lambda: traced(tensors()))
        dtype = _narrowest([*(tensor.dtype for tensor in (*found, *predicted)), *_half_precision(model)])
        return Device([gradient.numpy() for gradient in found], float(value), float(divisor), dtype)

    return run


def restoring(side: Callable[..., Any], model: Any) -> Callable[..., Any]:
    """The same step, after which moving averages and counters of ``model`` are what they were before.

    Otherwise a layer whose numbers depend on a counter, such as dropout, would draw others on each side.
    """

    def run(*given: Any) -> Any:
        variables = [backends.tensorflow_variable(variable, "certify") for variable in model.non_trainable_variables]
        before = [variable.numpy() for variable in variables]
        try:
            return side(*given)
        finally:
            for variable, value in zip(variables, before):
                variable.assign(value)

    return run


def predict(model: Any, x: Any, training: bool) -> Any:
    """Call the model, with ``training`` where it has that argument."""
    parameters = inspect.signature(getattr(model, "call", model)).parameters
    has_training = "training" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return model(x, training=training) if has_training else model(x)


def _caller(loss: Any) -> Callable[..., tf.Tensor]:
    """A function that calls the loss with the fields of the batch that the loss has arguments for.

    A Keras loss has no argument for lengths and masks, and gets both as sample weights.
    """
    function = getattr(loss, "__call__", loss) if not inspect.isroutine(loss) else loss  # noqa: B004
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):
        parameters = inspect.signature(lambda y_true, y_pred, **named: None).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken = [name for name in _ARGUMENTS if takes_all or name in parameters]
    needs_weights = isinstance(loss, tf.keras.losses.Loss) and not set(_MASKS) & set(taken)

    def call(batch: rows.Fields, y_pred: Any, *denominator: Any) -> tf.Tensor:
        named = {name: batch[name] for name in taken if name in batch}
        if needs_weights:
            named = _as_weights(batch, y_pred)
        if denominator:
            named["denominator"] = denominator[0]
        value = tf.convert_to_tensor(loss(batch["y"], y_pred, **named))
        if value.shape.rank != 0:
            shape = tuple(value.shape)
            remedy = "Wrap it in distpad.DistributedLoss."
            raise ValueError(errors.sentence("certify", "loss", f"of shape {shape}", "a scalar", remedy))
        return value

    return call


def _as_weights(batch: rows.Fields, y_pred: Any) -> dict[str, Any]:
    """Lengths, mask and weights as one ``sample_weight``."""
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


def _untraced(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The Python function of a tf.function, which would reuse a trace of one device on many."""
    return getattr(step, "python_function", step)


def _returned(result: Any, model: Any) -> list[tf.Tensor]:
    """The result of a user's step as dense gradients, one for each variable of the model where the model is known.

    Without a model, gradients that are None are left out, since their shapes are unknown.
    """
    leaves = tf.nest.flatten(result)
    if model is not None and len(leaves) != len(model.trainable_variables):
        number = len(model.trainable_variables)
        expected = f"{number}, one for each trainable variable of the model"
        raise ValueError(errors.sentence("certify", "step", f"one that returns {len(leaves)} gradients", expected))
    if all(leaf is None for leaf in leaves):
        raise ValueError(errors.sentence("certify", "step", "one that returns nothing", "the reduced gradients"))
    if model is not None:
        leaves = _dense(leaves, model.trainable_variables)
    return [tf.identity(tf.convert_to_tensor(leaf)) for leaf in leaves if leaf is not None]


def _dense(found: Sequence[Any], variables: Sequence[Any]) -> list[tf.Tensor]:
    """Gradients as dense tensors, zeros for None."""
    return [
        tf.zeros(variable.shape, variable.dtype) if gradient is None else tf.convert_to_tensor(gradient)
        for gradient, variable in zip(found, variables)
    ]


def _in_numpy(run: Callable[..., list[Any]]) -> Replicas:
    """``run`` with NumPy gradients, and with a ValueError where a check fails inside the graph."""

    def called(given: Callable[[int], Any]) -> list[deviation.Gradients]:
        try:
            return [[gradient.numpy() for gradient in result] for result in run(given)]
        except tf.errors.InvalidArgumentError as error:
            raise ValueError(f"certify: the step refused its batch: {error.message}") from error

    return called


def _narrowest(dtypes: Sequence[tf.DType]) -> str:
    floats = [dtype for dtype in dtypes if dtype.is_floating]
    return min(floats, key=lambda dtype: (dtype.size, dtype.name)).name if floats else "float32"


def _half_precision(model: Any) -> list[tf.DType]:
    """The half precision that layers compute in, though variables and predictions may be wider."""
    named = {getattr(layer, "compute_dtype", None) for layer in (model, *getattr(model, "layers", []))}
    return [tf.as_dtype(name) for name in named & {"float16", "bfloat16"}]
