"""One small all-reduce that carries numbers and complaints, so that all replicas act alike, or raise alike.

Whatever differs between replicas (a length that is too long here, a rank that is different there) travels with the
numbers. No replica raises before the others have seen why: so nobody is left waiting.
"""

from __future__ import annotations

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
      found: the evidence on this replica, a number.
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
        enforce(function, [rule for rule in rules if isinstance(rule.ok, bool)])
    good = [True if rule.ok is None else rule.ok for rule in rules]
    flags = [complaint is None, *good]
    numbers = [*flags, *(rule.found for rule in rules), *payload]
    table = backend.stack(tf.stack([tf.cast(number, tf.float64) for number in numbers]))
    _raise_complaint(backend, function, table[:, 0], complaint)
    split = 1 + len(rules)
    _raise_broken(function, rules, table[:, 1:split], table[:, split : split + len(rules)])
    return table[:, split + len(rules) :]


@tf.autograph.experimental.do_not_convert
def enforce(function: str, rules: Sequence[Rule]) -> None:
    """Check rules on this replica alone, where a step has no exchange."""
    for rule in rules:
        if rule.ok is not None:
            _fail_unless(rule.ok, f"{function}: {rule.text}; found:", rule.found)


def _traced_alone(backend: backends.Backend) -> bool:
    """Inside a tf.function of a single process an error while tracing ends the whole step, on all its replicas."""
    return backend.num_workers == 1 and not tf.executing_eagerly()


def _raise_broken(function: str, rules: Sequence[Rule], good: tf.Tensor, found: tf.Tensor) -> None:
    for i, rule in enumerate(rules):
        column = found[:, i]
        if rule.ok is None:
            _fail_unless(tf.reduce_all(column == column[0]), f"{function}: {rule.text}; by replica:", column)
        else:
            _fail_unless(tf.reduce_all(good[:, i] > 0), f"{function}: {rule.text}; by replica:", column)


def _raise_complaint(backend: backends.Backend, function: str, fine: tf.Tensor, complaint: Exception | None) -> None:
    if not tf.executing_eagerly():
        text = f"{function}: a replica refused its arguments (0 below)"
        text += f"; here: {complaint}" if complaint else ", see its own message"
        _fail_unless(tf.reduce_all(fine > 0), text + "; by replica:", fine)
        return
    if np.all(fine.numpy() > 0):
        return
    first = int(np.argmin(fine.numpy()))
    said = np.frombuffer(str(complaint or "").encode()[:_TEXT].ljust(_TEXT, b"\0"), np.uint8)
    texts = backend.stack(tf.constant(said, tf.int32)).numpy().astype(np.uint8)
    if complaint is not None:
        raise complaint
    peer = texts[first].tobytes().rstrip(b"\0").decode(errors="replace")
    raise ValueError(f"{function}: replica {first} refused its arguments: {peer}")


def _fail_unless(ok: Any, text: str, found: Any) -> None:
    """Raise ValueError eagerly, or fail the running graph, with the numbers that were found."""
    if tf.executing_eagerly() or isinstance(ok, bool):
        if not bool(ok):
            raise ValueError(f"{text} {_listed(np.atleast_1d(np.asarray(found)))}.")
    else:
        # what is said inside a graph must be constant; the numbers are printed behind it
        tf.debugging.Assert(ok, [text, tf.convert_to_tensor(found)], summarize=64)


def _listed(found: np.ndarray) -> str:
    if found.size == 1:
        return f"{found[0]:g}"
    return ", ".join(f"{replica}→{value:g}" for replica, value in enumerate(found))
