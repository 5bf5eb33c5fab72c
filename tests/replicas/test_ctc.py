"""distpad.CTC: the gradients of one device; labels that are too long raise on all replicas, or are left out."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle
from replica_world import alone

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

FEATURES, CLASSES = 5, 4
KERAS_3 = getattr(tf.keras, "__version__", "2").startswith("3")


def rows_of(replica, blank, short=False):
    """Return texts with repeated letters and an empty text, with the least number of frames.

    With ``short``, the second row of each odd replica, or of the only replica, has one frame less than it needs.
    """
    random = np.random.default_rng([41, replica])
    letters = [c for c in range(CLASSES) if c != blank % CLASSES]
    texts = [[letters[0], letters[1]], [letters[2], letters[2], letters[0]], [], [letters[1]] * (1 + replica)]
    spare = [3, 0, 2, 1]
    rows = []
    for i, (text, more) in enumerate(zip(texts, spare)):
        frames = len(text) + sum(a == b for a, b in zip(text, text[1:])) + more
        if short and i == 1 and replica % 2 == 1:
            frames -= 1
        rows.append({"x": random.normal(size=[frames, FEATURES]), "y": text})
    return rows


def padded(rows, beyond=2):
    """Return one replica's batch, with padding that would change the result if an operation read it."""
    wide, long = (beyond + max(len(row[name]) for row in rows) for name in ("x", "y"))
    return {
        "x": np.stack(
            [np.pad(row["x"], [(0, wide - len(row["x"])), (0, 0)], constant_values=0) for row in rows]
        ).astype("float32"),
        "y": np.array([[*row["y"], *[-7] * (long - len(row["y"]))] for row in rows], np.int32),
        "lengths": np.array([len(row["y"]) for row in rows], np.int32),
        "frames": np.array([len(row["x"]) for row in rows], np.int32),
    }


def kernel():
    return np.random.default_rng(42).normal(size=[FEATURES, CLASSES])


def probability(odds, text, blank):
    """Return the sum over all alignments, by enumeration."""
    total = 0.0
    for path in np.ndindex(*[CLASSES] * len(odds)):
        merged = [c for i, c in enumerate(path) if i == 0 or c != path[i - 1]]
        if [c for c in merged if c != blank % CLASSES] == text:
            total += np.prod([odds[i, c] for i, c in enumerate(path)])
    return total


def expected(rows, blank):
    """Return the sum of -log p over rows and its gradient towards the kernel, row by row, by tf.nn.ctc_loss."""
    variable = tf.Variable(kernel().astype("float32"))
    total, gradient = 0.0, np.zeros([FEATURES, CLASSES])
    for row in rows:
        n, t = len(row["y"]), len(row["x"])
        with tf.GradientTape() as tape:
            logits = tf.constant(row["x"][None], tf.float32) @ variable
            labels = tf.constant([row["y"] or [1]])
            loss = tf.nn.ctc_loss(labels, logits, [n], [t], logits_time_major=False, blank_index=blank % CLASSES)[0]
        total += float(loss)
        gradient += tape.gradient(loss, variable).numpy()
    return total, gradient


def frames_of(batch):
    return tf.sequence_mask(batch["frames"], tf.shape(batch["x"])[1])[..., None]


def run(world, loss_fn, given, *, graph=False, **options):
    with world.scope():
        variable = tf.Variable(kernel().astype("float32"))

    def step(batch):
        with tf.GradientTape() as tape:
            logits = tf.where(frames_of(batch), batch["x"] @ variable, np.nan)  # a model's output at padded frames
            y_true = (batch["y"], batch["lengths"], batch["frames"])
            mask = tf.ones_like(batch["frames"], tf.bool)  # empty texts count
            loss = loss_fn(y_true, logits, lengths=batch["lengths"], mask=mask, **options)
        gradients = world.reduce(distpad.gradient(tape, loss, [variable], backend=world.backend))
        return gradients[0], distpad.global_value(loss, backend=world.backend)

    return world.run(step, given, graph=graph)


@pytest.mark.worlds("mirrored:2")
def test_the_loss_is_the_sum_over_all_alignments(world):
    for blank in (0, -1, 1):
        for row in rows_of(0, blank):
            odds = tf.nn.softmax(row["x"] @ kernel()).numpy()
            batch = padded([row])
            y_true = (batch["y"], batch["lengths"], batch["frames"])
            found = distpad.CTC(blank_index=blank)(y_true, batch["x"] @ kernel().astype("float32"))
            np.testing.assert_allclose(found, [-np.log(probability(odds, row["y"], blank))], rtol=1e-5)


@pytest.mark.parametrize(
    ("blank", "graph"),
    [
        (0, False),
        pytest.param(1, False, marks=pytest.mark.wide),
        pytest.param(-1, False, marks=pytest.mark.wide),
        pytest.param(-1, True, marks=pytest.mark.worlds("mirrored:2")),
    ],
)
def test_the_gradients_of_one_device(world, blank, graph):
    every = [row for r in range(world.num_replicas) for row in rows_of(r, blank)]
    value, gradient = expected(every, blank)
    loss_fn = distpad.DistributedLoss(
        distpad.CTC(blank_index=blank), per="sequence", average="sequence_sum", backend=world.backend
    )
    for mine, mean in run(world, loss_fn, lambda r: padded(rows_of(r, blank)), graph=graph).values():
        assert oracle.relative_error(mine, gradient / len(every)) <= 1e-5
        assert abs(mean - value / len(every)) <= 1e-5 * value


def test_a_label_too_long_is_refused_on_all_replicas(world):
    """The message shows the row, the frames that it needs, and the frames that it has."""
    last = world.num_replicas - 1
    short = lambda r: padded(rows_of(1 if r == last else 0, 0, short=r == last))
    loss_fn = distpad.DistributedLoss(
        distpad.CTC(blank_index=0), per="sequence", average="sequence_sum", backend=world.backend
    )
    with pytest.raises(ValueError, match="a label needs more frames than the logits have") as raised:
        run(world, loss_fn, short)
    assert f"found by replica: {last}→(1, 4, 3)." in str(raised.value)
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"a label needs more frames.*\[{last}\].*1 4 3"):
        run(world, loss_fn, short, graph=True)
    assert run(world, loss_fn, lambda r: padded(rows_of(r, 0)))  # all go on


@pytest.mark.parametrize("graph", [True, False])
def test_a_label_too_long_in_a_step_without_an_all_gather(world, graph):
    """The message names the replica of the label. In one process, the step of all replicas raises."""
    if world.several_workers:
        pytest.skip("the other workers would wait for the one that raises, until their launcher ends them")
    last = world.num_replicas - 1
    loss_fn = distpad.DistributedLoss(distpad.CTC(blank_index=0), per="sequence", backend=world.backend)

    def step(batch):
        logits = tf.zeros([*batch["x"].shape[:2], CLASSES])
        return loss_fn((batch["y"], batch["lengths"], batch["frames"]), logits, lengths=batch["lengths"], denominator=7)

    given = lambda r: padded(rows_of(1 if r == last else 0, 0, short=r == last))
    named = (
        rf"found on this replica: \] \[?{last}\]?.*1 4 3" if graph else rf"found on this replica: {last}→\(1, 4, 3\)\."
    )
    with pytest.raises(tf.errors.InvalidArgumentError if graph else ValueError, match=named):
        world.run(step, given, graph=graph)


@alone
def test_rows_that_do_not_count_may_be_too_long_without_an_all_gather(world):
    loss_fn = distpad.DistributedLoss(distpad.CTC(blank_index=0), per="sequence", backend="local")
    batch = padded(rows_of(1, 0, short=True))
    y_true, logits = (batch["y"], batch["lengths"], batch["frames"]), tf.zeros([*batch["x"].shape[:2], CLASSES])
    with pytest.raises(ValueError, match=r"found on this replica: 0→\(1, 4, 3\)\."):
        loss_fn(y_true, logits, lengths=batch["lengths"], denominator=7)
    assert loss_fn(y_true, logits, lengths=np.array([2, 0, 0, 2]), denominator=7) > 0  # rows that do not count


@pytest.mark.parametrize("average", ["sequence_sum", "token"])
def test_a_label_too_long_is_left_out_and_counted(world, average):
    """Odd replicas leave rows out, so that they have fewer sequences than the others, over two steps."""
    given = lambda r: padded(rows_of(r, 0, short=True))
    every = [row for r in range(world.num_replicas) for row in rows_of(r, 0, short=True)]
    fitting = [
        row for row in every if len(row["y"]) + sum(a == b for a, b in zip(row["y"], row["y"][1:])) <= len(row["x"])
    ]
    assert len(every) - len(fitting) == world.num_replicas // 2
    value, gradient = expected(fitting, 0)
    count = len(fitting) if average == "sequence_sum" else sum(len(row["y"]) for row in fitting)
    ctc = distpad.CTC(blank_index=0, too_long="leave_out")
    loss_fn = distpad.DistributedLoss(ctc, per="sequence", average=average, backend=world.backend)
    assert ctc.left_out(backend=world.backend) == 0
    for step in (1, 2):
        for mine, mean in run(world, loss_fn, given).values():
            assert oracle.relative_error(mine, gradient / count) <= 1e-5
            assert abs(mean - value / count) <= 1e-5 * value
        assert ctc.left_out(backend=world.backend) == step * (world.num_replicas // 2)


@alone
def test_counts_are_refused_where_rows_are_left_out(world):
    loss_fn = distpad.DistributedLoss(distpad.CTC(blank_index=0, too_long="leave_out"), per="sequence", backend="local")
    batch = padded(rows_of(1, 0))
    y_true, logits = (batch["y"], batch["lengths"], batch["frames"]), tf.zeros([*batch["x"].shape[:2], CLASSES])
    counts = distpad.Counts(tf.constant(7.0, tf.float64), tf.constant(3.0, tf.float64))
    with pytest.raises(ValueError, match="the loss itself drops sequences that the pipeline counted"):
        loss_fn(y_true, logits, lengths=batch["lengths"], denominator=counts)
    assert loss_fn(y_true, logits, lengths=batch["lengths"], denominator=7) > 0


def test_wrong_arguments():
    with pytest.raises(ValueError, match="CTC: too_long is 'drop', expected one of 'error', 'leave_out'"):
        distpad.CTC(blank_index=0, too_long="drop")
    with pytest.raises(TypeError, match=r"CTC: blank_index is 0\.5, expected an integer"):
        distpad.CTC(blank_index=0.5)
    with pytest.raises(TypeError, match=r"CTC: y_true is int, expected \(labels, label lengths, frames\)"):
        distpad.CTC(blank_index=0)(1, tf.zeros([1, 2, 3]))
    with pytest.raises(ValueError, match=r"CTC: frames is of shape \(1, 1\) and dtype int32, expected integers"):
        distpad.CTC(blank_index=0)(([[1]], [1], [[1]]), tf.zeros([1, 2, 3]))


def test_it_is_saved_with_its_loss():
    loss_fn = distpad.DistributedLoss(distpad.CTC(blank_index=2, too_long="leave_out"), per="sequence")
    again = type(loss_fn).from_config(loss_fn.get_config())
    assert (again.loss.blank_index, again.loss.too_long, again.per) == (2, "leave_out", "sequence")


# -- keras.losses.CTC -------------------------------------------------------------------------------------------------


@pytest.mark.worlds("mirrored:2")
@pytest.mark.skipif(not KERAS_3, reason="Keras 2 has no CTC loss")
@pytest.mark.parametrize("remedy", [None, "certain blanks", "distpad.CTC"])
def test_padding_changes_the_value_of_kerass_own(world, remedy):
    """Keras's CTC takes the padded width of the logits for the frames of every row.

    Padded frames with a certain blank (class 0 in Keras) leave its value unchanged. distpad.CTC reads the frames.
    """
    every = [row for r in range(world.num_replicas) for row in rows_of(r, 0)]
    value, _ = expected(every, 0)
    loss = distpad.CTC(blank_index=0) if remedy == "distpad.CTC" else tf.keras.losses.CTC(reduction="none")
    loss_fn = distpad.DistributedLoss(loss, per="sequence", average="sequence_sum", backend=world.backend)

    def step(batch):
        frames, logits = frames_of(batch), batch["x"] @ tf.constant(kernel(), tf.float32)
        y_true = tf.where(batch["y"] < 0, 0, batch["y"])
        if remedy == "certain blanks":
            logits = tf.where(frames, logits, tf.constant([0.0, *[-1e9] * (CLASSES - 1)]))
        if remedy == "distpad.CTC":
            y_true = (y_true, batch["lengths"], batch["frames"])
        loss = loss_fn(y_true, logits, lengths=batch["lengths"], mask=tf.ones_like(batch["lengths"], tf.bool))
        return distpad.global_value(loss, backend=world.backend)

    for beyond in (1, 4):
        found = world.run(step, lambda r, beyond=beyond: padded(rows_of(r, 0), beyond), graph=False)
        for mean in found.values():
            off = abs(mean - value / len(every)) / (value / len(every))
            assert off > 0.05 if remedy is None else off <= 1e-5
