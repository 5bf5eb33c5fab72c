"""distpad.metrics: what plain Python finds on the whole data set, however it was dealt to the replicas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

import distpad
from distpad import metrics

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

CLASSES, STEPS = 4, 2
LETTERS = ["a", "é", " ", "字"]  # one for each class


# -- the data set, and what is right ---------------------------------------------------------------------------------


def examples(replica, step, replicas):
    """One replica's rows in one step: none on the last of several replicas in the second step."""
    random = np.random.default_rng([71, replica, step])
    count = 0 if step and replicas > 1 and replica == replicas - 1 else int(random.integers(2, 6))
    rows = []
    for _ in range(count):
        n, m = int(random.integers(0, 5)) if rows else 3, int(random.integers(0, 6))
        labels = random.integers(0, CLASSES, n)
        rows.append(
            {
                "y": labels,
                "z": random.normal(size=[n, CLASSES]) + 2.5 * np.eye(CLASSES)[labels],
                "w": random.choice([0.0, 0.5, 3.0], n),
                "row_w": random.choice([0.5, 1.0, 3.0]),
                "guess": random.integers(0, CLASSES, m),
            }
        )
    return rows


def everything(replicas, steps=range(STEPS)):
    return [row for step in steps for replica in range(replicas) for row in examples(replica, step, replicas)]


def padded(rows, dtype="float64"):
    """A replica's batch; NaN, labels out of range and weights where nothing counts."""
    width, wide = (max([len(row[key]) for row in rows], default=0) + 2 for key in ("y", "guess"))
    batch = {
        "y": np.full([len(rows), width], -99),
        "z": np.full([len(rows), width, CLASSES], np.nan),
        "w": np.full([len(rows), width], 7.0),
        "guess": np.full([len(rows), wide], 1 << 40),
        "row_w": np.array([row["row_w"] for row in rows], np.float64),
        "lengths": np.array([len(row["y"]) for row in rows], np.int32),
        "guess_lengths": np.array([len(row["guess"]) for row in rows], np.int32),
    }
    for i, row in enumerate(rows):
        for key in ("y", "z", "w", "guess"):
            batch[key][i, : len(row[key])] = row[key]
    batch["z"] = tf.cast(batch["z"], dtype)
    return batch


def rounded(rows, dtype):
    return [{**row, "z": tf.cast(tf.cast(row["z"], dtype), tf.float64).numpy()} for row in rows]


def positions(rows, weighted):
    for row in rows:
        for y, z, w in zip(row["y"], row["z"], row["w"]):
            yield y, z, w if weighted else 1.0


def mean_of(rows, value, weighted=False):
    total = count = 0.0
    for y, z, w in positions(rows, weighted):
        total, count = total + w * value(y, z), count + w
    return total / count


def cross_entropy(y, z):
    return math.log(sum(math.exp(each - max(z)) for each in z)) + max(z) - z[y]


def right(y, z):
    return float(max(range(CLASSES), key=lambda i: z[i]) == y)


def edit_distance(found, wanted):
    """Levenshtein's, one row of the table after the other."""
    row = list(range(len(wanted) + 1))
    for i, have in enumerate(found, 1):
        before, row = row, [i]
        for j, want in enumerate(wanted, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (have != want)))
    return row[-1]


def error_rate(pairs):
    """Of (found, wanted, weight)."""
    pairs = list(pairs)
    return sum(w * edit_distance(f, t) for f, t, w in pairs) / sum(w * len(t) for _, t, w in pairs)


def whole_sequences(rows, weighted=False):
    total = count = 0.0
    for row in rows:
        if len(row["y"]):
            w = row["row_w"] if weighted else 1.0
            total, count = total + w * all(right(y, z) for y, z in zip(row["y"], row["z"])), count + w
    return total / count


def text(ids):
    return "".join(LETTERS[i] for i in ids)


def largest(row):
    return [int(np.argmax(z)) for z in row["z"]]


def largest_by_labels(rows):
    return error_rate((largest(row), row["y"], 1) for row in rows)


def value(y_true, y_pred):
    return y_pred[..., 0] * tf.cast(y_true + 1, y_pred.dtype)


def with_lengths(metric, batch):
    metric.update_state(batch["y"], batch["z"], lengths=batch["lengths"])


def with_weights(metric, batch):
    metric.update_state(batch["y"], batch["z"], batch["w"], lengths=batch["lengths"])


def with_row_weights(metric, batch):
    metric.update_state(batch["y"], batch["z"], batch["row_w"], lengths=batch["lengths"])


def with_mask(metric, batch):
    metric.update_state(batch["y"], batch["z"], mask=tf.sequence_mask(batch["lengths"], tf.shape(batch["y"])[1]))


def with_padding_value(metric, batch):
    metric.update_state(batch["y"], batch["z"])


def with_chances(metric, batch):
    metric.update_state(batch["y"], tf.nn.softmax(batch["z"]), lengths=batch["lengths"])


def with_one_hot(metric, batch):
    metric.update_state(tf.one_hot(batch["y"], CLASSES), batch["z"], lengths=batch["lengths"])


def with_guesses(metric, batch):
    metric.update_state(batch["y"], batch["guess"], lengths=batch["lengths"], prediction_lengths=batch["guess_lengths"])


def with_sparse_guesses(metric, batch):
    guesses = tf.RaggedTensor.from_tensor(batch["guess"], batch["guess_lengths"]).to_sparse()
    metric.update_state(batch["y"], guesses, batch["row_w"], lengths=batch["lengths"])


def with_texts(metric, batch):
    def texts(ids, lengths):
        letters = tf.gather(LETTERS, tf.RaggedTensor.from_tensor(ids, lengths))
        return tf.strings.reduce_join(letters, axis=1)

    metric.update_state(
        texts(batch["y"], batch["lengths"]), texts(batch["guess"], batch["guess_lengths"]), lengths=batch["lengths"]
    )


def guesses(rows, weighted=False):
    return ((row["guess"], row["y"], row["row_w"] if weighted else 1) for row in rows if len(row["y"]))


CASES = {
    "mean": (lambda: metrics.MaskedMean(value), with_lengths, lambda rows: mean_of(rows, lambda y, z: z[0] * (y + 1))),
    "mean, weighted": (
        lambda: metrics.MaskedMean(value),
        with_weights,
        lambda rows: mean_of(rows, lambda y, z: z[0] * (y + 1), weighted=True),
    ),
    "mean of vectors": (
        metrics.MaskedMean,
        with_mask,
        lambda rows: mean_of(rows, lambda y, z: sum(z) / CLASSES),
    ),
    "tokens": (metrics.TokenAccuracy, with_lengths, lambda rows: mean_of(rows, right)),
    "tokens, weighted": (metrics.TokenAccuracy, with_weights, lambda rows: mean_of(rows, right, weighted=True)),
    "tokens, mask": (metrics.TokenAccuracy, with_mask, lambda rows: mean_of(rows, right)),
    "tokens, one-hot": (metrics.TokenAccuracy, with_one_hot, lambda rows: mean_of(rows, right)),
    "sequences": (metrics.SequenceAccuracy, with_lengths, whole_sequences),
    "sequences, weighted": (
        metrics.SequenceAccuracy,
        with_row_weights,
        lambda rows: whole_sequences(rows, weighted=True),
    ),
    "sequences, padding_value": (
        lambda: metrics.SequenceAccuracy(padding_value=-99),
        with_padding_value,
        whole_sequences,
    ),
    "perplexity": (
        lambda: metrics.Perplexity(from_logits=True),
        with_lengths,
        lambda rows: math.exp(mean_of(rows, cross_entropy)),
    ),
    "perplexity, weighted": (
        lambda: metrics.Perplexity(from_logits=True),
        with_weights,
        lambda rows: math.exp(mean_of(rows, cross_entropy, weighted=True)),
    ),
    "perplexity of probabilities": (
        metrics.Perplexity,
        with_chances,
        lambda rows: math.exp(mean_of(rows, cross_entropy)),
    ),
    "characters, scores": (
        metrics.CharacterErrorRate,
        with_lengths,
        largest_by_labels,
    ),
    "characters, ids": (metrics.CharacterErrorRate, with_guesses, lambda rows: error_rate(guesses(rows))),
    "characters, sparse ids, weighted": (
        metrics.CharacterErrorRate,
        with_sparse_guesses,
        lambda rows: error_rate(guesses(rows, weighted=True)),
    ),
    "characters, texts": (
        metrics.CharacterErrorRate,
        with_texts,
        lambda rows: error_rate((text(f), text(t), w) for f, t, w in guesses(rows)),
    ),
    "words": (
        metrics.WordErrorRate,
        with_texts,
        lambda rows: error_rate((text(f).split(), text(t).split(), w) for f, t, w in guesses(rows)),
    ),
}


TRACED = ("mean", "sequences, weighted", "perplexity", "characters, sparse ids, weighted", "words")  # one of each kind


def close(found, wanted, limit=1e-12):
    assert abs(float(found) - wanted) <= limit * abs(wanted), (float(found), wanted)


def all_close(found, rows, limit=1e-12):
    """Each case's value is that of these rows."""
    wanted = {case: CASES[case][2](rows) for case in found}
    assert {c: (float(found[c]), wanted[c]) for c in found if abs(found[c] - wanted[c]) > limit * abs(wanted[c])} == {}


# -- custom loops ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "epochs"),
    [(False, [range(1), range(STEPS)]), pytest.param(True, [range(1, STEPS)], marks=pytest.mark.wide)],
    ids=["eager", "graph"],
)
def test_the_whole_data_set_as_one(world, graph, epochs):
    """Updated in the step by every replica, asked inside and outside, begun again."""
    with world.scope():
        held = {case: make() for case, (make, _, _) in CASES.items() if not graph or case in TRACED}

    def step(batch):
        for case, metric in held.items():
            CASES[case][1](metric, batch)
        asked = ("mean", "perplexity", "words") if graph else held  # tracing takes long
        return {case: held[case].result() for case in asked}

    for steps in epochs:
        for number in steps:
            given = lambda r, number=number: padded(examples(r, number, world.num_replicas))
            for inside in world.run(step, given, graph=graph).values():
                all_close(inside, everything(world.num_replicas, range(steps.start, number + 1)))
        all_close({case: metric.result() for case, metric in held.items()}, everything(world.num_replicas, steps))
        assert all(metric.result().dtype == tf.float64 for metric in held.values())
        for metric in held.values():
            metric.reset_state()
    for metric in held.values():
        assert float(metric.result()) == (1 if isinstance(metric, metrics.Perplexity) else 0)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.core), "float16", "bfloat16"])
def test_narrow_predictions(world, dtype):
    with world.scope():
        held = {case: CASES[case][0]() for case in ("mean", "tokens", "sequences", "perplexity", "characters, scores")}

    def step(batch):
        for case, metric in held.items():
            CASES[case][1](metric, batch)
        return batch["lengths"]

    for number in range(STEPS):
        world.run(step, lambda r, number=number: padded(examples(r, number, world.num_replicas), dtype), graph=False)
    found = {case: metric.result() for case, metric in held.items()}
    all_close(found, rounded(everything(world.num_replicas), dtype), 1e-5)


def test_nothing_valid_anywhere(world):
    with world.scope():
        held = [metrics.TokenAccuracy(), metrics.CharacterErrorRate(), metrics.Perplexity(from_logits=True)]
    nothing = {"y": np.full([2, 3], -99), "z": np.full([2, 3, CLASSES], np.nan), "lengths": np.zeros([2], np.int32)}

    def step(batch):
        for metric in held:
            with_lengths(metric, batch)
        return batch["lengths"]

    world.run(step, lambda _: nothing, graph=False)
    assert [float(metric.result()) for metric in held] == [0, 0, 1]


def test_counts_beyond_what_float32_holds(world):
    """A sum of 2**24 that ones are added to: in float32 it would stay there."""
    with world.scope():
        metric = metrics.TokenAccuracy()
    big = {"y": np.array([[1, 2]]), "z": np.array([[1, 3]]), "w": np.array([[1.0, 2.0**24]])}

    def step(batch):
        metric.update_state(batch["y"], batch["z"], batch["w"])
        for _ in range(5):
            metric.update_state(batch["y"], batch["y"])
        return batch["w"]

    world.run(step, lambda _: big, graph=False)
    close(metric.result(), 11 / (11 + 2**24))


def test_made_outside_the_scope(world):
    """Such a metric would count what one replica saw, or none knows which."""
    if world.kind != "mirrored" or world.num_replicas == 1:
        pytest.skip("needs a strategy that is not detected outside its scope")
    outside = metrics.TokenAccuracy()
    with pytest.raises(ValueError, match=r"TokenAccuracy: made for local, expected strategy.*inside `with strategy"):
        world.run(lambda batch: with_lengths(outside, batch), lambda r: padded(examples(r, 0, 2)), graph=False)
    inside = metrics.TokenAccuracy(backend=world.strategy)
    world.run(
        lambda batch: (with_lengths(inside, batch), batch["w"])[1], lambda r: padded(examples(r, 0, 2)), graph=False
    )
    close(inside.result(), mean_of([row for r in range(world.num_replicas) for row in examples(r, 0, 2)], right))


# -- Keras's loops ----------------------------------------------------------------------------------------------------

COMPILED = {
    "mean": (
        lambda **options: metrics.MaskedMean(value, **options),
        lambda rows: mean_of(rows, lambda y, z: z[0] * (y + 1)),
    ),
    "tokens": (metrics.TokenAccuracy, lambda rows: mean_of(rows, right)),
    "sequences": (metrics.SequenceAccuracy, whole_sequences),
    "perplexity": (
        lambda **options: metrics.Perplexity(from_logits=True, **options),
        lambda rows: math.exp(mean_of(rows, cross_entropy)),
    ),
    "characters": (metrics.CharacterErrorRate, largest_by_labels),
    "words": (metrics.WordErrorRate, largest_by_labels),  # of word ids: the same labels serve all metrics here
}


def keras_rows():
    """Seven, for batches of four: the last one leaves a replica of four without a row. (Keras 3 fails where the first
    batch cannot be dealt evenly.)"""
    random = np.random.default_rng(72)
    rows = []
    for n in (4, 1, 0, 2, 3, 1, 2):
        labels = random.integers(0, CLASSES, n)
        rows.append(
            {"y": labels, "z": random.normal(size=[n, CLASSES]) + 2.5 * np.eye(CLASSES)[labels], "w": np.ones(n)}
        )
    return rounded(rows, "float32")


@pytest.mark.worlds("mirrored:2")
@pytest.mark.parametrize(
    ("mask_by", "graph"),
    [
        pytest.param(mask_by, graph, marks=pytest.mark.wide)  # test_binary_metrics compiles one by default
        for mask_by in ("keras mask", "sample_weight and padding_value")
        for graph in (False, True)
    ],
)
def test_compiled(world, mask_by, graph):
    """fit and evaluate, of which each begins again; under Horovod each rank has rows of its own."""
    rows = keras_rows()
    ranks = world.several_workers and not world.strategy
    dealt = rows[world.backend.worker_index :: world.num_replicas] if ranks else rows
    batch = {"z": np.zeros([len(dealt), 5, CLASSES], "float32"), "y": np.full([len(dealt), 5], -99)}
    for i, row in enumerate(dealt):
        batch["z"][i, : len(row["y"])], batch["y"][i, : len(row["y"])] = row["z"], row["y"]
    columns = [batch["z"], batch["y"]]
    if mask_by != "keras mask":
        columns.append((batch["y"] >= 0).astype("float32"))
    data = tf.data.Dataset.from_tensor_slices(tuple(columns)).batch(-(-len(dealt) // 2) if ranks else 4)
    options = tf.data.Options()
    options.autotune.enabled = False  # see distpad/data/keras.py
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    data = data.with_options(options)
    with world.scope():
        inputs = tf.keras.Input([None, CLASSES])
        masked = tf.keras.layers.Masking()(inputs) if mask_by == "keras mask" else inputs
        dense = tf.keras.layers.Dense(CLASSES, use_bias=False)
        outputs = dense(masked)
        dense.set_weights([np.eye(CLASSES)])
        model = tf.keras.Model(inputs, outputs)
        held = {name: make(name=name) for name, (make, _) in COMPILED.items()}
        given = {"metrics": [*held.values()]}
        if mask_by != "keras mask":  # weights are for weighted metrics alone
            held["tokens"] = metrics.TokenAccuracy(padding_value=-99, name="tokens")
            given = {"metrics": [held.pop("tokens")], "weighted_metrics": [*held.values()]}
        # Keras 2's own mean is NaN on a replica whose rows have no valid position
        loss = distpad.DistributedLoss(lambda y_true, y_pred: tf.reduce_sum(0 * y_pred, axis=-1))
        model.compile(
            loss=loss, optimizer=tf.keras.optimizers.SGD(0.0), jit_compile=False, run_eagerly=not graph, **given
        )
        history = model.fit(data, epochs=2, verbose=0, shuffle=False).history
        found = model.evaluate(data, verbose=0, return_dict=True)
    for name, (_, wanted) in COMPILED.items():
        assert len(history[name]) == 2
        for value in (*history[name], found[name]):
            close(value, wanted(rows), 1e-5)
