"""PaddingStats: the cause of each padded position, the table, and TensorBoard."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

import distpad
from distpad.data.stats import PaddingStats


def test_each_position_counts_once_under_its_first_cause():
    stats = PaddingStats()
    # an image with two ragged axes and a label; two of three rows are real; longest over all replicas: (4, 5) and 6
    stats.add_replica(
        [np.array([[2, 3], [4, 1]]), np.array([[5], [2]])], agreed=(4, 5, 6), sizes=(8, 8, 8), batch_size=3
    )
    real, own, together, boundary, all_rows = (
        2 * 3 + 4 * 1 + 5 + 2,
        2 * 4 * 3 + 2 * 5,
        2 * 4 * 5 + 2 * 6,
        2 * 64 + 2 * 8,
        3 * 72,
    )
    assert stats.real == real
    assert [stats.padding[cause] for cause in ("own_batch", "global_maximum", "buckets", "filler_rows")] == [
        own - real,
        together - own,
        boundary - together,
        all_rows - boundary,
    ]
    assert stats.as_dict()["real_fraction"] == real / all_rows and stats.shapes == {(3, 8, 8, 8)}


def test_the_variation_of_the_count_is_the_standard_deviation_over_the_mean():
    stats, counts = PaddingStats(), np.random.default_rng(0).integers(1, 1000, size=50)
    for count in counts:
        stats.add_group(float(count))
    assert abs(stats.count_variation - counts.std() / counts.mean()) < 1e-12
    assert PaddingStats().count_variation == 0


def test_the_table_shows_every_figure():
    stats = PaddingStats()
    stats.add_replica([np.array([[3], [1]])], agreed=(4,), sizes=(8,), batch_size=4)
    table = str(stats)
    for text in (
        "real positions",
        "longest of the replica's rows",
        "longest of all",
        "boundary",
        "filler rows",
        "waited for the plan",
    ):
        assert sum(text in line for line in table.splitlines()) == 1
    assert "12.5%" in table  # 4 of 32 positions


def test_the_callback_writes_tensorboard_scalars(tmp_path):
    """One scalar for each figure and epoch, in TensorBoard's files."""
    batches = distpad.PaddedBatches(
        [{"y": [1, 2]}, {"y": [3]}], 2, padding={"y": distpad.Pad()}, tokens="y", backend="local"
    )
    model = tf.keras.Sequential([tf.keras.layers.Dense(1)])
    model.compile(loss="mse")
    for _ in batches:
        pass
    model.fit(np.ones([4, 2]), np.ones([4, 1]), epochs=2, verbose=0, callbacks=[batches.stats.callback(str(tmp_path))])
    written = {}
    for path in tmp_path.glob("events.*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                written[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    expected = batches.stats.as_dict()
    assert {tag for tag, _ in written} == {f"distpad/{name}" for name in expected}
    for name, figure in expected.items():
        assert [written[f"distpad/{name}", epoch] for epoch in (0, 1)] == [np.float32(figure)] * 2
