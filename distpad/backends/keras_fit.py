"""What ``fit`` and ``evaluate`` need: in Keras 3 several workers (keras#20585), in Keras 2 whole sample weights."""

from __future__ import annotations

import functools
import sys
from typing import Any

import tensorflow as tf

from distpad import errors, versions
from distpad.backends import keras_masks

_BUILD, _REDUCE = "_maybe_symbolic_build", "reduce_per_replica"


def enable() -> None:
    """Make ``fit`` and ``evaluate`` of Keras 3 run with several workers. Once is enough; later calls do nothing.

    Two private functions of Keras 3's trainer fail with several workers of a MultiWorkerMirroredStrategy, whatever the
    loss: one averages the workers' first batches, to build the model, and one averages the scalars of a step over an
    axis. Keras has no public hook for either; a ``train_step`` of one's own changes neither Sequential nor loaded
    models. Both are replaced by functions that call Keras's for all other strategies. If Keras has no function of such
    a name, nothing is replaced: tests/replicas/test_keras_multiworker.py notices this, and a Keras that needs no
    replacement. For Keras 2, see ``keras_masks.keep_weights``.
    """
    if versions.KERAS < 3:
        return keras_masks.keep_weights()
    trainer = next((each for each in tf.keras.Model.__mro__ if _BUILD in vars(each)), None)
    module = trainer and sys.modules[trainer.__module__]
    if not hasattr(module, _REDUCE) or hasattr(getattr(trainer, _BUILD), "__wrapped__"):
        return
    setattr(trainer, _BUILD, _building(getattr(trainer, _BUILD)))
    setattr(module, _REDUCE, _reducing(getattr(module, _REDUCE)))


def _building(original: Any) -> Any:
    @functools.wraps(original)
    def build(self: Any, iterator: Any = None, data_batch: Any = None) -> None:
        """Build the model from the dataset's element_spec: no worker reads a batch before the first step."""
        strategy, dataset = self.distribute_strategy, getattr(iterator, "_distributed_dataset", None)
        _check_steps(self, strategy)
        if not _has_several_workers(strategy):
            if self._distribute_strategy is None and isinstance(dataset, tf.distribute.DistributedDataset):
                found = "without a strategy, while the dataset is distributed"
                raise ValueError(errors.sentence("fit", "the model", found, "made inside strategy.scope()"))
            return original(self, iterator=iterator, data_batch=data_batch)
        _check(self, strategy)
        if dataset is None or self._distribute_strategy is None:  # Keras builds the latter in its first step
            return original(self, iterator=iterator, data_batch=data_batch)
        specs = tf.nest.map_structure(_of_one_replica, dataset.element_spec)
        with strategy.scope():
            self._symbolic_build(data_batch=specs)

    return build


def _reducing(original: Any) -> Any:
    @functools.wraps(original)
    def reduce(values: Any, strategy: Any, reduction: str) -> Any:
        """Average the values of a step over all replicas, in one all-reduce."""
        if reduction not in ("auto", "mean") or not _has_several_workers(strategy):
            return original(values, strategy, reduction)

        def mean(values: Any) -> Any:
            doubles = tf.nest.map_structure(lambda value: tf.cast(value, tf.float64), values)  # packed, if of one dtype
            means = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, doubles)
            return tf.nest.map_structure(lambda value, found: tf.cast(found, value.dtype), values, means)

        means = strategy.run(mean, args=(values,))
        return tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0], means)

    return reduce


def _check_steps(model: Any, strategy: tf.distribute.Strategy) -> None:
    """Raise ValueError if a loop over steps, which Keras 3 traces, would hold collectives."""
    found = model.steps_per_execution
    if strategy.num_replicas_in_sync > 1 and found != 1:
        remedy = "TensorFlow runs no collective in Keras's loop over steps. Write compile(steps_per_execution=1)."
        raise ValueError(errors.sentence("fit", "steps_per_execution", found, "1 with several replicas", remedy))


def _check(model: Any, strategy: tf.distribute.Strategy) -> None:
    """Raise ValueError for variables that differ between workers."""
    held = ((variable.path, variable.value) for variable in model.variables)
    is_outside = lambda each: isinstance(each, tf.Variable) and not strategy.extended.variable_created_in_scope(each)
    outside = [path for path, variable in held if is_outside(variable)]
    if outside:
        raise ValueError(
            f"fit: the model has {len(outside)} variables, such as {outside[0]}, made outside the strategy's scope, "
            "expected none: each worker would begin with its own. Make, load and build the model inside `with "
            "strategy.scope():`."
        )


def _has_several_workers(strategy: tf.distribute.Strategy) -> bool:
    several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    return several and strategy.num_replicas_in_sync > len(strategy.extended.worker_devices)


def _of_one_replica(spec: Any) -> Any:
    """The spec of the first replica's part of a PerReplica, a class that TensorFlow does not export."""
    return getattr(spec, "_value_specs", [spec])[0]
