"""One small all-reduce that carries numbers and complaints, so that all replicas act alike, or raise alike.

Whatever differs between replicas (a length that is too long here, a rank that is different there) travels with the
numbers. No replica raises before the others have seen why: so nobody is left waiting.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends

_TEXT = 1024  # bytes of a complaint that peers are shown


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
      ``[replicas, len(payload)]`` float64, the same on all replicas.

    Raises:
      ValueError: eagerly, on all replicas, when one of them broke a rule or complained.
      tf.errors.InvalidArgumentError: the same inside a ``tf.function``.

    Collective: one all-reduce; one more to show peers a complaint.
    """
    if backend.num_replicas == 1 or _traced_alone(backend):
        # nobody waits for this replica: what is known to be wrong can be raised where it is
        if complaint is not None:
            raise complaint
        enforce(backend, function, [rule for rule in rules if isinstance(rule.ok, bool)])
    good = [True if rule.ok is None else rule.ok for rule in rules]
    evidence = [rule.found if isinstance(rule.found, tuple) else (rule.found,) for rule in rules]
    numbers = [complaint is None, *good, *itertools.chain(*evidence), *payload]
    # Nothing here is differentiated: a gradient through the collective would be one more, on some replicas perhaps.
    packed = tf.stop_gradient(tf.stack([tf.cast(number, tf.float64) for number in numbers]))
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
    if tf.executing_eagerly():
        _raise_complaint(backend, function, table[:, 0], complaint)
    else:
        text = "a replica refused its arguments (0 below)" + (f", here: {complaint}" if complaint else "")
        checks.insert(0, _Check(tf.reduce_all(table[:, 0] > 0), text, table[:, 0]))
    several = f", {backend.replicas_here} a worker" if backend.num_workers > 1 else ""
    _require(function, checks, f"by replica{several}")
    return table[:, ends[-1] :]


@tf.autograph.experimental.do_not_convert
def enforce(backend: backends.Backend, function: str, rules: Sequence[Rule]) -> None:
    """Check rules on this replica alone, where a step has no exchange: it raises, and ends the step of its worker."""
    worker = f", worker {backend.worker_index}" if backend.num_workers > 1 else ""
    replica = backend.replica_index() if backend.in_replica() else None
    checks = [_Check(rule.ok, rule.text, rule.found) for rule in rules if rule.ok is not None]
    _require(function, checks, f"here{worker}" if replica is None else f"on this replica{worker}", replica)


class _Check(NamedTuple):
    """Whether something holds, what, and the evidence of each replica."""

    ok: Any
    text: str
    found: Any


def _agreed(rule: Rule, good: tf.Tensor, found: tf.Tensor) -> _Check:
    """A rule, after all replicas have reported on it."""
    ok = tf.reduce_all(found == found[0]) if rule.ok is None else tf.reduce_all(good > 0)
    return _Check(ok, rule.text, found)


def _require(function: str, checks: Sequence[_Check], by: str, replica: Any = None) -> None:
    """Raise ValueError for the first check that is known to fail, or let the graph fail when it runs. The evidence is
    that of all replicas, or of the one that ``replica`` is the number of."""
    for check in checks:
        known = tf.executing_eagerly() or isinstance(check.ok, bool)
        if known and not bool(check.ok):
            raise ValueError(f"{function}: {check.text}; found {by}: {_listed(check.found, replica)}.")
    if tf.executing_eagerly() or not checks:
        return
    # One assertion for all, since each costs tracing time; what it prints must be constants and numbers.
    printed: list[Any] = [f"{function}: one of these does not hold (0); what was found, {by}, stands behind it"]
    printed += [":"] if replica is None else [", which is number", replica, ":"]
    for check in checks:
        printed += [f"; {check.text}", tf.cast(check.ok, tf.int32), tf.convert_to_tensor(check.found)]
    tf.debugging.Assert(tf.reduce_all([check.ok for check in checks]), printed, summarize=-1)  # of all replicas


def _raise_complaint(backend: backends.Backend, function: str, fine: tf.Tensor, complaint: Exception | None) -> None:
    """Where a replica complained, show all of them what it said, and raise on all."""
    if np.all(fine.numpy() > 0):
        return
    first = int(np.argmin(fine.numpy()))
    said = np.frombuffer(str(complaint or "").encode()[:_TEXT].ljust(_TEXT, b"\0"), np.uint8)
    texts = backend.stack(tf.constant(said, tf.int32)).numpy().astype(np.uint8)
    if complaint is not None:
        raise complaint
    peer = texts[first].tobytes().rstrip(b"\0").decode(errors="replace")
    raise ValueError(f"{function}: replica {first} refused its arguments: {peer}")


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
