"""DistributedOptimizer: Keras's fit where the engine's reduction is missing, or comes too late."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from distpad import backends, errors, versions

_NAME = "DistributedOptimizer"


@tf.keras.utils.register_keras_serializable("distpad")
class DistributedOptimizer(tf.keras.optimizers.Optimizer):
    """Give a Keras optimiser the gradient of the global batch, in ``compile`` and ``fit``.

    - Under Horovod, gradients are reduced as the loss expects. (Horovod's own wrapper reduces nothing in
      Keras 3, without a word.)
    - Under strategies, Keras 3 clips (``clipnorm``, ``global_clipnorm``, ``clipvalue``) each replica's share of the
      gradient before it sums them, and its ``LossScaleOptimizer`` looks for infinities in the first replica's share
      alone. Here the shares are summed first: the first replica's optimiser gets the sum, the others get zeros, or
      NaN where it is not finite, so that Keras's own sum leaves it as it is and all see that.
    - Keras 2 does this right: what is returned there is ``optimizer`` itself, or under Horovod its wrapper, inside the
      ``LossScaleOptimizer`` if there is one.

    All else is the optimiser's: learning rate, schedules, slots, saving. It is needed under Horovod, and under
    strategies for clipping and loss scaling. ``tape.gradient`` is what it takes in a loop of one's own.

    Args:
      optimizer: a Keras optimiser; for mixed precision ``LossScaleOptimizer(optimizer)``, and then
        in Keras 3 ``compile(auto_scale_loss=False)``, since it would wrap what is wrapped already.
      backend: the loss's backend; left out, it is detected at each step.
      name: as in Keras.

    Raises:
      TypeError: ``optimizer`` is no Keras optimiser, or distributed already.
      ValueError: it accumulates gradients, which averages the averages of micro-batches; a ``LossScaleOptimizer`` is
        put around this one.

    Collective, each step: one all-reduce of the gradients; under strategies one more, of Keras's.

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
        super().__init__(learning_rate=0.0, name=name)  # its own variables are never used
        self._backend = backend
        self.inner_optimizer = optimizer

    def build(self, variables: Sequence[Any]) -> None:
        self.inner_optimizer.build(variables)
        super().build(variables)

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Iterable[Any], trainable_variables: Any = None) -> None:
        """As in Keras. Collective."""
        gradients = list(grads)
        held = [i for i, gradient in enumerate(gradients) if gradient is not None]
        resolved = backends.resolve_step(self._backend, function=_NAME)
        for i, whole in zip(held, resolved.reduced_gradients([gradients[i] for i in held])):
            gradients[i] = whole
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
        """None of its own: scaling is the inner optimiser's. Keras's LossScaleOptimizer sets it to None in what it is
        put around, which is how that is found out (and why it is not None before)."""
        return 1.0

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: Any) -> None:
        if hasattr(self, "inner_optimizer"):
            raise ValueError(
                f"{_NAME}: a LossScaleOptimizer is put around it, expected inside: it would look at this replica's "
                "gradients alone. Write DistributedOptimizer(LossScaleOptimizer(optimizer)) and "
                "compile(auto_scale_loss=False)."
            )

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self) -> dict[str, Any]:
        """As in Keras. A backend that is no string is detected when the loss runs."""
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
        raise TypeError(errors.sentence(_NAME, "optimizer", repr(optimizer), "a Keras optimiser, not distributed yet"))
    base = getattr(optimizer, "inner_optimizer", optimizer)
    steps = getattr(base, "gradient_accumulation_steps", None)
    if steps:
        raise ValueError(
            f"{_NAME}: optimizer has gradient_accumulation_steps={steps}, expected None: it averages the averages of "
            "micro-batches. Use distpad.GradientAccumulator in a loop of your own, or larger batches."
        )
