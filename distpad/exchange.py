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

from distpad import backends, xla

_WORD, _WORDS = 6, 32  # of an error's text, peers are shown so many words of so many bytes: a float64 holds six exactly


class Rule(NamedTuple):
    """One thing that must hold on all replicas. All replicas give the same rules in the same order.

    Attributes:
      text: the argument and what is expected of it, as in "lengths hold a value that is expected to be at least 0".
      found: the evidence on this replica, a number or a tuple of them.
      ok: whether it holds here, a bool; None: ``found`` must be the same on all replicas.
    """

    text: str
    found: Any
    ok: Any = None


@tf.autograph.experimental.do_not_convert  # tracing is faster, and errors show this code, not a copy of it
def exchange(
    backend: backends.Backend,
    function: str,
    payload: Sequence[Any],
    rules: Sequence[Rule] = (),
    complaint: Exception | None = None,
) -> tf.Tensor:
    """Give every replica's payload to every replica, after all have agreed that the rules hold everywhere.

    Args:
      backend: the engine.
      function: the public function, for messages.
      payload: numbers (scalars or tensors); they travel as float64, exact for whole numbers to 2**53.
      rules: what must hold.
      complaint: an error that this replica caught before the exchange; its payload is then without meaning.

    Returns:
      ``[replicas, len(payload)]`` float64, the same on all replicas; NaN where XLA dropped an assertion that fails.

    Raises:
      ValueError: eagerly, on all replicas, when one of them broke a rule or complained.
      tf.errors.InvalidArgumentError: the same inside a ``tf.function``.

    Collective: one all-reduce.
    """
    if backend.num_replicas == 1 or _traced_alone(backend):
        # nobody waits for this replica: what is known to be wrong can be raised where it is
        if complaint is not None:
            raise complaint
        enforce(backend, function, [rule for rule in rules if isinstance(rule.ok, bool)])
    good = [True if rule.ok is None else rule.ok for rule in rules]
    evidence = [rule.found if isinstance(rule.found, tuple) else (rule.found,) for rule in rules]
    words = [] if backend.num_replicas == 1 or xla.is_compiling() else _as_words(complaint)
    numbers = [complaint is None, *good, *itertools.chain(*evidence), *payload]
    # Nothing here is differentiated: a gradient through the collective would be one more, on some replicas perhaps.
    packed = tf.stop_gradient(
        tf.concat([tf.stack([tf.cast(number, tf.float64) for number in numbers]), tf.constant(words, tf.float64)], 0)
    )
    try:
        table = backend.stack(packed)
    except Exception as error:
        if complaint is not None:
            raise complaint from error
        if "ismatched" in str(error):  # Horovod's word; the sizes follow from the arguments' structure
            raise ValueError(
                f"{function}: replicas gave arguments of different structure, expected nests of as many tensors on all "
                f"({len(payload)} here)."
            ) from error
        raise
    ends = list(itertools.accumulate(map(len, evidence), initial=1 + len(rules)))
    checks = [
        _agreed(rule, table[:, 1 + i], table[:, start:end] if end - start > 1 else table[:, start])
        for i, (rule, start, end) in enumerate(zip(rules, ends, ends[1:]))
    ]
    fine, payloads = table[:, 0] > 0, table[:, ends[-1] : ends[-1] + len(payload)]
    if words:
        first = tf.argmin(tf.cast(fine, tf.int32))
        said = table[first, ends[-1] + len(payload) :]
        if not tf.executing_eagerly():
            checks.insert(0, _Check(tf.reduce_all(fine), "a replica refused its arguments; it said", _text_of(said)))
        elif not np.all(fine):
            if complaint is not None:
                raise complaint
            raise ValueError(
                f"{function}: replica {int(first)} refused its arguments: {_text_of(said).numpy().decode()}"
            )
    else:
        checks.insert(0, _Check(tf.reduce_all(fine), "a replica refused its arguments (0)", table[:, 0]))
    several = f", {backend.replicas_here} a worker" if backend.num_workers > 1 else ""
    ok = _require(function, checks, f"by replica{several}")
    return payloads if ok is True else tf.where(ok, payloads, tf.constant(np.nan, tf.float64))


@tf.autograph.experimental.do_not_convert
def enforce(backend: backends.Backend, function: str, rules: Sequence[Rule]) -> Any:
    """Check rules on this replica alone, where a step has no exchange: it raises, and ends the step of its worker.

    Returns whether all hold: True where that is known, else a bool scalar, for graphs whose assertions XLA drops.
    """
    worker = f", worker {backend.worker_index}" if backend.num_workers > 1 else ""
    replica = backend.replica_index() if backend.in_replica() else None
    checks = [_Check(rule.ok, rule.text, rule.found) for rule in rules if rule.ok is not None]
    return _require(function, checks, f"here{worker}" if replica is None else f"on this replica{worker}", replica)


class _Check(NamedTuple):
    """Whether something holds, what, and the evidence of each replica."""

    ok: Any
    text: str
    found: Any


def _agreed(rule: Rule, good: tf.Tensor, found: tf.Tensor) -> _Check:
    """A rule, after all replicas have reported on it."""
    ok = tf.reduce_all(found == found[0]) if rule.ok is None else tf.reduce_all(good > 0)
    return _Check(ok, rule.text, found)


def _require(function: str, checks: Sequence[_Check], by: str, replica: Any = None) -> Any:
    """Raise ValueError for the first check that is known to fail, or let the graph fail when it runs. The evidence is
    that of all replicas, or of the one that ``replica`` is the number of. Returns whether all hold, as ``enforce``."""
    for check in checks:
        known = tf.executing_eagerly() or isinstance(check.ok, bool)
        if known and not bool(check.ok):
            raise ValueError(f"{function}: {check.text}; found {by}: {_listed(check.found, replica)}.")
    checks = [check for check in checks if not isinstance(check.ok, bool)]
    if tf.executing_eagerly() or not checks:
        return True
    # One assertion for all, since each costs tracing time; what it prints must be constants and numbers.
    printed: list[Any] = [f"{function}: one of these does not hold (0); what was found, {by}, stands behind it"]
    printed += [":"] if replica is None else [", which is number", replica, ":"]
    for check in checks:
        printed += [f"; {check.text}", tf.cast(check.ok, tf.int32), tf.convert_to_tensor(check.found)]
    ok = tf.reduce_all(tf.stack([check.ok for check in checks]))
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
