"""The training data of the reader: pictures and texts as arrays, and their batches on all replicas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

import distpad
from handwriting.engines import Engine
from handwriting.strings import Example

PADDING = {"image": distpad.Pad(axis=0), "label": distpad.Pad()}


class Source(Protocol):
    """A set of examples. Every worker can read every example by its index."""

    alphabet: str
    height: int
    max_length: int
    widths: np.ndarray  # of the pictures, [examples] int64
    lengths: np.ndarray  # of the texts, [examples] int64

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Rows:
    """The examples of a source as arrays: "image" ``[width, height, 1]`` float32 and "label" ``[length]`` int32.

    Args:
        source: the pictures and texts.
        end: whether an end symbol, of class ``len(alphabet)``, follows each text.
    """

    def __init__(self, source: Source, *, end: bool = False):
        self.source = source
        self.end = end

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        example, alphabet = self.source[index], self.source.alphabet
        label = [alphabet.index(character) for character in example.text] + [len(alphabet)] * self.end
        return {"image": example.image[:, :, np.newaxis], "label": np.array(label, np.int32)}


class Chosen:
    """A selection of rows, in a given order."""

    def __init__(self, rows: Rows, places: np.ndarray):
        self.rows = rows
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.rows[int(place)] for place in self.places)


def batches(engine: Engine, rows: Rows, *, boundaries: int | None = None, **sampling: object) -> distpad.PaddedBatches:
    """Batch pictures of similar widths. The global batches are the same on any number of replicas.

    Args:
        engine: the engine to batch for.
        rows: all rows; each worker reads its own part of a global batch.
        boundaries: maximum number of padded sizes, and of traces of the step; None: no limit.
        sampling: arguments of ``distpad.LengthSampler``.
    """
    buckets = (
        None if boundaries is None else joint_buckets(rows.source.widths, rows.source.lengths + rows.end, boundaries)
    )
    sampler = distpad.LengthSampler(rows.source.widths, buckets=buckets and buckets["image"], **sampling)
    return distpad.PaddedBatches(
        (rows, sampler), padding=PADDING, tokens="label", buckets=buckets, backend=engine.backend
    )


def shuffled_batches(engine: Engine, data: Rows, batch_size: int, steps: int) -> distpad.PaddedBatches:
    """Batch shuffled strings of any width, for comparisons. The global batches are the same on any engine.

    All batches have one padded size, so TensorFlow traces the step once.
    """
    workers = engine.backend.num_workers
    order = np.resize(np.random.default_rng(0).permutation(len(data)), [steps, workers, batch_size // workers])
    return distpad.PaddedBatches(
        Chosen(data, order[:, engine.worker].ravel()),
        batch_size // engine.replicas,
        padding=PADDING,
        tokens="label",
        buckets=joint_buckets(data.source.widths, data.source.lengths + data.end, boundaries=1),
        backend=engine.backend,
    )


def joint_buckets(widths: np.ndarray, lengths: np.ndarray, boundaries: int) -> dict[str, distpad.Buckets]:
    """Compute the best boundaries for pictures of these ``widths``, and one text boundary for each of them.

    A text boundary is the length of the longest text whose picture fits the picture boundary of the same index.
    """
    image = distpad.Buckets.from_lengths(widths, boundaries)
    longest = [int(lengths[widths <= width].max()) for width in image.boundaries]
    for place in range(1, len(longest)):
        longest[place] = max(longest[place], longest[place - 1] + 1)  # boundaries must increase
    return {"image": image, "label": distpad.Buckets(longest)}
