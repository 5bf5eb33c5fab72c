"""States as JSON: of random generators, of arrays, of each worker's variables. Nothing is pickled."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import errors

_METHODS = (("state_dict", "load_state_dict"), ("getstate", "setstate"), ("get_state", "set_state"))


class Text(tf.train.experimental.PythonState):
    """A text in a ``tf.train.Checkpoint``."""

    text = ""

    def serialize(self) -> str:
        return self.text

    def deserialize(self, string_value: Any) -> None:
        self.text = string_value.decode() if isinstance(string_value, bytes) else string_value


def access(function: str, name: str, given: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """The functions that return and set the state of an object in Python: a random generator, or with ``state_dict``.

    Raises: TypeError: an object without these.
    """
    if isinstance(given, np.random.Generator):
        bits = given.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    for get, load in _METHODS:
        if hasattr(given, get) and hasattr(given, load):
            return getattr(given, get), getattr(given, load)
    rule = "an object of TensorFlow or Keras, a random generator, or an object with state_dict and load_state_dict"
    raise TypeError(errors.sentence(function, name, f"a {type(given).__name__}", rule))


def checksum(array: Any) -> int:
    """A checksum of the bytes of an array: equal arrays have equal checksums."""
    array = np.ascontiguousarray(array)
    return zlib.crc32(repr(array.tolist()).encode() if array.dtype.hasobject else array.view(np.uint8).data)
