"""on_error="skip": each example exactly once among those that were yielded and those that were skipped."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad

COUNT = 23
UNREADABLE, MISFITS = {0, 5, 6, 22}, {3: "dtype", 8: "rank", 9: "feature", 13: "weight"}
BAD = UNREADABLE | {*MISFITS}


def example(index, *, damaged=True):
    y = np.full(1 + index % 5, index)
    good = {"y": y, "w": np.ones(len(y), np.float32)}
    return {
        "dtype": {**good, "y": y.astype(np.float32)},
        "rank": {**good, "y": y[:, np.newaxis]},
        "feature": {"y": y},
        "weight": {**good, "w": np.full(len(y), np.nan, np.float32)},
    }.get(MISFITS.get(index, "") if damaged else "", good)


class Indexable:
    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if index in UNREADABLE:
            raise OSError(f"{index} is damaged")
        return example(index)


class ByList(Indexable):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Continues:
    """Its iterator continues after an error."""

    def __len__(self):
        return COUNT

    def __iter__(self):
        return map(Indexable().__getitem__, range(COUNT))


def dataset(damaged=True):
    """Its elements have one dtype and rank: all bad ones cannot be read."""

    def element(index):
        assertion = tf.debugging.Assert(~tf.reduce_any(index == tf.constant([*BAD], tf.int64)), ["damaged"])
        with tf.control_dependencies([assertion]):
            y = tf.repeat(index, 1 + index % 5)
        return {"y": y, "w": tf.ones_like(y, tf.float32)}

    return tf.data.Dataset.range(COUNT).map(element)


def made(source, size=4, **options):
    given = {"padding": {"y": distpad.Pad(), "w": distpad.Pad()}, "tokens": "y", "weights": "w", "buckets": None}
    return distpad.PaddedBatches(source, size, **given, backend="local", **{"on_error": "skip", **options})


def yielded(batches, group=1):
    """The indices of the real rows; the counts are those of each group of micro-batches."""
    found, tokens, wanted = [], [], []
    for batch in batches:
        rows, y = int(batch.rows), np.asarray(batch.data["y"])
        indices = np.asarray(batch.indices)
        assert (y[:rows, 0] == indices[:rows]).all() and (indices[rows:] == -1).all()
        found += indices[:rows].tolist()
        tokens.append(float(batch.counts.tokens))
        wanted.append(sum(1 + i % 5 for i in indices[:rows]))
    assert tokens == np.repeat(np.reshape(wanted, [-1, group]).sum(axis=1), group).tolist()
    return found


SAMPLER = distpad.LengthSampler([1 + i % 5 for i in range(COUNT)], global_batch_size=4, seed=3)
SOURCES = {
    "__getitem__": (lambda: Indexable(), 4, {}),
    "in parallel": (lambda: Indexable(), 4, {"num_parallel_reads": 3}),
    "__getitems__": (lambda: ByList(), 4, {}),
    "an iterable": (lambda: Continues(), 4, {}),
    "tf.data": (dataset, 4, {}),
    "a sampler": (lambda: (Indexable(), SAMPLER), None, {"accumulation_steps": 2}),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_each_example_is_yielded_or_skipped(kind):
    source, size, options = SOURCES[kind]
    group = options.get("accumulation_steps", 1)
    batches = made(source(), size, **options)
    state, found = None, []
    for epoch in (1, 2):
        found = yielded(batches, group)
        skipped = [each.example for each in batches.stats.skipped]
        assert sorted(found) == [i for i in range(COUNT) if i not in BAD]
        assert sorted(skipped) == sorted([*BAD] * epoch) and batches.stats.skipped_examples == len(BAD) * epoch
    assert {each.worker for each in batches.stats.skipped} == {0}
    reasons = {each.example: each.reason for each in batches.stats.skipped}
    assert kind == "tf.data" or ("OSError: 5 is damaged" in reasons[5] and "float32" in reasons[3])
    # resumed in the middle, the others follow
    batches, before = made(source(), size, **options), []
    for number, batch in enumerate(batches):
        before += np.asarray(batch.indices)[: int(batch.rows)].tolist()
        if number == 1:
            state = batches.state_dict()
            break
    early = [each.example for each in batches.stats.skipped]
    again = made(source(), size, **options)
    again.load_state_dict(state)
    assert sorted(before + yielded(again, group)) == sorted(found)
    assert sorted(early + [each.example for each in again.stats.skipped]) == sorted(BAD)


def test_fit_skips_and_its_weights_are_those_of_the_good_examples():
    def weights(batches):
        initializer = tf.keras.initializers.RandomUniform(seed=1)
        model = tf.keras.Sequential([tf.keras.layers.Embedding(COUNT, COUNT, embeddings_initializer=initializer)])
        loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", distpad.DistributedLoss(loss, backend="local"))
        model.fit(batches.for_keras(x="y", y="y"), verbose=0)
        return model.get_weights()

    skipping = made(Indexable(), 1)
    plain = made([example(i) for i in range(COUNT) if i not in BAD], 1, on_error="raise")
    for one, other in zip(weights(skipping), weights(plain)):
        np.testing.assert_array_equal(one, other)
    assert skipping.stats.skipped_examples == len(BAD)


def test_steps_whose_examples_are_all_skipped_are_empty():
    class First(Indexable):
        def __getitem__(self, index):
            if index in range(4, 8):
                raise OSError(index)
            return example(index, damaged=False)

    batches = made(First(), 4)
    assert [int(batch.rows) for batch in batches] == [4, 0, 4, 4, 4, 3]


@pytest.mark.parametrize(("limit", "passes"), [(0, False), (7, False), (8, True), (0.3, False), (0.35, True)])
def test_more_than_the_limit_is_an_error(limit, passes):
    batches = made(Continues(), 4, max_skipped=limit)
    if limit == 0.3:  # ten always may
        batches = made([example(0), *[{"y": 0}] * 11, example(1)], max_skipped=limit)
    if passes:
        assert len(yielded(batches)) == COUNT - len(BAD)
    else:
        with pytest.raises(
            distpad.DistpadError, match=r"of the first \d+ examples .* were skipped .*expected max_skipp"
        ):
            yielded(batches)


def test_all_examples_skipped_is_an_error():
    with pytest.raises(distpad.DistpadError, match="expected some that define the features"):
        yielded(made(type("Gone", (Indexable,), {"__getitem__": lambda *_: 1 / 0})(), max_skipped=1000))


def test_an_iterator_that_its_error_ends_is_an_error():
    class Generator:
        def __iter__(self):
            for index in range(COUNT):
                yield 1 / 0 if index == 4 else example(index)

    with pytest.raises(ValueError, match=r"ended with the error of example 4.*__getitem__") as raised:
        yielded(made(Generator()))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("error", [MemoryError, SystemExit, KeyboardInterrupt])
def test_errors_of_the_process_are_not_skipped(error):
    def fails(_, index):
        if index == 5:
            raise error
        return example(index, damaged=False)

    with pytest.raises(error):
        yielded(made(type("Fails", (Indexable,), {"__getitem__": fails})()))


@pytest.mark.parametrize(("options", "match"), [({"on_error": "ignore"}, "on_error"), ({"max_skipped": -1}, "max_s")])
def test_wrong_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        made([example(1)], **options)
