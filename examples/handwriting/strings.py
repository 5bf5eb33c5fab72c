"""Strings of 1 to 12 handwritten digits, side by side. Spacing, slant, thickness and size vary.

Every string is a pure function of (seed, index). Any worker can create any row of any global batch from the seed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from handwriting import digits

MAX_DIGITS = 12
MIN_ADVANCE = 9  # pixels between two digits' left edges; the reader has one output for 4 pixels, and "11" needs three


@dataclass(frozen=True)
class Example:
    """One line of handwriting."""

    image: np.ndarray  # [width, height] float32, 0 is paper and 1 is ink
    text: str


class Layout(NamedTuple):
    """Positions and distortions of the digits in a line."""

    chosen: np.ndarray  # indices of the pictures
    slant: np.ndarray
    scale: np.ndarray
    widen: np.ndarray
    raise_by: np.ndarray
    starts: np.ndarray  # columns
    width: int  # of the line, columns


class DigitStrings:
    """A set of strings. Items are drawn on access; their widths are available without drawing.

    Args:
        split: split of the digits, "train" or "test".
        seed: seed of the set; another seed gives other strings.
        count: number of strings.

    Example:
        >>> strings = DigitStrings("train", seed=1, count=10)
        >>> strings[7].text == DigitStrings("train", seed=1, count=10)[7].text
        True
        >>> len(strings[7].image) == strings.widths[7]
        True
    """

    alphabet = "0123456789"
    height = digits.SIZE
    max_length = MAX_DIGITS

    def __init__(self, split: str, seed: int, count: int):
        self.digits = digits.load(split)
        self.seed = seed
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        rng = self._rng(index)
        layout = _lay_out(self.digits, rng)
        line = _change_thickness(_draw(self.digits, layout), rng.uniform(-0.45, 0.6))
        text = "".join(self.alphabet[label] for label in self.digits.labels[layout.chosen])
        return Example(np.ascontiguousarray(line.T), text)

    @property
    def widths(self) -> np.ndarray:
        """Widths of all pictures, ``[count]``."""
        return self._sizes[:, 0]

    @property
    def lengths(self) -> np.ndarray:
        """Lengths of all texts, ``[count]``."""
        return self._sizes[:, 1]

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        layouts = (_lay_out(self.digits, self._rng(index)) for index in range(self.count))
        return np.array([[layout.width, len(layout.chosen)] for layout in layouts], np.int64)

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.count:
            raise IndexError(f"DigitStrings: index is {index}, expected 0 to {self.count - 1}.")
        return np.random.default_rng((self.seed, index))


def _lay_out(source: digits.Digits, rng: np.random.Generator) -> Layout:
    """Choose the digits of one line and their positions.

    Each line has its own slant, size and spacing. Each digit varies them slightly.
    """
    chosen = rng.integers(len(source.labels), size=rng.integers(1, MAX_DIGITS + 1))
    count = len(chosen)
    slant = rng.normal(0, 0.18) + rng.normal(0, 0.05, count)
    scale = rng.uniform(0.74, 0.93) * rng.uniform(0.95, 1.05, count)
    widen = scale * rng.uniform(0.9, 1.1)
    raise_by = rng.normal(0, 0.5, count)
    gaps = rng.uniform(-1, 3) + rng.normal(0, 0.8, count)

    widths = (source.right - source.left)[chosen] * widen
    advances = np.maximum(widths + gaps, MIN_ADVANCE)
    starts = 4 + rng.uniform(0, 3) + np.concatenate([[0], np.cumsum(advances)[:-1]])
    width = int(np.ceil(starts[-1] + widths[-1] + 5 + rng.uniform(0, 4)))
    return Layout(chosen, slant, scale, widen, raise_by, starts, width)


def _draw(source: digits.Digits, layout: Layout) -> np.ndarray:
    """Draw the chosen digits into one line, [height, width]."""
    chosen, slant, scale, widen, raise_by, starts, width = layout
    size = digits.SIZE
    line = np.zeros((size, width), np.float32)
    # Each digit covers a window of the line. (y, x) maps each pixel of the window to a point in the digit's picture.
    window = size + 8
    first = np.floor(starts).astype(int) - 4
    columns = np.arange(window)[None, None, :] + first[:, None, None]
    rows = np.arange(size)[None, :, None] - (size - 1) / 2
    y = (rows + raise_by[:, None, None]) / scale[:, None, None]
    x = (
        (columns - starts[:, None, None]) / widen[:, None, None]
        + source.left[chosen, None, None]
        + slant[:, None, None] * y
    )
    y, x = np.broadcast_arrays(y + (size - 1) / 2, x)
    which = np.broadcast_to(chosen[:, None, None], x.shape)
    drawn = ndimage.map_coordinates(source.images, (which, y, x), order=1, mode="constant")
    for picture, start in zip(drawn, first):
        stop = min(start + window, line.shape[1])
        np.maximum(line[:, start:stop], picture[:, : stop - start], out=line[:, start:stop])
    return line


def _change_thickness(line: np.ndarray, amount: float) -> np.ndarray:
    """Blend a line towards its dilation (amount > 0, a broad pen) or its erosion (amount < 0, a fine one)."""
    extreme = ndimage.grey_dilation if amount > 0 else ndimage.grey_erosion
    return line + abs(amount) * (extreme(line, size=(2, 2)) - line)
