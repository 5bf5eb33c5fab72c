"""The 1,797 handwritten digits of scikit-learn, scaled to 16 pixels and split into train and test."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

SIZE = 16  # height and width of one digit's picture
SPLITS = ("train", "test")


class Digits(NamedTuple):
    """Pictures of digits, with their labels and the columns of their ink."""

    images: np.ndarray  # [count, SIZE, SIZE] float32, 0 is paper and 1 is ink
    labels: np.ndarray  # [count] int64, 0 to 9
    left: np.ndarray  # [count] int64, the first column with ink
    right: np.ndarray  # [count] int64, the column after the last with ink


def load(split: str, held_out: float = 0.2) -> Digits:
    """Load the digits of one split; no picture is in both splits.

    A fixed random permutation splits the pictures. The data set does not name the writers, so most writers are in both
    splits. The test therefore measures unseen pictures, not unseen writers.

    Args:
        split: "train" or "test".
        held_out: fraction of the pictures in "test", between 0 and 1.

    Raises:
        ValueError: ``split`` is neither "train" nor "test".
    """
    if split not in SPLITS:
        raise ValueError(f"load: split is {split!r}, expected one of {', '.join(SPLITS)}.")
    from sklearn.datasets import load_digits

    data = load_digits()
    dealt = np.random.default_rng(0).permutation(len(data.images))
    first = round(len(dealt) * (1 - held_out))
    side = np.sort(dealt[:first] if split == "train" else dealt[first:])
    images = _enlarge(data.images[side] / 16.0)
    ink = images.max(axis=1) > 0.15
    left = ink.argmax(axis=1)
    right = SIZE - ink[:, ::-1].argmax(axis=1)
    return Digits(images, data.target[side], left, right)


def _enlarge(images: np.ndarray) -> np.ndarray:
    """Enlarge [count, 8, 8] to [count, 16, 16] by cubic splines, so that strokes stay smooth."""
    enlarged = ndimage.zoom(images, (1, 2, 2), order=3, mode="grid-constant", grid_mode=True)
    return np.clip(enlarged, 0, 1).astype(np.float32)
