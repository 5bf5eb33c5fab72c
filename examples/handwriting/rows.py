"""One replica's rows of a global batch, padded to the longest among themselves; nobody knows what the others hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from handwriting.strings import Example


class Source(Protocol):
    """An endless set of examples, in which any worker finds any of them by its index."""

    alphabet: str
    height: int
    max_length: int

    def __getitem__(self, index: int) -> Example: ...


def of_step(source: Source, step: int, batch_size: int, replica: int, replicas: int) -> list[Example]:
    """The examples that one replica gets of the global batch of a step. They do not depend on who else trains."""
    mine = np.array_split(np.arange(batch_size), replicas)[replica]
    return [source[int(step * batch_size + place)] for place in mine]


def pad(examples: Sequence[Example], alphabet: str, *, end: bool = False) -> dict[str, np.ndarray]:
    """Pad examples to the longest among them.

    Args:
        examples: at least one.
        alphabet: a character's class is its place here.
        end: whether an end symbol, of class ``len(alphabet)``, follows each text.

    Returns:
        "image" ``[rows, width, height, 1]`` float32, "width" ``[rows]`` int32, "label" ``[rows, length]`` int32,
        "length" ``[rows]`` int32.
    """
    classes = [
        [alphabet.index(character) for character in example.text] + [len(alphabet)] * end for example in examples
    ]
    widths = np.array([len(example.image) for example in examples], np.int32)
    lengths = np.array([len(label) for label in classes], np.int32)
    image = np.zeros((len(examples), widths.max(), examples[0].image.shape[1], 1), np.float32)
    label = np.zeros((len(examples), lengths.max()), np.int32)
    for row, example in enumerate(examples):
        image[row, : widths[row], :, 0] = example.image
        label[row, : lengths[row]] = classes[row]
    return {"image": image, "width": widths, "label": label, "length": lengths}
