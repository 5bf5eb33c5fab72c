"""Make crds/condensed.json, the schemas and rules against which tests validate manifests, from the operators' CRDs.

    python tests/k8s/condense.py FOLDER

It keeps fields, types, formats, enums, patterns, limits, defaults, required fields, list types and CEL rules of all
served versions. It drops descriptions, nine tenths of a CRD. Parts that occur more than once are stored once, under
"shared". With --all, and if the CRDs are available, a test runs this script again and compares the file.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import pathlib
from typing import Any

import yaml

TABLE = pathlib.Path(__file__).parent / "crds" / "condensed.json"
# file | origin: repository, release, path
SOURCES = """
kubeflow.org_mpijobs.yaml                   | kubeflow/mpi-operator v0.8.0, manifests/base/
jobset.x-k8s.io_jobsets.yaml                | kubernetes-sigs/jobset v0.12.0, config/components/crd/bases/
trainer.kubeflow.org_trainjobs.yaml         | kubeflow/trainer v2.3.0, manifests/base/crds/
trainer.kubeflow.org_trainingruntimes.yaml  | kubeflow/trainer v2.3.0, manifests/base/crds/
"""
FILES = {name.strip(): source.strip() for line in SOURCES.strip().splitlines() for name, source in [line.split("|")]}
WORTH_SHARING = 60  # characters

Schema = dict[str, Any]


def read(folder: pathlib.Path) -> dict[str, Schema]:
    """The schemas of all served versions in the CRDs, by "apiVersion kind".

    Raises:
      FileNotFoundError: files are missing. The message has their origin.
    """
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}. They come from:\n{SOURCES}")
    found = {}
    for name in FILES:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        crd = yaml.load((folder / name).read_text(encoding="utf-8"), Loader=loader)["spec"]
        for version in crd["versions"]:
            if version["served"]:
                key = f"{crd['group']}/{version['name']} {crd['names']['kind']}"
                found[key] = version["schema"]["openAPIV3Schema"]
    return found


def plain(schema: Schema) -> Schema:
    """A schema without descriptions."""
    made: Schema = {}
    for key, value in schema.items():
        if key == "properties":
            made[key] = {name: plain(each) for name, each in value.items()}
        elif key in ("allOf", "anyOf", "oneOf"):
            made[key] = [plain(each) for each in value]
        elif key in ("items", "additionalProperties", "not") and isinstance(value, dict):
            made[key] = plain(value)
        elif key != "description":
            made[key] = value
    return made


def condense(schemas: dict[str, Schema]) -> str:
    """The text of the table, with one line per kind and per shared part."""
    kinds = {key: plain(schema) for key, schema in schemas.items()}
    counted: collections.Counter[str] = collections.Counter()

    def count(value: Any) -> None:
        if isinstance(value, dict) and len(text := _text(value)) > WORTH_SHARING:
            counted[text] += 1
            if counted[text] > 1:  # its inner parts are shared with it
                return
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            count(each)

    def shortened(value: Any, *, is_root: bool = False) -> Any:
        if isinstance(value, dict):
            if not is_root and counted[text := _text(value)] > 1:
                return {"$ref": _name(text)}
            return {key: shortened(each) for key, each in value.items()}
        return [shortened(each) for each in value] if isinstance(value, list) else value

    count(kinds)
    shared = {_name(text): json.loads(text) for text, number in counted.items() if number > 1}
    parts = {
        "sources": FILES,
        "kinds": {key: shortened(each, is_root=True) for key, each in kinds.items()},
        "shared": {key: shortened(each, is_root=True) for key, each in shared.items()},
    }
    lines = [
        f'"{name}": {{\n' + ",\n".join(f"{json.dumps(key)}: {_text(part[key])}" for key in sorted(part)) + "\n}"
        for name, part in parts.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def expand(text: str) -> dict[str, Schema]:
    """The schemas in a table's text, by "apiVersion kind". A shared part is the same object wherever it occurs."""
    table = json.loads(text)
    made: dict[str, Any] = {}

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            name = value.get("$ref")
            if isinstance(name, str):
                if name not in made:
                    made[name] = whole(table["shared"][name])
                return made[name]
            return {key: whole(each) for key, each in value.items()}
        return [whole(each) for each in value] if isinstance(value, list) else value

    return {key: whole(schema) for key, schema in table["kinds"].items()}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="where the CRDs are")
    text = condense(read(parser.parse_args().folder))
    TABLE.write_text(text, encoding="utf-8")
    print(f"{TABLE}: {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
