#!/usr/bin/env python
"""Time of padding one batch on the host: pad and pad_sequences against Keras, TensorFlow, NumPy and PyTorch.

Contenders of one table get the same sequences and pad after them. The base is the function that users have today.
Ratios below 1 are faster than the base. CPU time is that of all threads of the process.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import rounds
import sequences
import tensorflow as tf

import distpad

EXAMPLES = """\
examples:
  python benchmarks/padding.py
  python benchmarks/padding.py --count 256 --rounds 5
"""
KERAS, TO_TENSOR, LOOP = "keras.utils.pad_sequences", "to_tensor", "a NumPy loop"
SHORTER = 16  # lengths of the short sequences: 1 to 64
HEIGHT, WIDEST = 32, 256  # of images


def main() -> None:
    parser = rounds.parser(__doc__, EXAMPLES)
    parser.add_argument("--count", type=int, default=4096, metavar="N", help="sequences of a batch (default 4096)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="calls of one measurement (default 5)")
    options = parser.parse_args()
    drawn = sequences.drawn(options.count)
    short = [each[: len(each) // SHORTER] for each in drawn]
    tables = {
        "arrays": (of_arrays(drawn), KERAS),
        "short arrays": (of_arrays(short), KERAS),
        "lists": (of_lists([each.tolist() for each in drawn]), KERAS),
        "short lists": (of_lists([each.tolist() for each in short]), KERAS),
        "a RaggedTensor": (of_ragged(drawn), TO_TENSOR),
        "float32 images": (of_images(options.count // 8, np.float32), LOOP),
        "uint8 images": (of_images(options.count // 8, np.uint8), LOOP),
    }
    for name, (contenders, base) in tables.items():
        wall, cpu = measured(contenders, base, options.rounds, options.repeats)
        rounds.show(f"{name}, wall time, {options.rounds} rounds", "ms", wall, scale=1000)
        rounds.show(f"{name}, CPU time, {options.rounds} rounds", "ms", cpu, scale=1000)


def of_arrays(arrays: list[np.ndarray]) -> dict[str, Callable[[], Any]]:
    contenders: dict[str, Callable[[], Any]] = {
        KERAS: functools.partial(tf.keras.utils.pad_sequences, arrays, padding="post", dtype="int64"),
        "pad": lambda: distpad.pad(arrays),
        "pad, mask=False": lambda: distpad.pad(arrays, mask=False),
        "distpad.pad_sequences": lambda: distpad.pad_sequences(arrays, padding="post", dtype="int64"),
        "NumPy by hand, no mask": lambda: by_hand(arrays),
    }
    try:
        import torch
    except ImportError:  # no requirement of this project
        return contenders
    tensors = [torch.from_numpy(each) for each in arrays]
    contenders["PyTorch's pad_sequence"] = lambda: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    return contenders


def of_lists(lists: list[list[int]]) -> dict[str, Callable[[], Any]]:
    return {
        KERAS: functools.partial(tf.keras.utils.pad_sequences, lists, padding="post", dtype="int64"),
        "pad": lambda: distpad.pad(lists),
        "distpad.pad_sequences": lambda: distpad.pad_sequences(lists, padding="post", dtype="int64"),
    }


def of_ragged(arrays: list[np.ndarray]) -> dict[str, Callable[[], Any]]:
    ragged = tf.RaggedTensor.from_row_lengths(np.concatenate(arrays), [len(each) for each in arrays])
    return {
        TO_TENSOR: ragged.to_tensor,
        "pad": lambda: distpad.pad(ragged),
        "pad, mask=False": lambda: distpad.pad(ragged, mask=False),
    }


def of_images(count: int, dtype: Any) -> dict[str, Callable[[], Any]]:
    """Contenders for images ``[height, width, 3]`` of different widths."""
    random = np.random.default_rng(0)
    images = [
        random.integers(256, size=[HEIGHT, width, 3]).astype(dtype) for width in random.integers(16, WIDEST, count)
    ]
    return {
        LOOP: lambda: loop(images),
        "pad": lambda: distpad.pad(images),
        "pad, mask=False": lambda: distpad.pad(images, mask=False),
    }


def by_hand(arrays: list[np.ndarray]) -> np.ndarray:
    lengths = np.array([len(each) for each in arrays])
    padded = np.zeros([len(arrays), lengths.max()], arrays[0].dtype)
    padded[np.arange(padded.shape[1]) < lengths[:, np.newaxis]] = np.concatenate(arrays)
    return padded


def loop(images: list[np.ndarray]) -> np.ndarray:
    widest = max(image.shape[1] for image in images)
    padded = np.zeros([len(images), HEIGHT, widest, 3], images[0].dtype)
    for row, image in zip(padded, images):
        row[:, : image.shape[1]] = image
    return padded


def measured(
    contenders: dict[str, Callable[[], Any]], base: str, turns: int, repeats: int
) -> tuple[rounds.Figures, rounds.Figures]:
    """Return figures of wall time and of CPU time, from the same calls."""
    used: list[tuple[str, float]] = []  # CPU seconds in the order of calls: base, contender, base, contender

    def once(name: str) -> float:
        began, began_cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            contenders[name]()
        used.append((name, (time.process_time() - began_cpu) / repeats))
        return (time.perf_counter() - began) / repeats

    for warm in contenders.values():
        warm()
    wall = rounds.take_turns({name: functools.partial(once, name) for name in contenders}, base, turns)
    ratios: dict[str, list[float]] = {name: [] for name in contenders if name != base}
    for (_, base_s), (name, own_s) in zip(used[::2], used[1::2]):
        ratios[name].append(own_s / base_s)
    own = {name: [seconds for each, seconds in used if each == name] for name in contenders}
    return wall, rounds.Figures(own, ratios, base)


if __name__ == "__main__":
    main()
