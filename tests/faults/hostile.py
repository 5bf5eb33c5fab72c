"""One case of one target: what it raised beside the documented errors, and what it cost."""

from __future__ import annotations

import contextlib
import resource
import time
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import hostile_targets as plain
import hostile_tensors as tensors
import tensorflow as tf
import typer
from hostile_values import Choices, Own

import distpad

CORE = {
    "padding": plain.pad,
    "pad_sequences": plain.pad_sequences,
    "unpad": plain.unpad,
    "buckets": plain.buckets,
    "plan": plain.plans,
    "sampler": plain.sampler,
    "schema": plain.schemas,
    "hosts": plain.hosts,
    "TF_CONFIG": plain.tf_config,
    "config file": plain.config_file,
}
OTHERS = {
    "tensors": plain.pad_tensors,
    "loss": tensors.loss,
    "CTC": tensors.ctc,
    "global_value": tensors.counts,
    "metrics": tensors.metric,
    "layers": tensors.layer,
    "pad_to_global_max": tensors.global_max,
    "gather": tensors.gather,
    "gradients": tensors.gradients,
    "batches": tensors.batches,
    "features": tensors.features,
    "certify": tensors.certify,
    "saving": tensors.saving,
    "checks": tensors.checks,
}
TARGETS = {**CORE, **OTHERS}
# Own: of a hostile object itself. InvalidArgumentError, AttributeError: of a loss or function that the user gives.
# RecursionError, MemoryError: of Keras, which reads the arguments of a layer before the layer does. OSError: of folders.
DOCUMENTED = (ValueError, TypeError, distpad.DistpadError, Own, *typer.BadParameter.__mro__[:2])
OF_FUNCTIONS = {
    "loss": (tf.errors.InvalidArgumentError, AttributeError),
    "metrics": (tf.errors.InvalidArgumentError,),
    "layers": (RecursionError, MemoryError),
    "saving": (OSError,),
}
MOST_S = 1.0
MOST_BYTES = 2**33  # that a case may allocate, with the address space that each new thread of TensorFlow reserves


class Case(NamedTuple):
    """What a case raised, None for a result or a documented error, and its CPU seconds in this thread."""

    error: BaseException | None
    seconds: float


def run(target: str, data: bytes) -> Case:
    """Run a case."""
    begin, error = time.thread_time(), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[target](Choices(data))
    except (*DOCUMENTED, *OF_FUNCTIONS.get(target, ())):
        pass
    except BaseException as other:
        if isinstance(other, KeyboardInterrupt):
            raise
        error = other
    return Case(error, time.thread_time() - begin)


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Let allocations fail that need much more address space than the process has now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
