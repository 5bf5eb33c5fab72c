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
    if isinstance(example, Mapping):
        kinds = {type(key) for key in example}
        if not (kinds <= {str} or kinds <= {int}):
            raise TypeError(
                errors.sentence(_NAME, "an example", f"a mapping with keys {[*example]}", "strings, or integers")
            )
        return {"dict": [[key, skeleton_of(example[key], (*path, key))] for key in sorted(example)]}
    if isinstance(example, tuple):
        if hasattr(example, "_fields"):
            kind = f"{type(example).__module__}:{type(example).__qualname__}"
            _NAMED_TUPLES[kind] = type(example)
            children = [[name, skeleton_of(getattr(example, name), (*path, name))] for name in example._fields]
            return {"named": children, "type": kind}
        return {"tuple": [skeleton_of(item, (*path, i)) for i, item in enumerate(example)]}
    return (path[0] if path else 0) if len(path) < 2 else "/".join(map(str, path))


def names_of(skeleton: Any) -> list[Name]:
    if not isinstance(skeleton, dict):
        return [skeleton]
    return [name for child in children_of(skeleton).values() for name in names_of(child)]


def children_of(skeleton: Any) -> dict[Name, Any]:
    """The parts of an example by their keys, fields or indices."""
    (parts,) = (skeleton[kind] for kind in ("dict", "named", "tuple") if kind in skeleton)
    return dict(enumerate(parts)) if "tuple" in skeleton else dict(parts)


def leaves_of(example: Any, skeleton: Any) -> list[Any]:
    if not isinstance(skeleton, dict):
        return [example]
    if "dict" in skeleton:
        return [leaf for key, child in skeleton["dict"] for leaf in leaves_of(example[key], child)]
    return [leaf for item, child in zip(example, children_of(skeleton).values()) for leaf in leaves_of(item, child)]


def leaves_of_all(examples: Sequence[Any], skeleton: Any) -> list[Sequence[Any]] | None:
    """Return each feature's items in all examples; None if an example may have another structure."""
    kinds = set(map(type, examples))
    if not isinstance(skeleton, dict):
        return None if any(issubclass(kind, (tuple, Mapping)) for kind in kinds) else [examples]
    parts = children_of(skeleton)
    wanted = {"dict": dict, "tuple": tuple}.get(next(iter(skeleton))) or _NAMED_TUPLES.get(skeleton["type"])
    if kinds != {wanted} or set(map(len, examples)) != {len(parts)}:
        return None
    found: list[Sequence[Any]] = []
    for at, (key, child) in enumerate(parts.items()):
        try:
            items = [example[key if wanted is dict else at] for example in examples]
        except KeyError:
            return None
        below = leaves_of_all(items, child)
        if below is None:
            return None
        found += below
    return found


def packed(skeleton: Any, leaves: Mapping[Name, Any]) -> Any:
    if not isinstance(skeleton, dict):
        return leaves[skeleton]
    if "dict" in skeleton:
        return {key: packed(child, leaves) for key, child in skeleton["dict"]}
    if "named" in skeleton:
        fields = {name: packed(child, leaves) for name, child in skeleton["named"]}
        return _named_tuple(skeleton["type"], [*fields])(**fields)
    return tuple(packed(child, leaves) for child in skeleton["tuple"])


def _named_tuple(kind: str, fields: Sequence[str]) -> type:
    """The class of this module and name; a similar class if this worker never had an example of it."""
    if kind not in _NAMED_TUPLES:
        _NAMED_TUPLES[kind] = collections.namedtuple(kind.rpartition(":")[2].rpartition(".")[2], fields)
    return _NAMED_TUPLES[kind]
