"""Validate resources like the API server in strict mode: custom resources by CRDs, others by Kubernetes's schemas."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import celpy
import jsonschema
import kubernetes_validate
from kubernetes_validate import utils

from k8s import condense, manifests

VERSIONS = ("1.31", "1.34", "1.37")  # of Kubernetes: the minimum of k8s/README.md, one between, the newest
OBJECT_META = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "required": ["name"],
    "additionalProperties": False,
}

Schema = dict[str, Any]


# Cached, since both read megabytes of JSON.
utils.schema_contents = functools.cache(utils.schema_contents)
utils.all_versions = functools.cache(utils.all_versions)


@functools.cache
def crds() -> dict[tuple[str, str], Schema]:
    """The schema of each (apiVersion, kind), from the table that condense.py makes from the CRDs."""
    return by_kind(condense.expand(condense.TABLE.read_text(encoding="utf-8")))


def by_kind(schemas: dict[str, Schema]) -> dict[tuple[str, str], Schema]:
    return {(key.split()[0], key.split()[1]): schema for key, schema in schemas.items()}


def is_built_in(resource: manifests.Resource) -> bool:
    group = resource["apiVersion"].rpartition("/")[0]
    return "." not in group or (group.endswith(".k8s.io") and not group.endswith(".x-k8s.io"))


def findings(
    resource: manifests.Resource,
    old: manifests.Resource | None = None,
    given: Callable[[], dict[tuple[str, str], Schema]] = crds,
) -> list[str]:
    """Return the errors of a resource; with ``old``, those of an update, including changes of immutable fields.

    ``given`` are other schemas of the custom resources.

    Raises:
      KeyError: there is no schema for the custom resource.
    """
    if is_built_in(resource):
        return of_kubernetes(resource)
    found = of_crd(resource, old, given)
    for path, _, made in manifests.nested(resource):  # a CRD's schema of pods is less strict than Kubernetes's
        found += [f"{path}: {each}" for each in of_kubernetes(made)]
    return found


def of_crd(
    resource: manifests.Resource,
    old: manifests.Resource | None = None,
    given: Callable[[], dict[tuple[str, str], Schema]] = crds,
) -> list[str]:
    """The errors of a custom resource by its CRD."""
    key = resource["apiVersion"], resource["kind"]
    schema = given()[key]
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in _validator(given, key).iter_errors(resource)
    ]
    # like the API server, which evaluates rules only for values of the right types
    return found or [*_broken_lists(schema, resource), *_broken_rules(schema, resource, old)]


@functools.cache
def _validator(given: Callable[[], dict[tuple[str, str], Schema]], key: tuple[str, str]) -> Any:
    return jsonschema.Draft202012Validator(strict(given()[key]))


def findings_of(resources: Sequence[manifests.Resource]) -> list[str]:
    """The errors of all resources."""
    return [each for resource in resources for each in findings(resource)]


def of_kubernetes(resource: manifests.Resource) -> list[str]:
    return list(_of_kubernetes(json.dumps(resource)))


@functools.cache  # most manifests hold the same service account, claims and network policy
def _of_kubernetes(text: str) -> tuple[str, ...]:
    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(json.loads(text), version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {'.'.join(map(str, error.absolute_path))}: {error.message}")
    return tuple(found)


def strict(schema: Schema, root: bool = True) -> Schema:
    """Convert a CRD's schema to a JSON schema that refuses unknown fields, which the API server drops silently."""
    made = dict(schema)
    for key in ("items", "additionalProperties"):
        if isinstance(made.get(key), dict):
            made[key] = strict(made[key], False)
    if "properties" in made:
        made["properties"] = {name: strict(each, False) for name, each in made["properties"].items()}
        if root:
            made["properties"]["metadata"] = OBJECT_META
    if made.get("type") == "object" and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if made.pop("nullable", False):
        return {"anyOf": [{"type": "null"}, made]}
    return made


def _parts(schema: Schema, value: Any, old: Any, path: str = "") -> Iterator[tuple[str, Schema, Any, Any]]:
    """Walk through schema and value in parallel, with the old value of an update."""
    yield path, schema, value, old
    if isinstance(value, dict):
        for key, each in value.items():
            inner = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
            if isinstance(inner, dict):
                before = old.get(key) if isinstance(old, dict) else None
                yield from _parts(inner, each, before, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for number, each in enumerate(value):
            before = old[number] if isinstance(old, list) and number < len(old) else None
            yield from _parts(schema["items"], each, before, f"{path}.{number}")


def _broken_lists(schema: Schema, resource: manifests.Resource) -> Iterator[str]:
    """Duplicates in lists that are sets, or maps by some of their fields."""
    for path, part, value, _ in _parts(schema, resource, None):
        kind = part.get("x-kubernetes-list-type")
        if not isinstance(value, list) or kind not in ("map", "set"):
            continue
        keys = part.get("x-kubernetes-list-map-keys", [])
        seen = [tuple(str(each.get(key)) for key in keys) if kind == "map" else str(each) for each in value]
        twice = {each for each in seen if seen.count(each) > 1}
        yield from (f"{path}: {each} is a duplicate" for each in sorted(twice, key=str))


def _broken_rules(schema: Schema, resource: manifests.Resource, old: manifests.Resource | None) -> Iterator[str]:
    """Violations of the CRD's CEL rules. Rules about the old value apply only to updates."""
    for path, part, value, before in _parts(schema, resource, old):
        for rule in part.get("x-kubernetes-validations", ()):
            of_update = "oldSelf" in rule["rule"]
            if of_update and before is None:
                continue
            values = {"self": value, **({"oldSelf": before} if of_update else {})}
            if not holds(rule["rule"], values):
                yield f"{path}: {rule.get('message') or rule['rule']}"


@functools.cache
def _compiled(rule: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def holds(rule: str, values: dict[str, Any]) -> bool:
    """Evaluate a CEL rule. Raises celpy.CELEvalError if that fails: a rule that was not evaluated must not pass."""
    return bool(_compiled(rule).evaluate({name: celpy.json_to_cel(value) for name, value in values.items()}))
