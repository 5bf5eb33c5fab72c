"""Decode logits to texts, and count character errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def ctc_texts(logits: np.ndarray, columns: Sequence[int], alphabet: str) -> list[str]:
    """Decode greedily: take the best class of each column, merge repetitions, drop blanks (the last class).

    Args:
        logits: ``[batch, columns, classes]``.
        columns: ``[batch]``, number of valid columns in each row.
        alphabet: a character's class is its index in this string.
    """
    texts = []
    for row, count in zip(logits.argmax(axis=-1), columns):
        best = row[:count]
        begins = np.concatenate([[True], best[1:] != best[:-1]])
        texts.append("".join(alphabet[k] for k in best[begins[: len(best)]] if k < len(alphabet)))
    return texts


def position_texts(logits: np.ndarray, alphabet: str) -> list[str]:
    """Decode each position up to the end symbol (the last class). Logits: ``[batch, length, classes]``."""
    texts = []
    for row in logits.argmax(axis=-1):
        ends = np.flatnonzero(row == len(alphabet))
        texts.append("".join(alphabet[k] for k in row[: ends[0] if len(ends) else None]))
    return texts


def character_errors(read: str, text: str) -> int:
    """Return the Levenshtein distance: the fewest insertions, deletions and replacements between two texts."""
    previous = list(range(len(text) + 1))
    for i, character in enumerate(read, start=1):
        current = [i]
        for j, expected in enumerate(text, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (character != expected)))
        previous = current
    return previous[-1]


def character_error_rate(read: Iterable[str], texts: Sequence[str]) -> float:
    """Return the character errors of all texts, divided by their characters."""
    return sum(map(character_errors, read, texts)) / sum(map(len, texts))
