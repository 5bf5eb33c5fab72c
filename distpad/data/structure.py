"""The structure of examples: nested mappings and tuples of features, as JSON, with the features' names as leaves."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, Union

from distpad import errors

_NAME = "PaddedBatches"

Name = Union[str, int]  # a key of a dict, an index of a tuple, or "0/image" for a nested feature


class TupleIndex(int):
    """An index of a tuple as a key that sorts before strings, since TensorFlow sorts the keys of a mapping.

    >>> sorted(["1/x", TupleIndex(0)])[0] == 0
    True
    """

    def __lt__(self, other: Any) -> bool:
        return True if isinstance(other, str) else int(self) < other

    def __gt__(self, other: Any) -> bool:
        return False if isinstance(other, str) else int(self) > other


def as_key(name: Name) -> Name:
    """A feature's name as a key of a mapping of tensors."""
    return TupleIndex(name) if isinstance(name, int) else name


_NAMED_TUPLES: dict[str, type] = {}  # classes of examples, by module and name


def skeleton_of(example: Any, path: tuple[Name, ...] = ()) -> Any:
    """The structure of an example as JSON, with names as leaves. A list, as of labels, is a leaf."""
    if not path and errors.is_deep(example):
        raise ValueError(errors.sentence(_NAME, "an example", "nested more than 32 times", "arrays, or short nests"))
    if isinstance(example, Mapping):
        are_names = any(all(isinstance(key, kind) for key in example) for kind in (str, int))
        found = f"a mapping with keys {[*example]}"
        errors.require(_NAME, are_names, "an example", found, "strings, or integers", error=TypeError)
        kind, items = "dict", {key: example[key] for key in sorted(example)}
    elif isinstance(example, tuple) and hasattr(example, "_fields"):
        kind, items = f"{type(example).__module__}:{type(example).__qualname__}", dict(zip(example._fields, example))
        _NAMED_TUPLES[kind] = type(example)
    elif isinstance(example, tuple):
        kind, items = "tuple", dict(enumerate(example))
    else:
        return (path[0] if path else 0) if len(path) < 2 else "/".join(map(str, path))
    return {"kind": kind, "parts": [[key, skeleton_of(item, (*path, key))] for key, item in items.items()]}


def names_of(skeleton: Any) -> list[Name]:
    if not isinstance(skeleton, dict):
        return [skeleton]
    return [name for _, child in skeleton["parts"] for name in names_of(child)]


def leaves_of(example: Any, skeleton: Any) -> list[Any]:
    if not isinstance(skeleton, dict):
        return [example]
    items = (example[key] for key, _ in skeleton["parts"]) if skeleton["kind"] == "dict" else example
    return [leaf for item, (_, child) in zip(items, skeleton["parts"]) for leaf in leaves_of(item, child)]


def leaves_of_all(examples: Sequence[Any], skeleton: Any) -> list[Sequence[Any]] | None:
    """Return each feature's items in all examples; None if an example may have another structure."""
    kinds = set(map(type, examples))
    if not isinstance(skeleton, dict):
        return None if any(issubclass(kind, (tuple, Mapping)) for kind in kinds) else [examples]
    kind, parts = skeleton["kind"], skeleton["parts"]
    if kinds != {{"dict": dict, "tuple": tuple}.get(kind) or _NAMED_TUPLES.get(kind)}:
        return None
    if set(map(len, examples)) != {len(parts)}:
        return None
    found: list[Sequence[Any]] = []
    for at, (key, child) in enumerate(parts):
        try:
            below = leaves_of_all([example[key if kind == "dict" else at] for example in examples], child)
        except KeyError:
            return None
        if below is None:
            return None
        found += below
    return found


def packed(skeleton: Any, leaves: Mapping[Name, Any]) -> Any:
    if not isinstance(skeleton, dict):
        return leaves[skeleton]
    items = {key: packed(child, leaves) for key, child in skeleton["parts"]}
    if skeleton["kind"] == "dict":
        return items
    return tuple(items.values()) if skeleton["kind"] == "tuple" else _named_tuple(skeleton["kind"], [*items])(**items)


def _named_tuple(kind: str, fields: Sequence[str]) -> type:
    """The class of this module and name; a similar class if this worker never had an example of it."""
    if kind not in _NAMED_TUPLES:
        _NAMED_TUPLES[kind] = collections.namedtuple(kind.rpartition(":")[2].rpartition(".")[2], fields)
    return _NAMED_TUPLES[kind]
