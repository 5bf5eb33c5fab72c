"""The checked all-gather: one small all-reduce of numbers and errors, so that all replicas go on or all raise.

Each replica sends its payload and one status: its first check that fails, with the text and the numbers that show it.
No replica raises before it has the status of every replica, so no replica waits for one that has left. The checks may
differ between replicas. XLA drops assertions: where a check fails there, the payloads become NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends

_WORD, _WORDS = 6, 48  # a text travels as 48 float64, each of which holds 6 bytes exactly
_NUMBERS = 4  # the most numbers that a check shows as evidence


class Check(NamedTuple):
    """A condition that must hold on this replica.

    Attributes:
      text: the error, as in "lengths hold a value below 0, expected at least 0".
      found: the evidence, a number or a tuple of at most four.
      ok: whether it holds, a bool or a bool scalar.
    """

    text: str
    found: Any
    ok: Any


@tf.autograph.experimental.do_not_convert  # tracing is faster, and errors show this source
def all_gather(
    backend: backends.Backend,
    function: str,
    payload: Sequence[Any] | tf.Tensor,
    checks: Sequence[Check] = (),
    argument_error: Exception | None = None,
) -> tf.Tensor:
    """Gather the payloads of all replicas, if the checks of all replicas hold.

    Args:
      backend: the engine.
      function: the name of the public function, for messages.
      payload: scalars, or a vector, as many on all replicas. They travel as float64, exact for integers up to 2**53.
      checks: the conditions that must hold on this replica.
      argument_error: an error that this replica caught before the all-gather. The values of its payload do not matter.

    Returns:
      ``[replicas, len(payload)]`` float64, equal on all replicas; NaN if a check fails inside XLA.

    Raises:
      ValueError: on all replicas, if a check fails or an argument error exists on any of them.
      tf.errors.InvalidArgumentError: the same inside a ``tf.function``.

    Collective: all replicas call this the same number of times; one all-reduce.
    """
    if backend.num_replicas == 1 or (backend.num_workers == 1 and not tf.executing_eagerly()):
        # No other process waits for this one: an error during tracing ends the step on all replicas.
        if argument_error is not None:
            raise argument_error
        check_locally(backend, function, [check for check in checks if isinstance(check.ok, bool)])
    report = _report(checks, argument_error, texts=not is_compiling())
    # A gradient through the collective would be a second collective, which only some replicas might run.
    numbers = payload if isinstance(payload, tf.Tensor) else tf.stack([tf.cast(n, tf.float64) for n in payload])
    packed = tf.stop_gradient(tf.concat([numbers, report], 0))
    try:
        table = backend.all_gather(packed)
    except Exception as error:
        if argument_error is not None:
            raise argument_error from error
        if "ismatched" in str(error):  # Horovod's message for different sizes, which the structure determines
            raise ValueError(
                f"{function}: replicas gave arguments of different structure, expected nests of as many tensors on all "
                f"({numbers.shape[0]} here)."
            ) from error
        raise
    payloads, reports = tf.split(table, [numbers.shape[0], report.shape[0]], axis=1)
    ok = tf.reduce_all(reports[:, 0] == 0)
    if tf.executing_eagerly():
        if not ok:
            raise argument_error or ValueError(_message(function, reports.numpy()))
        return payloads
    ok = _assert(ok, lambda: _described(function, reports))
    return tf.where(ok, payloads, tf.constant(np.nan, tf.float64))


@tf.autograph.experimental.do_not_convert
def check_locally(backend: backends.Backend, function: str, checks: Sequence[Check]) -> Any:
    """Check this replica alone, in a step without an all-gather. A check that fails ends the step of this worker.

    Returns: whether all checks hold: True if this is known, else a bool scalar, for XLA, which drops assertions.

    Raises: ValueError, or inside a ``tf.function`` tf.errors.InvalidArgumentError, for the first check that fails.
    """
    worker = f", worker {backend.worker_index}" if backend.num_workers > 1 else ""
    replica = backend.replica_index() if backend.in_replica() else None
    origin = f"; found here{worker}: " if replica is None else f"; found on this replica{worker}: "
    open_checks = []
    for check in checks:
        if not (tf.executing_eagerly() or isinstance(check.ok, bool)):
            open_checks.append(check)
        elif not check.ok:
            number = None if replica is None else tf.get_static_value(replica)  # unknown while a step is traced
            shown = _shown([float(n) for n in _numbers_of(check)])
            raise ValueError(f"{function}: {check.text}{origin}{'' if number is None else f'{int(number)}→'}{shown}.")
    if not open_checks:
        return True
    oks = tf.stack([check.ok for check in open_checks])

    def evidence() -> list[Any]:
        first = tf.argmin(tf.cast(oks, tf.int32))
        text = tf.gather(tf.constant([check.text for check in open_checks]), first)
        who = [] if replica is None else [replica, "→"]
        return [f"{function}: ", text, origin, *who, tf.gather(_evidence(open_checks), first)]

    return _assert(tf.reduce_all(oks), evidence)


@tf.autograph.experimental.do_not_convert
def check_gathered(function: str, checks: Sequence[Check]) -> Any:
    """Check gathered numbers: ``found`` is ``[replicas, numbers]``, equal on all replicas, so that all raise.

    Returns: whether all checks hold, as ``check_locally``.

    Raises: as ``all_gather``, for the first check that fails.
    """
    if tf.executing_eagerly():
        for check in checks:
            if not check.ok:
                rows = enumerate(np.asarray(check.found))
                listed = ", ".join(f"{replica}→{_shown(row)}" for replica, row in rows)
                raise ValueError(f"{function}: {check.text}; found by replica: {listed}.")
        return True
    oks = tf.stack([check.ok for check in checks])

    def evidence() -> list[Any]:
        first, widest = tf.argmin(tf.cast(oks, tf.int32)), max(check.found.shape[1] for check in checks)
        text = tf.gather(tf.constant([check.text for check in checks]), first)
        wide = [tf.pad(check.found, [[0, 0], [0, widest - check.found.shape[1]]]) for check in checks]
        return [f"{function}: ", text, "; found by replica: ", tf.gather(tf.stack(wide), first)]

    return _assert(tf.reduce_all(oks), evidence)


def equal_check(text: str, found: tf.Tensor) -> Check:
    """Return the check that all replicas have the same numbers."""
    return Check(text, found, tf.reduce_all(found == found[:1]))


def is_compiling() -> bool:
    """Return whether XLA compiles the graph that is being traced, for a ``tf.function(jit_compile=True)``.

    XLA has no kernel for strings and drops assertions. TensorFlow has no public function for this question. But it
    marks each conditional to be lowered for its own executor, except in graphs that XLA compiles. So this function
    reads the mark of a conditional of constants. tests/single/collectives/test_xla.py notices a change.

    >>> is_compiling()
    False
    """
    if tf.executing_eagerly():
        return False
    with tf.name_scope("distpad_is_compiling"):
        chosen = tf.cond(tf.compat.v1.placeholder_with_default(True, []), lambda: 1, lambda: 0)
    operation = chosen.op if chosen.op.type != "Identity" else chosen.op.inputs[0].op
    try:
        return not operation.get_attr("_lower_using_switch_merge")
    except ValueError:
        return True


# -- reports: [status, numbers, text], of equal size on all replicas --------------------------------------------------


def _report(checks: Sequence[Check], argument_error: Exception | None, texts: bool) -> Any:
    """Return this replica's report: status 1 and the evidence if a check fails, else zeros."""
    width = _WORDS if texts else 0
    if argument_error is not None:
        return tf.constant([1.0, *[np.nan] * _NUMBERS, *_as_words(str(argument_error))[:width]], tf.float64)
    if tf.executing_eagerly():
        failed = next((check for check in checks if not check.ok), None)
        checks = [] if failed is None else [failed]
    checks = [check for check in checks if check.ok is not True]
    if not checks:
        return tf.zeros([1 + _NUMBERS + width], tf.float64)
    oks = tf.stack([check.ok for check in checks])
    first = tf.argmin(tf.cast(oks, tf.int32))
    report = [[tf.ones([], tf.float64)], tf.gather(_evidence(checks), first)]
    if texts:
        report.append(tf.gather(tf.constant([_as_words(check.text) for check in checks], tf.float64), first))
    return tf.where(tf.reduce_all(oks), tf.zeros([], tf.float64), tf.concat(report, 0))


def _numbers_of(check: Check) -> tuple[Any, ...]:
    return check.found if isinstance(check.found, tuple) else (check.found,)


def _evidence(checks: Sequence[Check]) -> tf.Tensor:
    """Return the numbers of each check, ``[checks, 4]`` float64, with NaN for missing numbers."""
    rows = [[*_numbers_of(check), *[np.nan] * _NUMBERS][:_NUMBERS] for check in checks]
    return tf.stack([[tf.cast(number, tf.float64) for number in row] for row in rows])


def _message(function: str, reports: np.ndarray) -> str:
    """Return the message of the first replica with an error, with the numbers of all replicas with that message."""
    failed = np.flatnonzero(reports[:, 0])
    words = reports[:, 1 + _NUMBERS :]
    text = _text_of(tf.constant(words[failed[0]])).numpy().decode()
    same = [replica for replica in failed if np.array_equal(words[replica], words[failed[0]])]
    numbers = reports[:, 1 : 1 + _NUMBERS]
    shown = [(replica, _shown(numbers[replica, ~np.isnan(numbers[replica])])) for replica in same]
    if not any(each for _, each in shown):  # the text of an argument error, which names the function
        return f"{function}: replica {failed[0]} refused its arguments: {text}"
    return f"{function}: {text}; found by replica: {', '.join(f'{replica}→{each}' for replica, each in shown)}."


def _described(function: str, reports: tf.Tensor) -> list[Any]:
    """Return the message as the data of an assertion in a graph."""
    failed = tf.where(reports[:, 0] > 0)[:, 0]
    text = _text_of(reports[failed[0], 1 + _NUMBERS :])
    found = tf.gather(reports, failed)[:, 1 : 1 + _NUMBERS]
    return [f"{function}: ", text, "; found by replicas ", failed, " (nan: nothing): ", found]


def _assert(ok: tf.Tensor, evidence: Callable[[], list[Any]]) -> tf.Tensor:
    """Return ``ok`` after an assertion in the graph that prints the evidence if it is False; without one in XLA."""
    if is_compiling():
        return ok

    def fail() -> tf.Tensor:
        with tf.control_dependencies([tf.debugging.Assert(False, evidence(), summarize=-1)]):
            return tf.constant(False)

    # A conditional, so that a step without errors computes no text. A replica that fails here begins no collective
    # that follows.
    return tf.cond(ok, lambda: tf.constant(True), fail)


@functools.lru_cache(maxsize=256)
def _as_words(text: str) -> tuple[float, ...]:
    """Encode the beginning of a text as numbers."""
    code = text.encode("ascii", "replace")[: _WORD * _WORDS].ljust(_WORD * _WORDS, b"\0")
    return tuple(float(int.from_bytes(code[i : i + _WORD], "little")) for i in range(0, len(code), _WORD))


def _text_of(words: tf.Tensor) -> tf.Tensor:
    """Decode the numbers of ``_as_words`` to a string scalar."""
    powers = tf.constant([256**i for i in range(_WORD)], tf.int64)
    codes = tf.reshape(tf.cast(words, tf.int64)[:, tf.newaxis] // powers % 256, [-1])
    return tf.strings.unicode_encode(tf.cast(tf.boolean_mask(codes, codes > 0), tf.int32), "UTF-8")


def _shown(numbers: Sequence[float]) -> str:
    """Format one number, or several numbers in brackets."""
    listed = ", ".join(f"{number:g}" for number in numbers)
    return f"({listed})" if len(numbers) > 1 else listed
