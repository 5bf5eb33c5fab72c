"""Pad's side, max_length and truncating, and rows that are ragged within an example, for every kind of source."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
import padding_oracle

COUNT, SIZE = 11, 4
RANDOM = np.random.default_rng(1)


def words_of(count):
    return [RANDOM.integers(1, 100, n).tolist() for n in RANDOM.integers(0, 4, count)]


EXAMPLES = [
    {"words": words, "tags": [len(word) for word in words], "w": RANDOM.random(len(words))}
    for words in map(words_of, (3, 7, 1, 0, 9, 2, 5, 5, 1, 8, 4))
]


class Indexable:
    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return EXAMPLES[index]


class Iterable:
    def __iter__(self):
        return iter(EXAMPLES)


def columns(kind):
    rows = {name: [example[name] for example in EXAMPLES] for name in ("words", "tags")}
    weights = tf.RaggedTensor.from_row_lengths(
        np.concatenate([example["w"] for example in EXAMPLES]), [len(example["w"]) for example in EXAMPLES]
    )
    return {**{name: kind(each, dtype=tf.int64) for name, each in rows.items()}, "w": weights}


def sampled():
    lengths = [len(example["tags"]) for example in EXAMPLES]
    return EXAMPLES, distpad.LengthSampler(lengths, global_batch_size=SIZE, shuffle=False)


SOURCES = {
    "list": lambda: EXAMPLES,
    "arrays in lists": lambda: [{**e, "words": [np.array(word, np.int64) for word in e["words"]]} for e in EXAMPLES],
    "indexable": Indexable,
    "iterable": Iterable,
    "sampler": sampled,
    "tf.data": lambda: tf.data.Dataset.from_tensor_slices(columns(tf.ragged.constant)),
    "Columns of ragged tensors": lambda: distpad.Columns(columns(tf.ragged.constant)),
    "Columns of lists": lambda: distpad.Columns({n: [e[n] for e in EXAMPLES] for n in ("words", "tags", "w")}),
}
OPTIONS = [
    {"side": "pre"},
    {"side": "pre", "max_length": 5, "truncating": "post"},
    {"side": "post", "max_length": 5, "truncating": "pre"},
    {"side": "post", "max_length": 30},
]


def made(source, **options):
    """Batches whose features have these options of Pad."""
    pad = {
        "words": distpad.Pad((0, 1), value=-1, **options),
        "tags": distpad.Pad(**options),
        "w": distpad.Pad(**options),
    }
    size = None if isinstance(source, tuple) else SIZE
    return distpad.PaddedBatches(source, size, padding=pad, tokens="tags", weights="w", buckets=None, backend="local")


def lengths_of(batch, name):
    return np.asarray(getattr(batch.lengths[name], "values", batch.lengths[name])).tolist()


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_source_is_padded_and_cut_as_an_oracle_says(kind, options):
    batches = made(SOURCES[kind](), **options)
    given = {"padding": options["side"], "truncating": options.get("truncating", "post")}
    seen = []
    for batch in batches:
        seen += (indices := batch.indices.numpy()[: int(batch.rows)].tolist())
        rows = [EXAMPLES[i] for i in indices]
        limit = options.get("max_length", 99)
        for name, axes, value in (("words", [0, 1], -1), ("tags", [0], 0), ("w", [0], 0)):
            sequences = [padding_oracle.plain(row[name]) for row in rows]
            width = max(1, max(min(len(each), limit) for each in sequences))
            cut = padding_oracle.cut(sequences, limit, given["truncating"])
            values, lengths, _ = padding_oracle.oracle(cut, axes, length=width, value=value, padding=given["padding"])
            assert batch.data[name].numpy()[: len(rows)].tolist() == values
            assert lengths_of(batch, name)[: len(rows)] == lengths
        cut = padding_oracle.cut([list(row["w"]) for row in rows], limit, given["truncating"])
        assert abs(float(batch.counts.tokens) - sum(map(sum, cut))) < 1e-9
    assert sorted(seen) == [*range(COUNT)] and (seen == sorted(seen) or kind == "sampler")
    lost = [max(len(row["tags"]) - limit, 0) for row in EXAMPLES]
    stats = batches.stats.as_dict()
    assert stats["truncated_positions"] == 3 * sum(lost)  # of three features
    assert stats["truncated_examples"] == sum(n > 0 for n in lost)


@pytest.mark.parametrize("side", ["pre", "post"])
def test_weights_and_masks_for_fit_stand_where_the_rows_do(side):
    batches = made(EXAMPLES, side=side, max_length=5, truncating="pre")
    every = zip(batches.for_keras(x=("tags", distpad.Mask("words")), y="tags"), made(EXAMPLES, side=side))
    for at, ((inputs, _, weights), _) in zip(range(0, COUNT, SIZE), every):
        kept = [row["w"][-5:] for row in EXAMPLES[at : at + SIZE]]
        width = weights.shape[1]
        space = [np.zeros(width - len(row)) for row in kept]
        wanted = [np.concatenate([gap, row] if side == "pre" else [row, gap]) for gap, row in zip(space, kept)]
        wanted += [np.zeros(width)] * (SIZE - len(kept))
        np.testing.assert_allclose(np.asarray(weights), wanted, rtol=1e-6)
        np.testing.assert_array_equal(inputs[1], np.array(wanted) > 0)


def test_filler_rows_repeat_a_row_on_its_side():
    source = [{"x": [1, 2, 3], "y": [1]}, {"x": [4, 5, 6, 7, 8], "y": [1]}, {"x": [9, 9], "y": [1]}]
    padding = {"x": distpad.Pad(side="pre"), "y": distpad.Pad()}
    *_, last = distpad.PaddedBatches(
        source, 2, padding=padding, tokens="y", buckets=distpad.Buckets([4, 8]), backend="local"
    )
    assert last.data["x"].numpy().tolist() == [[0, 0, 9, 9]] * 2
    assert lengths_of(last, "x") == [2, 2] and last.lengths["x"].mask(4).numpy()[1].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("buckets", ["auto", distpad.Buckets([4, 64]), None])
def test_no_batch_is_padded_beyond_max_length(buckets):
    source = [{"y": [1] * n} for n in (3, 30, 70, 50)]
    pad = distpad.Pad(max_length=33, truncating="post")
    for given in (source, (source, distpad.LengthSampler([3, 30, 70, 50], global_batch_size=1, shuffle=False))):
        size = None if isinstance(given, tuple) else 1
        batches = distpad.PaddedBatches(given, size, padding={"y": pad}, tokens="y", buckets=buckets, backend="local")
        widths = [batch.data["y"].shape[1] for batch in batches]
        assert max(widths) == 33 and [float(b.counts.tokens) for b in batches] == [3, 30, 33, 33]


def test_characters_of_words_have_a_mask_of_their_own():
    batch = next(iter(made(EXAMPLES)))
    assert batch.data["words"].shape[:2] == batch.data["tags"].shape
    source = [{"c": [[1, 2], [3]]}, {"c": [[4]]}]
    (batch,) = distpad.PaddedBatches(source, 2, padding={"c": distpad.Pad((0, 1))}, tokens="c", buckets=None)
    assert batch.loss_inputs.sample_weight.numpy().tolist() == [[[1, 1], [1, 0]], [[1, 0], [0, 0]]]
    assert float(batch.counts.tokens) == 4


@pytest.mark.parametrize("side", ["pre", "post"])
def test_images_of_different_sizes_within_an_example(side):
    images = [[RANDOM.random((h, w, 1)) for h, w in RANDOM.integers(1, 5, (n, 2))] for n in (3, 1, 4)]
    source = [{"im": each, "y": [1] * len(each)} for each in images]
    padding = {"im": distpad.Pad((0, 1, 2), side=side), "y": distpad.Pad()}
    (batch,) = distpad.PaddedBatches(source, 3, padding=padding, tokens="y", buckets=None, backend="local")
    wanted = distpad.pad(images, ragged_axes=(0, 1, 2), padding=side).values
    np.testing.assert_array_equal(batch.data["im"], wanted)


# -- refused ----------------------------------------------------------------------------------------------------------


def pre_padded():
    return next(iter(made(EXAMPLES, side="pre")))


@pytest.mark.parametrize(
    "use",
    [
        lambda batch: tf.sequence_mask(batch.lengths["tags"], 5),
        lambda batch: tf.cast(batch.lengths["tags"], tf.int64),
        lambda batch: np.arange(5) < np.asarray(batch.lengths["tags"]),
        lambda batch: distpad.gather(batch.data["tags"], lengths=batch.lengths["tags"], backend="local"),
        lambda batch: distpad.pad_to_global_max(batch.data["tags"], lengths=batch.lengths["tags"], backend="local"),
        lambda batch: distpad.CTC(blank_index=0)(
            (batch.data["tags"], batch.lengths["tags"], [9] * SIZE), tf.zeros([SIZE, 9, 5])
        ),
    ],
)
def test_lengths_of_a_pre_padded_feature_are_refused_where_they_would_be_misread(use):
    with pytest.raises(
        TypeError, match=r"lengths are those of a pre-padded feature.*lengths.mask\(size\) is their mask"
    ):
        use(pre_padded())


def test_for_keras_refuses_them_as_inputs():
    with pytest.raises(ValueError, match=r"x is Lengths\(feature='tags'\), .* Write distpad.Mask\('tags'\)"):
        made(EXAMPLES, side="pre").for_keras(x=distpad.Lengths("tags"), y="tags")


def test_certify_refuses_a_pre_padded_batch():
    source = [{"x": np.ones([n, 2], np.float32), "y": [1] * n} for n in (2, 3)]
    padding = {"x": distpad.Pad(side="pre"), "y": distpad.Pad(side="pre")}
    (batch,) = distpad.PaddedBatches(source, 2, padding=padding, tokens="y", buckets=None, backend="local")
    model = tf.keras.Sequential([tf.keras.Input([None, 2]), tf.keras.layers.Dense(2)])
    with pytest.raises(TypeError, match="with pre-padded features, expected post-padded ones"):
        distpad.certify(model, distpad.DistributedLoss("mse"), batch=batch, backend="local")


@pytest.mark.parametrize(
    ("sides", "match"),
    [(("post", "pre"), "of a pre-padded feature"), (("pre", "post"), "padding of the inputs is Pad")],
)
def test_ctc_refuses_pre_padding_in_fit(sides, match):
    """Labels, and inputs whose frames are the logits'."""
    source = [{"x": np.ones([6, 2], np.float32), "y": np.array([1, 2])}] * 4
    padding = {name: distpad.Pad(side=side) for name, side in zip("xy", sides)}
    batches = distpad.PaddedBatches(source, 2, padding=padding, tokens="y", backend="local")
    ctc = distpad.CTC(blank_index=0, frames_per_step=1)
    model = tf.keras.Sequential([tf.keras.Input([None, 2]), tf.keras.layers.Dense(4)])
    model.compile(loss=distpad.DistributedLoss(ctc, per="sequence"), run_eagerly=True)
    with pytest.raises((TypeError, ValueError), match=match):
        model.fit(batches.for_keras(x="x", y="y"), verbose=0)


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"side": "left"}, ValueError, "side is 'left', expected one of"),
        ({"truncating": "post"}, ValueError, "max_length is None, expected a length to which truncating cuts"),
        ({"max_length": 0}, ValueError, "max_length is 0, expected"),
        ({"max_length": 2.5}, TypeError, "max_length is 2.5, expected"),
        ({"max_length": 5, "truncating": "both"}, ValueError, "truncating is 'both', expected one of"),
    ],
)
def test_wrong_options_are_refused(options, kind, match):
    with pytest.raises(kind, match=f"Pad: {match}"):
        distpad.Pad(**options)


def test_longer_examples_are_an_error_unless_truncating_says_how_to_cut():
    with pytest.raises(ValueError, match=r"the length of 'tags' of example 1 is 7, expected at most max_length=5"):
        list(made(EXAMPLES, max_length=5))


@pytest.mark.parametrize("other", [{"side": "pre"}, {"max_length": 9}, {"max_length": 5, "truncating": "pre"}])
def test_weights_are_padded_as_what_they_weigh(other):
    padding = {"y": distpad.Pad(max_length=5, truncating="post"), "w": distpad.Pad(**other)}
    with pytest.raises(ValueError, match=r"of weights 'w' is .*, expected .*, as of 'y'"):
        distpad.PaddedBatches([], 2, padding=padding, tokens="y", weights="w", backend="local")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([[1, 2], 3], r"'c' of example 1 is of shape \(2,\), expected \(None, None\)"),
        ([[1, 2], ["3"]], r"'c' of example 1 is of dtype object, expected int64"),
        ([[[1], [2]], [[3]]], r"'c' of example 1 is of shape \(2, 2, 1\), expected \(None, None\)"),
    ],
)
def test_ragged_rows_that_differ_are_refused(words, match):
    source = [{"c": [[1, 2], [3]]}, {"c": words}]
    with pytest.raises(ValueError, match=match):
        list(distpad.PaddedBatches(source, 2, padding={"c": distpad.Pad((0, 1))}, tokens="c", backend="local"))
