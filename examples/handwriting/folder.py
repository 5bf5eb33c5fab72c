"""Pictures of a user: a folder with a ``labels.csv`` that names a file and its text in each row."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from handwriting import model
from handwriting.strings import Example

HELD_OUT = 10  # one file in ten is held out


class FolderStrings:
    """The examples of a folder.

    The split of a file depends on its name alone, so that new files do not move the old ones to another split.

    Args:
        folder: holds ``labels.csv`` with the columns ``file`` and ``text``, and the files.
        split: "train" or "test".
        height: height of the scaled pictures, pixels.

    Raises:
        ValueError: no ``labels.csv``, a missing column, a missing or unreadable picture, no text, fewer than two rows.
    """

    def __init__(self, folder: Path, split: str, height: int):
        texts = _read_labels(folder)
        self.height = height
        self.alphabet = "".join(sorted(set("".join(texts.values()))))
        self.max_length = max(len(text) for text in texts.values())
        names = [name for name in texts if (name in _held_out(texts)) == (split == "test")]
        self.names = names
        self.examples = [Example(read_picture(folder / name, height), texts[name]) for name in names]
        self.widths = np.array([len(example.image) for example in self.examples], np.int64)
        self.lengths = np.array([len(example.text) for example in self.examples], np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def check(source: FolderStrings, head: str) -> None:
    """Check that the reader can output each text.

    CTC outputs at most one character for each column, and needs a blank between two equal characters.

    Raises:
        ValueError: a text needs more columns than its picture has; the message names the first file.
    """
    if head != "ctc":
        return
    for name, example in zip(source.names, source.examples):
        needed = len(example.text) + sum(a == b for a, b in zip(example.text, example.text[1:]))
        there = int(model.columns(len(example.image)))
        if needed > there:
            raise ValueError(
                f"{name}: the text {example.text!r} needs {needed} columns, but the picture is {len(example.image)} "
                f"pixels wide and has {there} columns. Use a larger --height, or --loss position."
            )


def read_picture(path: Path, height: int) -> np.ndarray:
    """Read a picture as ``[width, height]`` float32, 0 for paper and 1 for ink. Paper may be light or dark.

    Raises:
        ValueError: the file does not exist, or is not a picture.
    """
    try:
        with Image.open(path) as picture:
            grey = picture.convert("L")
            width = max(1, round(grey.width * height / grey.height))
            pixels = np.asarray(grey.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    except FileNotFoundError:
        raise ValueError(f"{path}: the file does not exist.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error}).") from error
    return np.ascontiguousarray((1 - pixels if np.median(pixels) > 0.5 else pixels).T)


def _read_labels(folder: Path) -> dict[str, str]:
    path = folder / "labels.csv"
    if not path.is_file():
        raise ValueError(
            f"{folder}: holds no labels.csv. Write this file with the columns file,text and a row for each picture."
        )
    with path.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        missing = {"file", "text"} - set(rows.fieldnames or [])
        if missing:
            raise ValueError(f"{path}: has no column {' or '.join(sorted(missing))}. Its first line must be: file,text")
        texts = {row["file"]: row["text"] or "" for row in rows}
    empty = [name for name, text in texts.items() if not text]
    if empty:
        raise ValueError(f"{path}: {empty[0]} has no text, expected at least one character.")
    if len(texts) < 2:
        raise ValueError(
            f"{path}: names {len(texts)} pictures, expected at least two: one for training, one for testing."
        )
    return texts


def _held_out(texts: dict[str, str]) -> set[str]:
    """Choose the test files by the hash of their names: at least one file, never all files."""
    hashes = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") for name in texts}
    chosen = {name for name, value in hashes.items() if value % HELD_OUT == 0}
    if chosen and len(chosen) < len(texts):
        return chosen
    return {min(hashes, key=lambda name: (hashes[name] % HELD_OUT, hashes[name]))}
