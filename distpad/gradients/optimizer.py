"""DistributedOptimizer: reduces gradients before a Keras optimiser clips or checks them, in compile and fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from distpad import backends, errors, versions

_NAME = "DistributedOptimizer"


@tf.keras.utils.register_keras_serializable("distpad")
class DistributedOptimizer(tf.keras.optimizers.Optimizer):
    """Give a Keras optimiser the gradient of the global batch, in ``compile`` and ``fit``.

    - Under Horovod, this optimiser reduces the gradients. (Horovod's own wrapper reduces nothing in Keras 3, and in
      Keras 2 nothing that a ``train_step`` gives to ``apply_gradients``.)
    - Under strategies, Keras 3 clips (``clipnorm``, ``global_clipnorm``, ``clipvalue``) each local gradient before it
      sums them, and its ``LossScaleOptimizer`` checks the first replica's local gradient alone. This optimiser sums
      first. Keras's own sum follows: the first replica gives it the gradient, the others give zeros. Where the
      gradient is not finite, the others give NaN, so that all replicas skip the step.
    - Keras 2 reduces before it clips. There the constructor returns ``optimizer`` itself or, under Horovod, one of its
      class that reduces, inside the ``LossScaleOptimizer`` if there is one.

    Use it under Horovod, and under strategies for clipping and loss scaling. Learning rate, schedules, slots and saving
    are those of ``optimizer``. In a custom loop, it takes the unreduced gradients of ``tape.gradient``.

    Args:
      optimizer: a Keras optimiser. For mixed precision give ``LossScaleOptimizer(optimizer)`` and, in Keras 3,
        ``compile(auto_scale_loss=False)``, so that Keras adds no second one.
      backend: the loss's backend; None: detected at each step.
      name: as in Keras.

    Raises:
      TypeError: ``optimizer`` is no Keras optimiser, or is a DistributedOptimizer.
      ValueError: ``optimizer`` accumulates gradients, which averages the averages of micro-batches; a
        ``LossScaleOptimizer`` wraps this optimiser.

    Collective, each step: one all-reduce of the gradients; under strategies a second one, by Keras.

    >>> import tensorflow as tf
    >>> model = tf.keras.Sequential([tf.keras.Input([2]), tf.keras.layers.Dense(1)])
    >>> model.compile(loss="mse", optimizer=DistributedOptimizer(tf.keras.optimizers.SGD(0.1, clipnorm=1.0)))
    >>> _ = model.fit(tf.ones([4, 2]), tf.zeros([4, 1]), verbose=0)
    """

    def __new__(cls, optimizer: Any, *, backend: Any = None, name: str | None = None) -> Any:
        if versions.KERAS >= 3:
            return super().__new__(cls)
        _check(optimizer)
        return backends.resolve_step(backend, function=_NAME).keras_2_optimizer(optimizer)

    def __init__(self, optimizer: Any, *, backend: Any = None, name: str | None = None) -> None:
        _check(optimizer)
        super().__init__(learning_rate=0.0, name=name)  # the base class's own variables are never used
        self._backend = backend
        self.inner_optimizer = optimizer

    def build(self, variables: Sequence[Any]) -> None:
        self.inner_optimizer.build(variables)
        super().build(variables)

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Iterable[Any], trainable_variables: Any = None) -> None:
        """Reduce the gradients and apply them, as in Keras. Collective: one all-reduce of the gradients."""
        gradients = list(grads)
        held = [i for i, gradient in enumerate(gradients) if gradient is not None]
        resolved = backends.resolve_step(self._backend, function=_NAME)
        for i, reduced in zip(held, resolved.reduced_gradients([gradients[i] for i in held])):
            gradients[i] = reduced
        if not self.built and trainable_variables is not None:
            self.build(trainable_variables)
        self.inner_optimizer.apply(gradients, trainable_variables)

    @property
    def variables(self) -> list[Any]:
        return self.inner_optimizer.variables

    @property
    def iterations(self) -> Any:
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.inner_optimizer.learning_rate = value

    def scale_loss(self, loss: Any) -> Any:
        return self.inner_optimizer.scale_loss(loss)

    @property
    def loss_scale_factor(self) -> float:
        """1: the inner optimiser scales the loss.

        Keras's LossScaleOptimizer sets this attribute to None in the optimiser that it wraps. The setter detects this.
        """
        return 1.0

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: Any) -> None:
        if hasattr(self, "inner_optimizer"):
            raise ValueError(
                f"{_NAME}: a LossScaleOptimizer is put around it, expected inside: it would check this replica's "
                "gradients alone. Write DistributedOptimizer(LossScaleOptimizer(optimizer)) and "
                "compile(auto_scale_loss=False)."
            )

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self) -> dict[str, Any]:
        """As in Keras. A backend that is no string is not saved, but detected."""
        return {
            "name": self.name,
            "optimizer": tf.keras.optimizers.serialize(self.inner_optimizer),
            "backend": self._backend if isinstance(self._backend, str) else None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> DistributedOptimizer:
        inner = tf.keras.optimizers.deserialize(config["optimizer"], custom_objects=custom_objects)
        return cls(**{**config, "optimizer": inner})


def _check(optimizer: Any) -> None:
    if not hasattr(optimizer, "apply_gradients") or isinstance(optimizer, (type, DistributedOptimizer)):
        raise TypeError(
            errors.sentence(
                _NAME, "optimizer", errors.shown(optimizer), "a Keras optimiser that is not distributed yet"
            )
        )
    base = getattr(optimizer, "inner_optimizer", optimizer)
    steps = getattr(base, "gradient_accumulation_steps", None)
    if steps:
        raise ValueError(
            f"{_NAME}: optimizer has gradient_accumulation_steps={steps}, expected None: it averages the averages of "
            "micro-batches. Use distpad.GradientAccumulator in a loop of your own, or larger batches."
        )
