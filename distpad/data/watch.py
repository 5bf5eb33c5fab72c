"""Watch: compares variables between all replicas, by a checksum that travels with the window syncs."""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import backends, errors, versions
from distpad.backends.variables import checksums, extremes, tensorflow_variable

_NAME = "watch"
_SHOWN = 3  # variables that an error names


class Watch:
    """The variables that must be equal on all replicas of all workers, and their checksums."""

    def __init__(self, backend: backends.Backend) -> None:
        self._backend = backend
        self._variables: list[Any] = []
        self._names: list[str] = []

    def set(self, variables: Any) -> None:
        """Watch these variables. Raises: TypeError, ValueError."""
        if not isinstance(variables, (list, tuple)):
            remedy = "Write model.trainable_variables."
            raise TypeError(errors.sentence(_NAME, "variables", type(variables).__name__, "a list", remedy))
        held = [tensorflow_variable(variable, _NAME) for variable in variables]
        own = [each.name for each in held if each.synchronization == tf.VariableSynchronization.ON_READ]
        text = [each.name for each in held if each.dtype == tf.string]
        errors.require(
            _NAME, not text, "variables", f"with {text}, of strings", "variables of numbers", error=TypeError
        )
        rule = "variables that are equal on all replicas"
        errors.require(_NAME, not own, "variables", f"with {own}, of which each replica has its own part", rule)
        self._variables = held
        names = [getattr(variable, "path", variable.name) for variable in variables]
        self._names = [each if names.count(each) == 1 else f"{each} (variable {i})" for i, each in enumerate(names)]

    def __bool__(self) -> bool:
        return bool(self._variables)

    def checksum(self) -> list[float]:
        """The highest checksum of this worker's replicas, and the negative of the lowest: of all variables together."""
        return extremes(checksums(self._variables, self._backend))

    def describe(self) -> str:
        """The checksums of each variable, of each replica, as JSON for ``differences``."""
        rows = checksums(self._variables, self._backend)
        return json.dumps([dict(zip(self._names, map(str, row.tolist()))) for row in rows])


def differences(texts: Sequence[str]) -> str:
    """Name the variables that differ, and the replicas whose value is not the most common one.

    Args:
      texts: of each worker, the result of ``describe``.
    """
    replicas = [(f"worker {worker}", rows) for worker, text in enumerate(texts) for rows in json.loads(text) or [{}]]
    wheres = [f"replica {i} ({worker})" for i, (worker, _) in enumerate(replicas)]
    found = []
    for name in dict.fromkeys(name for _, rows in replicas for name in rows):
        values = [rows.get(name) for _, rows in replicas]
        common = collections.Counter(values).most_common(1)[0][0]
        others = [where for where, value in zip(wheres, values) if value != common]
        if others:
            is_missing = " and not watched" * (None in values)
            found.append(f"{name} on {', '.join(others)}{is_missing}")
    more = f", and {len(found) - _SHOWN} other variables" * (len(found) > _SHOWN)
    return "; ".join(found[:_SHOWN]) + more


@functools.lru_cache(maxsize=1)
def code() -> dict[str, str]:
    """The versions that workers compare, and a hash of distpad's own code."""
    folder, hashed = pathlib.Path(__file__).resolve().parents[1], hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        hashed.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    known = {"python": platform.python_version(), "tensorflow": tf.__version__, "numpy": np.__version__}
    keras = f"{versions.KERAS}.{versions.KERAS_MINOR}"
    return {**known, "keras": keras, "distpad's code": hashed.hexdigest()}
