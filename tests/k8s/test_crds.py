"""The table of the operators' CRDs: it refuses the same manifests as the CRDs, and is up to date with them."""

from __future__ import annotations

import copy
import functools
import os
import pathlib
from collections.abc import Iterator

import pytest

from k8s import condense, manifests, schemas

CRDS = pathlib.Path(os.environ.get("DISTPAD_CRDS") or manifests.ROOT.parent / "shared" / "crds")
CUSTOM = {
    "JobSet": ("jobset", "JobSet/train"),
    "MPIJob": ("mpijob", "MPIJob/train"),
    "TrainJob": ("trainjob", "TrainJob/train"),
    "TrainingRuntime": ("trainjob-mpi", "TrainingRuntime/train"),
}
SORTS = ("unknown field", "wrong type", "not in enum", "required is missing")

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("manifests")]  # builds are cached


@functools.cache
def full() -> dict[tuple[str, str], schemas.Schema]:
    """The CRDs themselves, if they are available."""
    try:
        return schemas.by_kind(condense.read(CRDS))
    except FileNotFoundError as error:
        pytest.skip(f"{error}\nSet DISTPAD_CRDS to their folder.")


def custom(kind: str) -> manifests.Resource:
    overlay, name = CUSTOM[kind]
    return manifests.find(manifests.overlay(overlay), name)


def faults(resource: manifests.Resource, *, once: bool) -> Iterator[tuple[str, str, manifests.Resource]]:
    """Yield manifests with one fault, for each of SORTS and each schema rule of this sort: (sort, path, manifest).

    Args:
        resource: a manifest without faults.
        once: whether each part of the schema gets one fault, however often it is used.
    """
    schema, seen = schemas.crds()[resource["apiVersion"], resource["kind"]], set()
    for path, part, value, _ in schemas._parts(schema, resource, None):
        if path.partition(".")[0] in ("apiVersion", "kind", "metadata") or (once and id(part) in seen):
            continue
        if "/" in path or ".com" in path:
            continue  # names of labels and resources contain dots
        seen.add(id(part))
        changes = {}
        if isinstance(value, dict) and "properties" in part:
            changes["unknown field"] = (f"{path}.noneSuch", 1)
            for name in set(part.get("required", ())) & set(value):
                changes[f"required is missing {name}"] = (f"{path}.{name}", None)
        if "type" in part or part.get("x-kubernetes-int-or-string"):
            changes["wrong type"] = (path, "text" if isinstance(value, (dict, list)) else ["text"])
        if "enum" in part:
            changes["not in enum"] = (path, "NoneSuch")
        for sort, (where, new) in changes.items():
            if where := where.removeprefix("."):
                changed = copy.deepcopy(resource)
                manifests.put(changed, where, new)
                yield sort, where, changed


@pytest.mark.parametrize("kind", CUSTOM)
def test_the_table_refuses_every_fault(kind):
    resource, found = custom(kind), set()
    assert not schemas.of_crd(resource)
    for sort, path, changed in faults(resource, once=True):
        assert schemas.of_crd(changed), f"{sort} at {path}"
        found.add(next(each for each in SORTS if sort.startswith(each)))
    assert found >= {"unknown field", "wrong type", "required is missing"}


def test_every_sort_of_fault_is_there():
    found = {sort for kind in CUSTOM for sort, _, _ in faults(custom(kind), once=True)}
    assert {each for each in SORTS if any(sort.startswith(each) for sort in found)} == set(SORTS)


def test_the_table_says_where_it_comes_from():
    text = condense.TABLE.read_text(encoding="utf-8")
    assert all(source in text for source in condense.FILES.values())
    assert len(text) < 60_000 and {kind for _, kind in schemas.crds()} == set(CUSTOM)


# -- the CRDs themselves ----------------------------------------------------------------------------------------------


@pytest.mark.wide
def test_the_table_is_what_the_crds_are_condensed_to():
    full()
    assert condense.condense(condense.read(CRDS)) == condense.TABLE.read_text(encoding="utf-8")


@pytest.mark.wide
def test_nothing_but_descriptions_is_left_out():
    for key, schema in full().items():
        assert condense.plain(schema) == schemas.crds()[key]


@pytest.mark.wide
@pytest.mark.parametrize("kind", CUSTOM)
def test_table_and_crds_say_the_same_of_every_fault(kind):
    resource, count = custom(kind), 0
    assert not schemas.of_crd(resource, given=full)
    for sort, path, changed in faults(resource, once=False):
        found = schemas.of_crd(changed)
        assert found and found == schemas.of_crd(changed, given=full), f"{sort} at {path}"
        count += 1
    assert count >= 12
