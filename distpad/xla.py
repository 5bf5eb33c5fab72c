"""Whether XLA compiles what is being traced: there strings have no kernel, and assertions are dropped."""

from __future__ import annotations

import tensorflow as tf


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
