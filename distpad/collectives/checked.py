"""One small all-reduce that carries numbers and errors, so that all replicas act alike, or raise alike.

Whatever differs between replicas (a length that is too long here, a rank that is different there) travels with the
numbers. No replica raises before the others have seen why: so nobody is left waiting. XLA drops assertions: where a
check fails, the numbers are NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends

_WORD, _WORDS = 6, 32  # of an error's text, peers are shown so many words of so many bytes: a float64 holds six exactly


class Check(NamedTuple):
    """One thing that must hold on all replicas. All replicas give the same checks in the same order.

    Attributes:
      text: the argument and what is expected of it, as in "lengths hold a value that is expected to be at least 0".
      found: the evidence on this replica, a number or a tuple of them.
      ok: whether it holds here, a bool; None: ``found`` must be the same on all replicas.
    """

    text: str
    found: Any
    ok: Any = None


@tf.autograph.experimental.do_not_convert  # tracing is faster, and errors show this code, not a copy of it
def all_gather(
    backend: backends.Backend,
    function: str,
    payload: Sequence[Any],
    checks: Sequence[Check] = (),
    argument_error: Exception | None = None,
) -> tf.Tensor:
    """Give every replica's payload to every replica, after all have agreed that the checks hold everywhere.

    Args:
      backend: the engine.
      function: the public function, for messages.
      payload: numbers (scalars or tensors); they travel as float64, exact for integers to 2**53.
      checks: what must hold.
      argument_error: an error that this replica caught before the exchange; its payload is then without meaning.

    Returns:
      ``[replicas, len(payload)]`` float64, the same on all replicas; NaN where XLA dropped an assertion that fails.

    Raises:
      ValueError: eagerly, on all replicas, when one of them broke a check or complained.
      tf.errors.InvalidArgumentError: the same inside a ``tf.function``.

    Collective: one all-reduce.
    """
    if backend.num_replicas == 1 or _traced_alone(backend):
        # nobody waits for this replica: what is known to be wrong can be raised where it is
        if argument_error is not None:
            raise argument_error
        check_locally(backend, function, [check for check in checks if isinstance(check.ok, bool)])
    good = [True if check.ok is None else check.ok for check in checks]
    evidence = [check.found if isinstance(check.found, tuple) else (check.found,) for check in checks]
    words = [] if backend.num_replicas == 1 or is_compiling() else _as_words(argument_error)
    numbers = [argument_error is None, *good, *itertools.chain(*evidence), *payload]
    # Nothing here is differentiated: a gradient through the collective would be one more, on some replicas perhaps.
    packed = tf.stop_gradient(
        tf.concat([tf.stack([tf.cast(number, tf.float64) for number in numbers]), tf.constant(words, tf.float64)], 0)
    )
    try:
        table = backend.all_gather(packed)
    except Exception as error:
        if argument_error is not None:
            raise argument_error from error
        if "ismatched" in str(error):  # Horovod's word; the sizes follow from the arguments' structure
            raise ValueError(
                f"{function}: replicas gave arguments of different structure, expected nests of as many tensors on all "
                f"({len(payload)} here)."
            ) from error
        raise
    ends = list(itertools.accumulate(map(len, evidence), initial=1 + len(checks)))
    verdicts = [
        _agreed(check, table[:, 1 + i], table[:, start:end] if end - start > 1 else table[:, start])
        for i, (check, start, end) in enumerate(zip(checks, ends, ends[1:]))
    ]
    fine, payloads = table[:, 0] > 0, table[:, ends[-1] : ends[-1] + len(payload)]
    if words:
        first = tf.argmin(tf.cast(fine, tf.int32))
        said = table[first, ends[-1] + len(payload) :]
        if not tf.executing_eagerly():
            verdicts.insert(
                0, _Verdict(tf.reduce_all(fine), "a replica refused its arguments; it said", _text_of(said))
            )
        elif not np.all(fine):
            if argument_error is not None:
                raise argument_error
            raise ValueError(
                f"{function}: replica {int(first)} refused its arguments: {_text_of(said).numpy().decode()}"
            )
    else:
        verdicts.insert(0, _Verdict(tf.reduce_all(fine), "a replica refused its arguments (0)", table[:, 0]))
    several = f", {backend.replicas_here} a worker" if backend.num_workers > 1 else ""
    ok = _require(function, verdicts, f"by replica{several}")
    return payloads if ok is True else tf.where(ok, payloads, tf.constant(np.nan, tf.float64))


@tf.autograph.experimental.do_not_convert
def check_locally(backend: backends.Backend, function: str, checks: Sequence[Check]) -> Any:
    """Check checks on this replica alone, where a step has no exchange: it raises, and ends the step of its worker.

    Returns whether all hold: True where that is known, else a bool scalar, for graphs whose assertions XLA drops.
    """
    worker = f", worker {backend.worker_index}" if backend.num_workers > 1 else ""
    replica = backend.replica_index() if backend.in_replica() else None
    verdicts = [_Verdict(check.ok, check.text, check.found) for check in checks if check.ok is not None]
    return _require(function, verdicts, f"here{worker}" if replica is None else f"on this replica{worker}", replica)


class _Verdict(NamedTuple):
    """Whether something holds, what, and the evidence of each replica."""

    ok: Any
    text: str
    found: Any


def _agreed(check: Check, good: tf.Tensor, found: tf.Tensor) -> _Verdict:
    """A check, after all replicas have reported on it."""
    ok = tf.reduce_all(found == found[0]) if check.ok is None else tf.reduce_all(good > 0)
    return _Verdict(ok, check.text, found)


def _require(function: str, verdicts: Sequence[_Verdict], by: str, replica: Any = None) -> Any:
    """Raise ValueError for the first verdict that is known to fail, or let the graph fail when it runs. The evidence is
    that of all replicas, or of the replica of number ``replica``. Returns whether all hold, as ``check_locally``."""
    for verdict in verdicts:
        known = tf.executing_eagerly() or isinstance(verdict.ok, bool)
        if known and not bool(verdict.ok):
            raise ValueError(f"{function}: {verdict.text}; found {by}: {_listed(verdict.found, replica)}.")
    verdicts = [verdict for verdict in verdicts if not isinstance(verdict.ok, bool)]
    if tf.executing_eagerly() or not verdicts:
        return True
    # One assertion for all, since each costs tracing time; what it prints must be constants and numbers.
    printed: list[Any] = [f"{function}: one of these does not hold (0); what was found, {by}, stands behind it"]
    printed += [":"] if replica is None else [", which is number", replica, ":"]
    for verdict in verdicts:
        printed += [f"; {verdict.text}", tf.cast(verdict.ok, tf.int32), tf.convert_to_tensor(verdict.found)]
    ok = tf.reduce_all(tf.stack([verdict.ok for verdict in verdicts]))
    asserted = tf.debugging.Assert(ok, printed, summarize=-1)  # of all replicas
    with tf.control_dependencies([asserted]):  # no collective behind it begins on a replica that fails here
        return tf.identity(ok)


def _as_words(error: Exception | None) -> list[float]:
    """The beginning of an error's text as numbers."""
    text = str(error or "").encode("ascii", "replace")[: _WORD * _WORDS].ljust(_WORD * _WORDS, b"\0")
    return [float(int.from_bytes(text[i : i + _WORD], "little")) for i in range(0, len(text), _WORD)]


def _text_of(words: tf.Tensor) -> tf.Tensor:
    """The text that ``_as_words`` made numbers of, a string scalar."""
    places = tf.constant([256**i for i in range(_WORD)], tf.int64)
    codes = tf.reshape(tf.cast(words, tf.int64)[:, tf.newaxis] // places % 256, [-1])
    return tf.strings.unicode_encode(tf.cast(tf.boolean_mask(codes, codes > 0), tf.int32), "UTF-8")


def _traced_alone(backend: backends.Backend) -> bool:
    """Inside a tf.function of a single process an error while tracing ends the whole step, on all its replicas."""
    return backend.num_workers == 1 and not tf.executing_eagerly()


def _listed(found: Any, replica: Any) -> str:
    def shown(value: np.ndarray) -> str:
        return f"({', '.join(f'{part:g}' for part in value)})" if value.ndim else f"{value:g}"

    if replica is None:
        return ", ".join(f"{number}→{shown(value)}" for number, value in enumerate(np.atleast_1d(np.asarray(found))))
    number = tf.get_static_value(replica)  # unknown only while a step is traced
    return f"{'' if number is None else f'{int(number)}→'}{shown(np.asarray(found))}"


def is_compiling() -> bool:
    """Whether the graph that is being traced is one of ``tf.function(jit_compile=True)``, or is called by one.

    TensorFlow has no public function that tells. It marks each conditional to be lowered for its own executor, except
    in graphs that XLA compiles: a conditional of constants shows it. tests/single/test_xla.py notices a change.

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
