"""States as JSON: of random generators, of arrays, of each worker's variables. Nothing is pickled."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping
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


def to_json(value: Any) -> str:
    return json.dumps(_encoded(value))


def from_json(text: str | bytes) -> Any:
    return json.loads(text, object_hook=_decoded)


def _encoded(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(value)
        if array.dtype.hasobject:
            raise TypeError(f"an array of {array.dtype} has no bytes")
        data = base64.b64encode(array.tobytes()).decode()
        return {"array": [array.dtype.name, [*np.shape(value)], data]}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(each) for each in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_encoded(key), _encoded(each)] for key, each in value.items()]}
    if isinstance(value, list):
        return [_encoded(each) for each in value]
    return value


def _decoded(tagged: dict[str, Any]) -> Any:
    ((tag, content),) = tagged.items()
    if tag == "array":
        dtype, shape, data = content
        return np.frombuffer(base64.b64decode(data), np.dtype(dtype)).reshape(shape).copy()
    return tuple(content) if tag == "tuple" else dict(content)


def checksum(array: Any) -> int:
    """A checksum of the bytes of an array: equal arrays have equal checksums."""
    array = np.ascontiguousarray(array)
    return zlib.crc32(repr(array.tolist()).encode() if array.dtype.hasobject else array.view(np.uint8).data)
