"""Checks of Keras's ``fit``: its arguments, workers that leave it together, and ranks of Horovod that train alone."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors, versions
from distpad.backends import detection, finite, keras_fit
from distpad.backends.base import Backend
from distpad.backends.variables import checksums, extremes, tensorflow_variable

_LIMIT_S = 600.0  # to wait for the other workers at the end of an epoch: one of them may save a checkpoint
_REMEDY = (
    "Set model.stop_training in on_epoch_end alone: then all workers stop. A step has the same calls on all workers."
)
_CHANNEL = 1 << 20  # beyond those of datasets
_SAMPLED, _TOLERANCE = 64, 1e-6  # elements of a variable that are compared, and how far they may differ
_HUGE = 1e300
_APART = 1e-3  # as the tolerance after an epoch: operations of a GPU that are not deterministic let copies drift


def enable() -> None:
    """Let ``fit`` check its arguments, and run with several workers in Keras 3 (keras_fit.py). Later calls do nothing.

    The checks concern models with a DistributedLoss and datasets of ``for_keras``. They stand in a wrapper of ``fit``,
    since a program may forget a callback.
    """
    keras_fit.enable()
    owner = next(each for each in tf.keras.Model.__mro__ if "fit" in vars(each))
    if not hasattr(owner.fit, "checks"):
        owner.fit = _checking(owner.fit)


def _checking(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def fit(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        is_fed = _is_of_for_keras(given.get("x"))
        backend = _backend_of(self)
        callbacks = given.get("callbacks") or []
        held = getattr(callbacks, "callbacks", callbacks)
        held = [*held] if isinstance(held, (list, tuple)) else [held]
        if is_fed or backend:
            _check_arguments(self, backend, given.get("class_weight"), held, is_fed)
        kwargs = {name: value for name, value in given.items() if name != "self"}
        if backend is not None and backend.num_replicas > 1:
            if hasattr(callbacks, "callbacks"):  # a CallbackList
                callbacks.append(_Workers(backend))
            else:
                kwargs["callbacks"] = [*held, _Workers(backend)]
        try:
            return original(self, **kwargs)
        except tf.errors.OpError as error:
            cause = _cause_of(error, self.distribute_strategy)
            if cause is None:
                raise
            raise cause from error
        finally:
            finite.clear()

    fit.checks = True  # type: ignore[attr-defined]
    return fit


def _cause_of(error: tf.errors.OpError, strategy: tf.distribute.Strategy) -> Exception | None:
    """What a program did that makes TensorFlow's collectives fail, as an error; None if the error says it itself."""
    text = str(error)
    if "joining a group" in text:
        remedy = "TensorFlow's collectives keep their devices. Use one strategy in a process."
        found, rule = f"on {[*strategy.extended.worker_devices]}", "on the devices of this process's first strategy"
        return ValueError(errors.sentence("fit", "strategy", found, rule, remedy))
    if "Collective instance" in text and "expected type" in text:
        return errors.DistpadError(f"fit: the workers run different collectives, expected the same. {_REMEDY}")
    return None


def _backend_of(model: Any) -> Backend | None:
    """The backend of the DistributedLoss that the model was compiled with; None without one."""
    losses = [loss for loss in tf.nest.flatten(getattr(model, "loss", None)) if hasattr(loss, "global_value")]
    if not losses:
        return None
    strategy = model.distribute_strategy
    with strategy.scope() if strategy.num_replicas_in_sync > 1 else contextlib.nullcontext():
        return detection.resolve_step(losses[0].backend, function="fit")


def _is_of_for_keras(x: Any) -> bool:
    spec = getattr(x, "element_spec", None)
    if isinstance(x, tf.distribute.DistributedDataset):  # class_weight fails with any
        return True
    weights = spec[2] if isinstance(spec, tuple) and len(spec) == 3 else None
    return any(hasattr(leaf, "replicas") for leaf in tf.nest.flatten(weights))


def _check_arguments(model: Any, backend: Backend | None, class_weight: Any, callbacks: list, is_fed: bool) -> None:
    """Raise ValueError for what fails later with an obscure error, on all workers alike."""
    if class_weight is not None and is_fed:
        remedy = "Make class_weights[tags] a feature of each example, and write PaddedBatches(weights=NAME)."
        raise ValueError(
            errors.sentence("fit", "class_weight", errors.shown(class_weight), "None with for_keras", remedy)
        )
    if backend is not None and getattr(model, "jit_compile", None) and not _compiles(backend):
        remedy = "Write compile(jit_compile=False)."
        raise ValueError(errors.sentence("fit", "jit_compile", True, f"False {_where(backend)}", remedy))
    of_horovod = [type(each).__name__ for each in callbacks if type(each).__module__.startswith("horovod.")]
    if of_horovod and versions.KERAS >= 3:
        remedy = (
            "Write distpad.broadcast_variables(model.variables) before fit, and Keras's LearningRateScheduler. The "
            "history of DistributedLoss and of distpad.metrics is global."
        )
        rule = "none of Horovod's, which are for Keras 2"
        raise ValueError(errors.sentence("fit", "callbacks", ", ".join(of_horovod), rule, remedy))
    if is_fed and any(isinstance(each, tf.keras.callbacks.BackupAndRestore) for each in callbacks):
        warnings.warn(
            "fit: BackupAndRestore restores the model and the number of the epoch, not the position in the data: "
            "PaddedBatches begins with epoch 0 again. Save model, optimizer and batches in one tf.train.Checkpoint.",
            stacklevel=3,
        )


def _compiles(backend: Backend) -> bool:
    """Whether XLA compiles the engine's collectives."""
    if backend.num_replicas == 1:
        return True
    if backend.strategy is None:
        return os.environ.get("HOROVOD_ENABLE_XLA_OPS") == "1"
    return "CPU" not in backend.strategy.extended.worker_devices[0]


def _where(backend: Backend) -> str:
    return (
        "under Horovod, whose reductions XLA does not compile" if backend.strategy is None else "on several CPU devices"
    )


class _Workers(tf.keras.callbacks.Callback):
    """Lets all workers leave ``fit`` after the same epoch, and checks that the weights of all replicas are equal.

    The weights are compared after two steps, since callbacks such as Horovod's may broadcast them after the first; and
    after each epoch, by a checksum first, which costs no collective.
    """

    _supports_tf_logs = True  # Keras 2 otherwise waits for the values of each step

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend, self._steps = backend, 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._steps += 1
        if self._steps == 3 and self._backend.strategy is None:  # a strategy keeps them equal
            self._compare()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._steps == 2 and self._backend.strategy is None:
            self._compare()
        backend, trained = self._backend, [tensorflow_variable(v, "fit") for v in self.model.trainable_variables]
        mine = [self.model.stop_training, finite.urgency(backend), *extremes(checksums(trained, backend))]
        try:
            found, _ = backend.host_merge(np.array(mine, np.float64), np.zeros(1), _LIMIT_S, _CHANNEL)
        except TimeoutError as error:
            raise errors.DistpadError(
                f"fit: worker {self._backend.worker_index} ended epoch {epoch} at step {self._steps} of this fit, "
                f"expected all workers to end it there within {_LIMIT_S:g} s. {_REMEDY}"
            ) from error
        self.model.stop_training = bool(found[0])
        if found[1]:
            texts = backend.host_all_gather_bytes((finite.found() or "").encode())
            raise errors.DistpadError(texts[finite.worker_of(found[1], backend)].decode())
        if found[2] != -found[3]:
            self._compare(f"after epoch {epoch}", _APART)

    def _compare(self, when: str = "after two steps", tolerance: float = _TOLERANCE) -> None:
        """Raise ValueError on all workers if a variable differs between replicas."""
        backend, variables = self._backend, self.model.trainable_variables
        samples = [_samples(variable, backend) for variable in variables]
        table = np.concatenate(backend.host_all_gather(np.concatenate(samples, axis=1)))
        table = np.nan_to_num(table, nan=_HUGE, posinf=_HUGE, neginf=-_HUGE)  # else NaN would differ from nothing
        differ = np.abs(table - table[0]).max(axis=0) > tolerance * np.abs(table).max(axis=0)
        if not differ.any():
            return
        at = int(np.argmax(differ))
        ends = np.cumsum([sample.shape[1] for sample in samples])
        name = variables[int(np.searchsorted(ends, at, side="right"))].name
        found = ", ".join(f"{value:.7g} on rank {rank}" for rank, value in enumerate(table[:, at]))
        raise ValueError(
            f"fit: the weights differ between the ranks {when} ({name}: {found}), expected equal ones: each "
            "rank trains alone. Write distpad.broadcast_variables(model.variables) before fit, and "
            "compile(optimizer=distpad.DistributedOptimizer(optimizer)), which also reduces what a train_step gives to "
            "apply_gradients."
        )


def _samples(variable: Any, backend: Backend) -> np.ndarray:
    """At most 2 * _SAMPLED elements from all parts of a variable, ``[replicas here, elements]``."""
    copies = [tf.reshape(copy, [-1]) for copy in backend.local_results(tensorflow_variable(variable, "fit"))]
    return np.stack([tf.cast(flat[:: max(1, len(flat) // _SAMPLED)], tf.float64).numpy() for flat in copies])
