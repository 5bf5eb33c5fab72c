"""What the reader is trained on: pictures and texts as arrays, and their batches on all replicas of an engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

import distpad
from handwriting.engines import Engine
from handwriting.strings import Example

PADDING = {"image": distpad.Pad(axis=0), "label": distpad.Pad()}


class Source(Protocol):
    """A set of examples, in which any worker finds any of them by its index."""

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
    """Some of the rows, in an order of one's own."""

    def __init__(self, rows: Rows, places: np.ndarray):
        self.rows = rows
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.rows[int(place)] for place in self.places)


def batches(engine: Engine, rows: Rows, *, boundaries: int | None = None, **sampling: object) -> distpad.PaddedBatches:
    """Batches of pictures of similar widths, the same on any number of replicas, of which each worker gets its part.

    Args:
        engine: who trains together.
        rows: all of them; each worker reads those of its part.
        boundaries: how many different sizes there may be, so that the step is traced as often; None: any.
        sampling: what ``distpad.LengthSampler`` takes.
    """
    buckets = (
        None if boundaries is None else joint_buckets(rows.source.widths, rows.source.lengths + rows.end, boundaries)
    )
    sampler = distpad.LengthSampler(rows.source.widths, buckets=buckets and buckets["image"], **sampling)
    return distpad.PaddedBatches(
        (rows, sampler), padding=PADDING, tokens="label", buckets=buckets, backend=engine.backend
    )


def shuffled_batches(engine: Engine, data: Rows, batch_size: int, steps: int) -> distpad.PaddedBatches:
    """For comparisons: strings of any width, dealt out as they come, the same global batches on any engine.

    All are padded to one size, which is one trace of the step.
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
    """The best boundaries for pictures of these ``widths``, and as many for their texts: a step takes the same of both.

    A text's boundary is the longest text whose picture fits into the picture's, so that no text asks for more.
    """
    image = distpad.Buckets.from_lengths(widths, boundaries)
    longest = [int(lengths[widths <= width].max()) for width in image.boundaries]
    for place in range(1, len(longest)):
        longest[place] = max(longest[place], longest[place - 1] + 1)  # boundaries rise
    return {"image": image, "label": distpad.Buckets(longest)}
