"""The GPUs that the launcher expects this worker to see."""

from __future__ import annotations

import os

import tensorflow as tf

from distpad import errors
from distpad.launcher import builds, gpus, topology


def check(*, has_chosen: bool = False) -> None:
    """Check that TensorFlow sees the expected GPUs and has code for them. Without DISTPAD_GPUS, nothing is expected.

    Args:
      has_chosen: whether the program has chosen GPUs of this worker, as Horovod's do: more are an error then.

    Raises:
      DistpadError: there are fewer, or TensorFlow cannot use one. The message has the likely cause and the remedy.
    """
    expected = topology.number(os.environ, "DISTPAD_GPUS")
    if not expected:
        return
    seen = tf.config.list_physical_devices("GPU")
    build, driver = builds.tensorflow(), gpus.driver()
    if len(seen) < expected:
        why, remedy = gpus.why_unseen(expected, build, driver, os.environ.get("CUDA_VISIBLE_DEVICES"), gpus.packages())
        sees = f"distpad: TensorFlow sees {len(seen)} GPU{'s' * (len(seen) != 1)}"
        raise errors.DistpadError(f"{sees}, expected {expected}, set by DISTPAD_GPUS: {why}. {remedy}")
    unfit = gpus.unsupported(build, driver)
    if unfit and unfit[2]:
        raise errors.DistpadError(f"distpad: {unfit[0]}, expected code for this GPU. {unfit[1]}")
    used = len(tf.config.get_visible_devices("GPU"))
    if has_chosen and used > expected:
        remedy = "Call distpad.backends.start('horovod') first, or launch with --gpus-per-worker 1."
        raise errors.DistpadError(
            f"distpad: this rank uses {used} GPUs, expected {expected} by its local rank. {remedy}"
        )
