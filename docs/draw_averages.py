"""Draw docs/img/averages.svg: the gradient error of two ways to average, against the unevenness of lengths.

python docs/draw_averages.py

Each point is the median of 40 random steps of 4 replicas with 8 sequences each, lognormal in length. The model is
linear with a softmax. The error is max|g - g*| / max|g*|, where g* is one device's gradient, in NumPy and float64.
"""

from __future__ import annotations

import pathlib

import matplotlib as mpl
import numpy as np
import tensorflow as tf

import distpad

mpl.use("Agg")
import matplotlib.pyplot as plt

REPLICAS, ROWS, STEPS, LONGEST, FEATURES, CLASSES = 4, 8, 40, 512, 6, 5
UNEVENNESS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # standard deviation over mean of the lengths
PICTURE = pathlib.Path(__file__).with_name("img") / "averages.svg"
OWN, EXACT = "each replica by its own count", "distpad"

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * REPLICAS)
strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(REPLICAS)])
cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits
with strategy.scope():
    kernel = tf.Variable(np.random.default_rng(0).normal(size=[FEATURES, CLASSES]).astype("float32"))
    loss_fn = distpad.DistributedLoss(cross_entropy)


def step_of(random: np.random.Generator, unevenness: float) -> list[tuple[np.ndarray, ...]]:
    """For each replica features, labels and lengths."""
    sigma = np.sqrt(np.log1p(unevenness**2))
    rows = []
    for _ in range(REPLICAS):
        lengths = np.clip(random.lognormal(np.log(20), sigma, ROWS).astype(np.int32), 1, LONGEST)
        x = random.normal(size=[ROWS, LONGEST, FEATURES]).astype("float32")
        rows.append((x, random.integers(0, CLASSES, [ROWS, LONGEST]), lengths))
    return rows


def own_mean(y: tf.Tensor, logits: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    mask = tf.sequence_mask(lengths, LONGEST, tf.float32)
    return tf.reduce_sum(cross_entropy(y, logits) * mask) / tf.reduce_sum(mask) / REPLICAS


def reduced(loss_of) -> tf.types.experimental.GenericFunction:
    """A step that returns the sum of the replicas' gradients, which the optimiser applies."""

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(y, tf.tensordot(x, kernel, 1), lengths)
        return tf.distribute.get_replica_context().all_reduce("sum", tape.gradient(loss, kernel))

    return step


def one_device(rows: list[tuple[np.ndarray, ...]]) -> np.ndarray:
    """The gradient of the mean over all valid positions, in NumPy."""
    total, count = np.zeros([FEATURES, CLASSES]), 0
    for x, y, lengths in rows:
        valid = np.arange(LONGEST) < lengths[:, None]
        features, labels = x[valid].astype("float64"), y[valid]
        exponentials = np.exp(features @ kernel.numpy().astype("float64"))
        slopes = exponentials / exponentials.sum(1, keepdims=True) - np.eye(CLASSES)[labels]
        total, count = total + features.T @ slopes, count + len(labels)
    return total / count


def errors() -> dict[str, list[float]]:
    """For each way the median error at each unevenness."""
    ways = {OWN: reduced(own_mean), EXACT: reduced(lambda y, logits, lengths: loss_fn(y, logits, lengths=lengths))}
    medians: dict[str, list[float]] = {name: [] for name in ways}
    for unevenness in UNEVENNESS:
        random, found = np.random.default_rng(1), {name: [] for name in ways}
        for _ in range(STEPS):
            rows = step_of(random, unevenness)
            wanted = one_device(rows)
            place = lambda context, rows=rows: tuple(map(tf.constant, rows[context.replica_id_in_sync_group]))
            batch = strategy.experimental_distribute_values_from_function(place)
            for name, step in ways.items():
                gradient = strategy.experimental_local_results(strategy.run(step, args=batch))[0].numpy()
                found[name].append(np.abs(gradient - wanted).max() / np.abs(wanted).max())
        for name in ways:
            medians[name].append(float(np.median(found[name])))
        print(f"unevenness {unevenness:.2f}: " + ", ".join(f"{name} {medians[name][-1]:.1e}" for name in ways))
    return medians


def draw(medians: dict[str, list[float]]) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (name, values), colour in zip(medians.items(), ("#c0392b", "#1f6f8b")):
        axes.plot(UNEVENNESS, values, "o-", color=colour, label=name)
    axes.set(
        yscale="log", xlabel="unevenness of lengths: standard deviation / mean", ylabel="gradient error, 4 replicas"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    mpl.rcParams.update({"svg.hashsalt": "distpad", "svg.fonttype": "none"})  # equal numbers, equal picture
    draw(errors())
