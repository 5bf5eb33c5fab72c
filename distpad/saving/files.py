"""Checkpoints on disk: each is a folder of files with a manifest, written whole or not at all, read only if whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from typing import Any

from distpad import errors

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")
_UNFINISHED = ".writing-"  # a folder that is being written or removed
_VERSION = 1
_PART = 1 << 20  # bytes


class NotWhole(errors.DistpadError):
    """A checkpoint is not as it was written: the message says why."""


def path_of(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder / f"step-{step:08d}"


def steps(folder: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in a folder, whole or not, in ascending order."""
    if not folder.is_dir():
        return []
    return sorted(int(found[1]) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name)))


def newest_whole(folder: pathlib.Path) -> tuple[int | None, dict[int, str]]:
    """The step of the newest whole checkpoint, or None; and why each newer one is not whole, by step."""
    broken: dict[int, str] = {}
    for step in reversed(steps(folder)):
        try:
            check(path_of(folder, step))
        except NotWhole as error:
            broken[step] = str(error)
        else:
            return step, broken
    return None, broken


def prepare(folder: pathlib.Path) -> pathlib.Path:
    """Make an empty folder for ``commit``. Removes what a process that was killed left behind. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
    unfinished = folder / f"{_UNFINISHED}{os.getpid()}"
    unfinished.mkdir()
    return unfinished


def commit(unfinished: pathlib.Path, step: int, keep: int) -> None:
    """Make the files of a folder of ``prepare`` the checkpoint of a step, and remove all but the newest ``keep``.

    The rename is the only moment in which the checkpoint comes into being: before it, all files and the manifest are on
    the disk. Raises: OSError.
    """
    folder, names = unfinished.parent, sorted(path.name for path in unfinished.iterdir() if path.is_file())
    listed = {
        name: {"bytes": (unfinished / name).stat().st_size, "sha256": _digest(unfinished / name)} for name in names
    }
    content: dict[str, Any] = {"version": _VERSION, "step": step, "files": listed}
    (unfinished / MANIFEST).write_text(json.dumps({**content, "sha256": _digest_of(content)}, indent=1))
    for name in [*names, MANIFEST, "."]:
        _flush(unfinished / name)
    target = path_of(folder, step)
    if target.exists():  # an elastic training that lost a worker repeats steps
        _remove(target)
    os.replace(unfinished, target)
    _flush(folder)
    for old in [found for found in steps(folder) if found < step][::-1][keep - 1 :]:
        _remove(path_of(folder, old))


def manifest(path: pathlib.Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint. Raises NotWhole unless it has its own checksum."""
    try:
        content = json.loads((path / MANIFEST).read_text())
        expected = content.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise NotWhole(f"{MANIFEST} cannot be read ({type(error).__name__})") from error
    if expected != _digest_of(content):
        raise NotWhole(f"{MANIFEST} does not have its checksum")
    if content["version"] != _VERSION:
        raise NotWhole(f"{MANIFEST} is of version {content['version']}, expected {_VERSION}")
    return content


def check(path: pathlib.Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint. Raises NotWhole unless all files have their sizes and checksums."""
    content = manifest(path)
    check_files(path, content)
    return content


def check_files(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Raise NotWhole unless all files of a manifest have their sizes and checksums."""
    listed = content["files"].items()
    try:
        for name, entry in listed:
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                raise NotWhole(f"{name} has {size} bytes, expected {entry['bytes']}")
        for name, entry in listed:
            if _digest(path / name) != entry["sha256"]:
                raise NotWhole(f"{name} does not have its checksum")
    except OSError as error:
        raise NotWhole(f"{error.filename} cannot be read ({error.strerror})") from error


def set_aside(path: pathlib.Path) -> None:
    """Rename a checkpoint that is not whole, so that it does not count among the newest ones."""
    aside = path.with_name(f"broken-{path.name}")
    with contextlib.suppress(OSError):  # the folder may be read-only
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)


def _remove(path: pathlib.Path) -> None:
    """Remove a checkpoint. A process that is killed in between leaves no half of it under its name."""
    hidden = path.with_name(f"{_UNFINISHED}{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _flush(path: pathlib.Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _digest(path: pathlib.Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_PART):
            found.update(part)
    return found.hexdigest()


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
