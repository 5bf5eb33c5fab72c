"""From logits to texts, and how wrong they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def ctc_texts(logits: np.ndarray, columns: Sequence[int], alphabet: str) -> list[str]:
    """Greedy decoding: the best class of each column, repetitions merged, blanks (the last class) left out.

    Args:
        logits: ``[batch, columns, classes]``.
        columns: ``[batch]``, how many of each row's columns are real.
        alphabet: a character's class is its place here.
    """
    texts = []
    for row, count in zip(logits.argmax(axis=-1), columns):
        best = row[:count]
        begins = np.concatenate([[True], best[1:] != best[:-1]])
        texts.append("".join(alphabet[k] for k in best[begins[: len(best)]] if k < len(alphabet)))
    return texts


def position_texts(logits: np.ndarray, alphabet: str) -> list[str]:
    """The best class of each position up to the end symbol (the last class); logits ``[batch, length, classes]``."""
    texts = []
    for row in logits.argmax(axis=-1):
        ends = np.flatnonzero(row == len(alphabet))
        texts.append("".join(alphabet[k] for k in row[: ends[0] if len(ends) else None]))
    return texts


def character_errors(read: str, text: str) -> int:
    """The fewest insertions, deletions and replacements that turn one text into the other (Levenshtein)."""
    previous = list(range(len(text) + 1))
    for i, character in enumerate(read, start=1):
        current = [i]
        for j, expected in enumerate(text, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (character != expected)))
        previous = current
    return previous[-1]


def character_error_rate(read: Iterable[str], texts: Sequence[str]) -> float:
    """Character errors over characters, of all texts together."""
    return sum(map(character_errors, read, texts)) / sum(map(len, texts))
