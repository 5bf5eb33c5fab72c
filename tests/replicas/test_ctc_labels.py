"""distpad.CTC: labels, lengths and frames out of range raise on all replicas; values, dtypes, XLA."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle
from distpad import backends
from replica_world import alone

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

pytestmark = pytest.mark.worlds("mirrored:2")
CLASSES, FRAMES, WIDTH = 5, 7, 3


def batch_of(replica, blank, **changed):
    """Return three rows with one spare frame; ``changed`` replaces parts of the last replica's second row."""
    random = np.random.default_rng([43, replica])
    letters = [c for c in range(CLASSES) if c != blank % CLASSES]
    labels = np.array([[letters[0], letters[0], -9], [letters[1], letters[2], letters[3]], [letters[1], 99, 99]])
    batch = {
        "labels": labels,
        "lengths": np.array([2, 3, 1]),
        "frames": np.array([4, 6, 3]),
        "logits": random.normal(size=[3, FRAMES, CLASSES]).astype("float32"),
        "counts": np.array([True, True, True]),
    }
    for name, row in changed.items():
        batch[name][1] = row
    return batch


def loss_of(loss_fn, batch, **options):
    y_true = (batch["labels"], batch["lengths"], batch["frames"])
    return loss_fn(y_true, batch["logits"], lengths=batch["lengths"], mask=batch["counts"], **options)


def made(world, blank, **options):
    loss = distpad.CTC(blank_index=blank, **options)
    return distpad.DistributedLoss(loss, per="sequence", average="sequence_sum", backend=world.backend)


# The faults of a row: the change, the message and the evidence, for any blank.
def faults(blank):
    letters = [c for c in range(CLASSES) if c != blank % CLASSES]
    first, second, last = letters[:3]
    none = "a label holds a class that the logits do not have"
    return {
        "class": ({"labels": [first, CLASSES, 9]}, none, (1, CLASSES, CLASSES)),
        "negative class": ({"labels": [first, second, -2]}, none, (1, -2, CLASSES)),
        "blank": ({"labels": [first, blank % CLASSES, last]}, "a label holds the blank", (1, 1, blank % CLASSES)),
        "long": ({"lengths": WIDTH + 1}, "a label length is out of range", (1, WIDTH + 1, WIDTH)),
        "negative length": ({"lengths": -1}, "a label length is out of range", (1, -1, WIDTH)),
        "far": ({"frames": FRAMES + 1}, "frames are out of range", (1, FRAMES + 1, FRAMES)),
        "negative frames": ({"frames": -3}, "frames are out of range", (1, -3, FRAMES)),
        "short": ({"frames": 2}, "a label needs more frames than the logits have", (1, 3, 2)),
    }


KINDS = tuple(faults(0))


def given(world, blank, kind):
    """Only the last replica has the fault."""
    changed = faults(blank)[kind][0]
    return lambda r: batch_of(r, blank, **(changed if r == world.num_replicas - 1 else {}))


def without_lengths(loss_fn, batch, **options):
    """Without ``lengths`` for the loss, only the checks of CTC can fail."""
    y_true = (batch["labels"], batch["lengths"], batch["frames"])
    return loss_fn(y_true, batch["logits"], mask=batch["counts"], **options)


@pytest.mark.worlds("mirrored:2", "horovod:2")  # within a process, and between processes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "blank", [0, pytest.param(-1, marks=pytest.mark.wide), pytest.param(2, marks=pytest.mark.wide)]
)
def test_a_wrong_row_is_refused_on_all_replicas(world, kind, blank):
    _, text, found = faults(blank)[kind]
    loss_fn, last = made(world, blank), world.num_replicas - 1
    with pytest.raises(ValueError, match=text) as raised:
        world.run(lambda batch: without_lengths(loss_fn, batch), given(world, blank, kind), graph=False)
    assert f"{last}→({', '.join(map(str, found))})." in str(raised.value)
    assert world.run(lambda batch: without_lengths(loss_fn, batch), lambda r: batch_of(r, blank), graph=False)


@pytest.mark.parametrize("kind", ["class", *(pytest.param(kind, marks=pytest.mark.wide) for kind in KINDS[1:])])
def test_a_wrong_row_is_refused_in_a_graph(world, kind):
    _, text, found = faults(0)[kind]
    loss_fn = made(world, 0)
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"{text}.*{' '.join(map(str, found))}"):
        world.run(lambda batch: without_lengths(loss_fn, batch), given(world, 0, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_row_is_refused_under_a_denominator(world, kind):
    """The replica with the row raises, since the step has no all-gather."""
    _, text, found = faults(0)[kind]
    loss = distpad.CTC(blank_index=0)
    loss_fn = distpad.DistributedLoss(loss, per="sequence", average="sequence_sum", backend="local")
    batch = given(world, 0, kind)(world.num_replicas - 1)
    with pytest.raises(ValueError, match=text) as raised:
        backends.run_alone(lambda: without_lengths(loss_fn, batch, denominator=3))
    assert f"({', '.join(map(str, found))})." in str(raised.value)


@pytest.mark.parametrize("kind", ["class", "far", pytest.param("blank", marks=pytest.mark.wide)])
def test_leaving_out_hides_no_other_fault(world, kind):
    loss_fn = made(world, 0, too_long="leave_out")
    with pytest.raises(ValueError, match=faults(0)[kind][1]):
        world.run(lambda batch: without_lengths(loss_fn, batch), given(world, 0, kind), graph=False)


@pytest.mark.parametrize("by", ["mask", "sample_weight"])
def test_rows_that_do_not_count_are_not_checked(world, by):
    """Faults in rows that do not count change no bit of the value and the gradient."""
    loss_fn = made(world, 0)
    counts = np.array([True, True, True] + [False] * len(KINDS))

    def step(batch):
        options = {"mask": counts} if by == "mask" else {"sample_weight": tf.cast(counts, tf.float32)}
        with tf.GradientTape() as tape:
            tape.watch(batch["logits"])
            y_true = (batch["labels"], batch["lengths"], batch["frames"])
            loss = loss_fn(y_true, batch["logits"], **options)
        return loss, tape.gradient(loss, batch["logits"])

    def with_rows(r, wrong):
        rows = [batch_of(r, 0, **(change if wrong else {})) for change, *_ in faults(0).values()]
        return {name: np.concatenate([part, [row[name][1] for row in rows]]) for name, part in batch_of(r, 0).items()}

    found = world.run(step, lambda r: with_rows(r, True), graph=False)
    wanted = world.run(step, lambda r: with_rows(r, False), graph=False)
    for r in wanted:
        np.testing.assert_array_equal(found[r][0], wanted[r][0])
        np.testing.assert_array_equal(found[r][1], wanted[r][1])
        assert np.isfinite(found[r][0]) and np.all(np.any(found[r][1][:3], axis=(1, 2))) and not np.any(found[r][1][3:])


def test_rows_of_length_0_are_not_checked(world):
    """Rows of length 0 are filler rows, unless a mask makes empty texts count."""
    loss_fn = made(world, 0)

    def step(batch):
        y_true = (batch["labels"], batch["lengths"], batch["frames"])
        return loss_fn(y_true, batch["logits"], lengths=batch["lengths"])

    filler = lambda r: batch_of(r, 0, lengths=0, frames=-1, labels=[-1, -1, -1])
    assert all(np.isfinite(value) for value in world.run(step, filler, graph=False).values())


@pytest.mark.parametrize("names", [("labels",), ("frames",), ("labels", "lengths", "counts")])
def test_numbers_of_rows_that_differ(world, names):
    """With static and with dynamic shapes."""
    loss_fn = made(world, 0)

    def more(r):
        batch = batch_of(r, 0)
        if r == world.num_replicas - 1:
            batch |= {name: np.concatenate([batch[name], batch[name][:1]]) for name in names}
        return batch

    with pytest.raises(ValueError, match=r"shape \(4,( 3)?.*expected size 3 on axis 0"):
        world.run(lambda batch: without_lengths(loss_fn, batch), more, graph=False)


def test_a_blank_that_the_logits_do_not_have(world):
    loss_fn = made(world, CLASSES)
    with pytest.raises(ValueError, match=r"blank_index is no class of the logits.*\(5, 5\)"):
        world.run(lambda batch: without_lengths(loss_fn, batch), lambda r: batch_of(r, 0), graph=False)


def test_the_first_of_several_wrong_rows(world):
    """The message is that of the first replica with an error."""
    loss_fn, last = made(world, 0), world.num_replicas - 1

    def several(r):
        batch = batch_of(r, 0)
        batch["labels"][1:, 0] = [7, 8]
        if r == last:
            batch["frames"][2] = 90
        return batch

    text = r"a label holds a class.*0→\(1, 7, 5\)" if last else r"frames are out of range.*0→\(2, 90, 7\)\."
    with pytest.raises(ValueError, match=text):
        world.run(lambda batch: without_lengths(loss_fn, batch), several, graph=False)


# -- values and gradients ---------------------------------------------------------------------------------------------


def by_paths(logits, text, blank):
    """Return -log p and its gradient towards the logits ``[frames, classes]``, in float64, from all paths."""
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    total, through = 0.0, np.zeros_like(odds)
    for path in np.ndindex(*[odds.shape[1]] * len(odds)):
        merged = [c for i, c in enumerate(path) if i == 0 or c != path[i - 1]]
        if [c for c in merged if c != blank] == list(text):
            chance = np.prod([odds[t, c] for t, c in enumerate(path)])
            total += chance
            for t, c in enumerate(path):
                through[t, c] += chance
    return -np.log(total), odds - through / total


TEXTS = [[1, 1], [], [2, 1, 2], [1], [2, 2, 2]]
SPARE = [0, 2, 0, 3, 0]


def small(blank, scale=1.0, dtype=np.float64):
    """Return texts of 3 classes with repeated letters and an empty text, with the least number of frames."""
    random = np.random.default_rng(44)
    letter = {1: (blank + 1) % 3, 2: (blank + 2) % 3}
    texts = [[letter[c] for c in text] for text in TEXTS]
    frames = [len(t) + sum(a == b for a, b in zip(t, t[1:])) + spare for t, spare in zip(texts, SPARE)]
    logits = scale * random.normal(size=[len(texts), max(frames) + 1, 3])
    labels = np.array([[*text, *[77] * (4 - len(text))] for text in texts])
    y_true = (labels, np.array(list(map(len, texts))), np.array(frames))
    return texts, y_true, tf.cast(logits, dtype)


def value_and_gradient(loss, y_true, logits):
    with tf.GradientTape() as tape:
        tape.watch(logits)
        losses = loss(y_true, logits)
        total = tf.reduce_sum(losses * (1.0 + tf.range(losses.shape[0], dtype=losses.dtype)))
    return losses, tape.gradient(total, logits)


def check_against_paths(blank, scale, dtype, compiled=False):
    texts, y_true, logits = small(blank, scale, dtype)
    loss = distpad.CTC(blank_index=blank)
    ask = lambda logits: value_and_gradient(loss, tuple(map(tf.constant, y_true)), logits)
    losses, gradient = (tf.function(ask, jit_compile=True) if compiled else ask)(logits)
    assert losses.dtype == (tf.float64 if dtype == tf.float64 else tf.float32)
    tolerance = {tf.float64: 1e-12, tf.float32: 1e-5}.get(dtype, 2e-2)
    for i, (text, frames) in enumerate(zip(texts, y_true[2])):
        value, wanted = by_paths(tf.cast(logits[i, :frames], tf.float64).numpy(), text, blank)
        assert abs(float(losses[i]) - value) <= min(tolerance, 1e-5) * max(abs(value), 1)
        found = tf.cast(gradient[i], tf.float64).numpy()
        assert oracle.relative_error(found[:frames], (1 + i) * wanted) <= tolerance
        assert not np.any(found[frames:])


@pytest.mark.worlds("mirrored:2")  # of one device
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_value_and_gradient_are_those_of_all_paths(dtype):
    for blank in (0, 1, 2):
        check_against_paths(blank, 1.0, dtype)


@pytest.mark.worlds("mirrored:2")  # of one device
def test_unlikely_texts_keep_their_digits():
    check_against_paths(1, 40.0, tf.float64)
    check_against_paths(1, 40.0, tf.float32)


@pytest.mark.worlds("mirrored:2")  # of one device
@pytest.mark.parametrize("blank", [1, pytest.param(0, marks=pytest.mark.wide)])
def test_it_compiles(blank):
    check_against_paths(blank, 1.0, tf.float32, compiled=True)


@pytest.mark.worlds("mirrored:2")  # of one device
def test_a_long_sequence_as_tensorflow_computes_it():
    """Compare with tf.nn.ctc_loss for sparse labels, in float32 and float64."""
    random = np.random.default_rng(45)
    logits, labels = random.normal(size=[4, 300, 20]), random.integers(1, 20, [4, 90])
    lengths, frames = np.array([90, 1, 40, 89], np.int32), np.array([300, 300, 150, 250], np.int32)
    values = [
        value_and_gradient(distpad.CTC(blank_index=0), (labels, lengths, frames), tf.constant(logits, dtype))
        for dtype in (tf.float32, tf.float64)
    ]
    sparse = tf.RaggedTensor.from_tensor(labels.astype("int32"), lengths).to_sparse()
    kernel = lambda _, logits: tf.nn.ctc_loss(sparse, logits, None, frames, logits_time_major=False, blank_index=0)
    wanted, gradient = value_and_gradient(kernel, None, tf.constant(logits, tf.float32))
    assert oracle.relative_error(values[1][0], wanted) <= 1e-6
    assert oracle.relative_error(values[1][1], gradient) <= 1e-3  # the kernel's rounding
    assert oracle.relative_error(values[0][0], values[1][0]) <= 1e-6
    assert oracle.relative_error(values[0][1], values[1][1]) <= 1e-3


@pytest.mark.worlds("mirrored:2")  # of one device
@pytest.mark.parametrize(
    "dtypes", [("uint8", "int64", "int32"), ("int64", "uint8", "uint16"), ("int8", "int32", "uint64")]
)
def test_labels_of_any_integer_dtype(dtypes):
    _, y_true, logits = small(0)
    wanted = distpad.CTC(blank_index=0)(y_true, logits)
    converted = tuple(part.astype(dtype) for part, dtype in zip(y_true, dtypes))
    np.testing.assert_array_equal(distpad.CTC(blank_index=0)(converted, logits), wanted)


@pytest.mark.worlds("mirrored:2")  # of one device
@alone
def test_integers_do_not_wrap():
    """Class 2**32 + 1 does not become class 1."""
    loss_fn = distpad.DistributedLoss(
        distpad.CTC(blank_index=0), per="sequence", average="sequence_sum", backend="local"
    )
    y_true = (np.array([[2**32 + 1]]), np.array([1]), np.array([2]))
    with pytest.raises(ValueError, match="a label holds a class that the logits do not have"):
        loss_fn(y_true, tf.zeros([1, 2, 3]))


@pytest.mark.worlds("mirrored:2")  # of one device
def test_degenerate_batches():
    ctc = distpad.CTC(blank_index=-1)
    int32 = lambda *shape: np.zeros(shape, np.int32)
    empty = ctc((int32(2, 0), int32(2), np.array([2, 1])), tf.zeros([2, 2, 4]))
    np.testing.assert_allclose(empty, np.log(4) * np.array([2, 1]), rtol=1e-6)
    one_class = ctc((int32(2, 3), int32(2), np.array([2, 0])), tf.ones([2, 2, 1]))
    np.testing.assert_array_equal(one_class, [0, 0])
    no_frames = ctc((int32(2, 1), int32(2), int32(2)), tf.zeros([2, 0, 4]))
    np.testing.assert_array_equal(no_frames, [0, 0])
    for logits in (tf.zeros([0, 3, 4]), tf.zeros([0, 0, 4])):
        losses, gradient = value_and_gradient(ctc, (int32(0, 2), int32(0), int32(0)), logits)
        assert losses.shape == [0] and gradient.shape == logits.shape


@pytest.mark.worlds("mirrored:2")  # of one device
@pytest.mark.parametrize("compiled", [False, True])
def test_by_itself_a_wrong_row_gives_nan(compiled):
    batch = batch_of(0, 0, labels=[1, CLASSES, 1])
    loss = distpad.CTC(blank_index=0)
    ask = lambda logits: value_and_gradient(loss, (batch["labels"], batch["lengths"], batch["frames"]), logits)
    losses, _ = tf.function(ask, jit_compile=compiled)(tf.constant(batch["logits"]))
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False])


@pytest.mark.worlds("mirrored:2")  # of one device
def test_a_class_that_is_impossible():
    """A logit of -inf gives infinity, as in TensorFlow, NaN gives NaN, and the other rows stay unchanged."""
    batch = batch_of(0, 0)
    wanted, _ = value_and_gradient(
        distpad.CTC(blank_index=0),
        parts := (batch["labels"], batch["lengths"], batch["frames"]),
        tf.constant(batch["logits"]),
    )
    batch["logits"][1, :, 2] = -np.inf
    batch["logits"][2, 0] = np.nan
    found, gradient = value_and_gradient(distpad.CTC(blank_index=0), parts, tf.constant(batch["logits"]))
    assert found[0] == wanted[0] and np.isposinf(found[1]) and np.isnan(found[2])
    assert np.all(np.isfinite(gradient[0])) and np.all(np.isnan(gradient[2, 0]))


@pytest.mark.worlds("mirrored:2")  # of one device
@alone
def test_logits_of_unknown_sizes():
    """One trace serves all shapes; different numbers of rows are an error of the run."""
    ctc = distpad.CTC(blank_index=0)
    loss_fn = distpad.DistributedLoss(ctc, per="sequence", average="sequence_sum", backend="local")
    specs = [tf.TensorSpec([None, None], tf.int64), tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.int64)]

    @tf.function(input_signature=[*specs, tf.TensorSpec([None, None, None])])
    def asked(labels, lengths, frames, logits):
        return loss_fn((labels, lengths, frames), logits, mask=tf.ones_like(lengths, tf.bool))

    for rows in (3, 2):
        batch = {name: tf.constant(part[:rows]) for name, part in batch_of(0, 0).items()}
        wanted = without_lengths(loss_fn, batch)
        parts = [batch[name] for name in ("labels", "lengths", "frames", "logits")]
        np.testing.assert_allclose(asked(*parts), wanted, rtol=1e-5)
    for i in range(3):
        fewer = [part[:1] if i == j else part for j, part in enumerate(parts)]
        with pytest.raises(
            tf.errors.InvalidArgumentError, match=r"y_true and y_pred have different numbers of rows|do not match"
        ):
            asked(*fewer)


@pytest.mark.worlds("mirrored:2")  # of one device
@pytest.mark.parametrize("denominator", [pytest.param(None, marks=pytest.mark.wide), 3])
@alone
def test_its_distributed_loss_compiles(denominator):
    ctc = distpad.CTC(blank_index=0)
    loss_fn = distpad.DistributedLoss(ctc, per="sequence", average="sequence_sum", backend="local")
    batch = {name: tf.constant(part) for name, part in batch_of(0, 0).items()}

    def ask(logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = loss_of(loss_fn, {**batch, "logits": logits}, denominator=denominator)
        return loss, tape.gradient(loss, logits)

    loss, gradient = tf.function(ask, jit_compile=True)(batch["logits"])
    wanted, of_wanted = ask(batch["logits"])
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert oracle.relative_error(gradient, of_wanted) <= 1e-5
