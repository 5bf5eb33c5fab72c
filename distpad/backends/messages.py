"""Messages between workers, and states in checkpoints: JSON with arrays. They are data, never code: no pickle."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from distpad import errors


@contextlib.contextmanager
def checked(what: str) -> Iterator[None]:
    """Raise PeerError if a message of another worker is not one of this version."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, EOFError) as error:
        raise errors.PeerError(
            f"distpad: {what} of another worker is malformed ({type(error).__name__}: {error}), expected a message of "
            "this version. Install the same distpad everywhere, and let no other program use the job's network."
        ) from error


def pack(value: Any, what: str) -> bytes:
    """Encode numbers, strings, None, NumPy arrays, and lists, tuples and mappings of them. TypeError for others."""

    def plain(item: Any) -> Any:
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        if isinstance(item, (np.generic, np.ndarray)) and _is_plain(item.dtype):
            native = np.asarray(item).astype(item.dtype.newbyteorder("="))
            return {"array": [native.dtype.name, native.shape, base64.b64encode(native.tobytes()).decode()]}
        if isinstance(item, (list, tuple)):
            items = [*map(plain, item)]
            return items if isinstance(item, list) else {"tuple": items}
        if isinstance(item, Mapping):
            return {"dict": [[plain(key), plain(each)] for key, each in item.items()]}
        rule = "numbers, strings, None, NumPy arrays of numbers, or lists, tuples and dicts of them"
        raise TypeError(errors.sentence(what, "objects", f"with a {type(item).__name__}", rule))

    return json.dumps(plain(value)).encode()


def unpack(data: bytes, what: str) -> Any:
    """Decode the bytes of ``pack`` that another worker sent. Raises: PeerError: other bytes."""
    with checked(what):
        return decode(data)


def decode(data: str | bytes) -> Any:
    """Decode the bytes of ``pack``."""

    def value(item: Any) -> Any:
        if isinstance(item, list):
            return [*map(value, item)]
        if not isinstance(item, dict):
            return item
        ((kind, content),) = item.items()
        if kind == "array":
            dtype = np.dtype(content[0])
            if not _is_plain(dtype):
                raise ValueError(f"an array of {dtype}")
            array = np.frombuffer(base64.b64decode(content[2], validate=True), dtype).reshape(content[1]).copy()
            return array if content[1] else array[()]
        if kind == "tuple":
            return tuple(map(value, content))
        return {value(key): value(each) for key, each in {"dict": content}[kind]}

    return value(json.loads(data))


def _is_plain(dtype: np.dtype) -> bool:
    """Whether an array is of numbers, those of ml_dtypes such as bfloat16 among them."""
    return dtype.kind in "biufc" or (dtype.kind == "V" and dtype.names is None and dtype.type is not np.void)
