"""What one device would compute, in NumPy and float64, position by position. Shares no code with distpad."""

from __future__ import annotations

import numpy as np

FEATURES, CLASSES = 5, 4


def rows_of(replica: int, scenario: str, replicas: int, seed: int = 0) -> list[dict]:
    """A replica's rows: features [n, F], labels [n], weights [n]; every replica's are its own."""
    random = np.random.default_rng([seed, replica])
    count = int(random.integers(1, 5))
    if scenario == "empty replica" and replica == replicas - 1:
        count = 0
    rows = []
    for _ in range(count):
        n = int(random.integers(0, 7))
        if scenario == "all padding" or (scenario == "padding replica" and replica == 0):
            n = 0
        rows.append(
            {
                "x": random.normal(size=[n, FEATURES]),
                "y": random.integers(0, CLASSES, size=n),
                "w": random.choice([0.0, 0.5, 1.0, 3.0], size=n),
            }
        )
    return rows


def weights(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng([seed, 99])
    return random.normal(size=[FEATURES, CLASSES]), random.normal(size=[CLASSES])


def cross_entropy(rows: list[dict], kernel: np.ndarray, bias: np.ndarray, average, weighted: bool):
    """The mean cross-entropy over all rows, and its gradients by kernel and bias."""
    total, tokens, sequences = 0.0, 0.0, 0
    d_kernel, d_bias = np.zeros_like(kernel), np.zeros_like(bias)
    for row in rows:
        row_w = row["w"] if weighted else np.ones(len(row["y"]))
        if row_w.sum() > 0:
            sequences += 1
        tokens += row_w.sum()
        scale = 1 / row_w.sum() if average == "sequence_mean" and row_w.sum() > 0 else 1.0
        for x, y, w in zip(row["x"], row["y"], row_w):
            logits = x @ kernel + bias
            shifted = np.exp(logits - logits.max())
            p = shifted / shifted.sum()
            total += -np.log(p[y]) * w * scale
            error = (p - np.eye(CLASSES)[y]) * w * scale
            d_kernel += np.outer(x, error)
            d_bias += error
    count = {"token": tokens, "sequence_sum": sequences, "sequence_mean": sequences}.get(average, average)
    if not count:
        return 0.0, np.zeros_like(kernel), np.zeros_like(bias)
    return total / count, d_kernel / count, d_bias / count


def padded(rows: list[dict], dtype: str, *, beyond: int = 2) -> dict[str, np.ndarray]:
    """One replica's batch, padded to its own longest row and a little beyond; labels out of range where padded."""
    width = max([len(row["y"]) for row in rows], default=0) + beyond
    batch = {
        "x": np.zeros([len(rows), width, FEATURES], dtype),
        "y": np.full([len(rows), width], -99, np.int32),
        "w": np.full([len(rows), width], 7.0, dtype),
        "lengths": np.array([len(row["y"]) for row in rows], np.int32),
    }
    for i, row in enumerate(rows):
        n = len(row["y"])
        batch["x"][i, :n], batch["y"][i, :n], batch["w"][i, :n] = row["x"], row["y"], row["w"]
    batch["mask"] = np.arange(width) < batch["lengths"][:, None]
    return batch


def relative_error(found, expected) -> float:
    """max|g - g*| / max|g*|, as one variable's figure."""
    scale = np.max(np.abs(expected))
    return float(np.max(np.abs(np.asarray(found, np.float64) - expected)) / (scale if scale > 0 else 1.0))
