"""One step on N replicas equals one step on one device with the concatenated batch: gradients against NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle
from replica_world import counting

LIMIT = {"float64": 1e-12, "float32": 1e-5}
SCENARIOS = ["uneven", "empty replica", "padding replica", "all padding"]
AVERAGES = ["token", "sequence_sum", "sequence_mean", 7.5]


def cross_entropy(y_true, y_pred):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y_true, y_pred)


def everything(world, scenario, seed=0):
    return [row for r in range(world.num_replicas) for row in oracle.rows_of(r, scenario, world.num_replicas, seed)]


def step_of(world, loss_fn, dtype, arguments, kernel, bias):
    """Make a step of one replica, which returns the loss, the global value and the reduced gradients."""

    def step(batch):
        with tf.GradientTape() as tape:
            logits = batch["x"] @ kernel + bias
            # NaN and infinity in the model's output at padded positions
            poison = tf.cast(np.nan, dtype) if "nan" in arguments else tf.cast(np.inf, dtype)
            logits = tf.where(batch["mask"][..., None], logits, poison)
            extra = {name: batch[name] for name in ("lengths", "mask") if name in arguments}
            weight = batch["w"] if "weights" in arguments else None
            loss = loss_fn(batch["y"], logits, weight, **extra)
        gradients = distpad.gradient(tape, loss, [kernel, bias], backend=world.backend)
        return loss, loss_fn.global_value(loss), world.reduce(gradients)

    return step


CASES = [
    pytest.param(average, scenario, source, dtype, id=f"{average}-{scenario}-{'+'.join(source)}-{dtype}")
    for (average, scenario), source, dtype in [
        *zip(
            itertools.product(AVERAGES, SCENARIOS),
            itertools.cycle([("lengths",), ("mask", "nan"), ("padding_value",), ("lengths", "weights", "nan")]),
            itertools.cycle(["float64", "float32", "float64", "float32", "float64"]),
        ),
        (("token", "uneven"), ("lengths", "mask", "padding_value", "weights"), "float64"),
        (("sequence_mean", "uneven"), ("mask", "weights"), "float64"),
        (("sequence_sum", "empty replica"), ("lengths", "weights"), "float64"),
    ]
]


@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=pytest.mark.wide)])
@pytest.mark.parametrize(("average", "scenario", "source", "dtype"), CASES)
def test_gradient_equals_one_device(world, average, scenario, source, dtype, graph):
    check_gradient(world, average, source, dtype, [scenario], graph)


@pytest.mark.core
@pytest.mark.parametrize(
    ("average", "source"),
    [
        pytest.param("token", ("lengths", "weights", "nan"), id="token"),
        pytest.param("sequence_mean", ("padding_value", "mask"), id="sequence_mean", marks=pytest.mark.wide),
    ],
)
def test_one_traced_step_is_right_for_all_rows(world, average, source):
    """The step is traced for the first shapes, and then for any shape."""
    check_gradient(world, average, source, "float64", SCENARIOS, graph=True)


def check_gradient(world, average, source, dtype, scenarios, graph):
    padding_value = -99 if "padding_value" in source else None
    loss_fn = distpad.DistributedLoss(
        cross_entropy, average=average, padding_value=padding_value, backend=world.backend
    )
    with world.scope():
        kernel, bias = (tf.Variable(value.astype(dtype)) for value in oracle.weights())
    step = step_of(world, loss_fn, dtype, source, kernel, bias)
    summed = world.backend.gradient_reduction == "sum"
    for scenario in scenarios:
        given = lambda r, scenario=scenario: oracle.padded(oracle.rows_of(r, scenario, world.num_replicas), dtype)
        results = world.run(step, given, graph=graph)
        value, *expected = oracle.cross_entropy(
            everything(world, scenario), *oracle.weights(), average, weighted="weights" in source
        )
        assert results
        for loss, global_value, gradients in results.values():
            assert loss.dtype == dtype
            assert oracle.relative_error(global_value, value) <= LIMIT[dtype]
            assert oracle.relative_error(loss, value / (world.num_replicas if summed else 1)) <= LIMIT[dtype]
            for found, wanted in zip(gradients, expected):
                assert oracle.relative_error(found, wanted) <= LIMIT[dtype]


@pytest.mark.core
def test_denominator_makes_the_step_free_of_collectives(world):
    rows = everything(world, "uneven")
    tokens = float(sum(len(row["y"]) for row in rows))
    sequences = float(sum(len(row["y"]) > 0 for row in rows))
    expected = {average: oracle.cross_entropy(rows, *oracle.weights(), average, False) for average in AVERAGES[:3]}
    with world.scope():
        kernel, bias = (tf.Variable(value) for value in oracle.weights())
    for average, (value, *gradients) in expected.items():
        loss_fn = distpad.DistributedLoss(cross_entropy, average=average, backend=world.backend)

        def step(batch, loss_fn=loss_fn, average=average):
            with tf.GradientTape(persistent=True) as tape:
                logits = batch["x"] @ kernel + bias
                scalar = loss_fn(
                    batch["y"],
                    logits,
                    lengths=batch["lengths"],
                    denominator=tokens if average == "token" else sequences,
                )
                counts = distpad.Counts(tf.constant(tokens, tf.float64), tf.constant(sequences, tf.float64))
                counted = loss_fn(batch["y"], logits, lengths=batch["lengths"], denominator=counts)
            found = [distpad.gradient(tape, loss, [kernel, bias], backend=world.backend) for loss in (scalar, counted)]
            return loss_fn.global_value(scalar), [world.reduce(each) for each in found]

        given = lambda r: oracle.padded(oracle.rows_of(r, "uneven", world.num_replicas), "float64")
        results = world.run(step, given, graph=False)
        for found_value, both in results.values():
            assert oracle.relative_error(found_value, value) <= 1e-12
            for found in both:
                assert max(map(oracle.relative_error, found, gradients)) <= 1e-12


def test_global_value_outside_any_scope(world):
    """The loss remembers its last backend, so that global_value works outside a scope too."""
    loss_fn = distpad.DistributedLoss(lambda t, p: p, backend=world.backend)

    def step(x):
        return loss_fn(tf.zeros_like(x), x, denominator=2.0 * world.num_replicas)

    given = lambda r: np.full([1, 2], 1.0 + r)
    if world.strategy is None:
        returned = step(tf.constant(given(world.backend.worker_index)))
    else:
        batches = world.strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(given(context.replica_id_in_sync_group))
        )
        returned = world.strategy.run(step, args=(batches,))
        if world.num_replicas > 1 and not world.several_workers:
            with pytest.raises(ValueError, match="no strategy is in scope"):
                distpad.global_value(returned)
    expected = np.mean([1.0 + r for r in range(world.num_replicas)])
    assert oracle.relative_error(loss_fn.global_value(returned), expected) <= 1e-12


@pytest.mark.core
def test_collectives_of_the_loss_are_counted(world):
    """A loss makes one all-reduce without a denominator, none with it; the backend counts them."""
    backend = counting(world.backend)
    loss_fn = distpad.DistributedLoss(cross_entropy, backend=backend)

    def step(batch, **extra):
        return loss_fn(batch["y"], tf.one_hot(batch["y"], oracle.CLASSES), lengths=batch["lengths"], **extra)

    given = lambda r: oracle.padded(oracle.rows_of(r, "uneven", world.num_replicas), "float32")
    here = len(world.run(step, given, graph=False))
    assert backend.calls == (0 if world.num_replicas == 1 else here)
    backend.calls = 0
    world.run(lambda batch: step(batch, denominator=3.0), given, graph=False)
    assert backend.calls == 0


@pytest.mark.parametrize("graph", [True, pytest.param(False, marks=pytest.mark.core)])
def test_padded_positions_change_no_bit(world, graph):
    """NaN, infinity and labels out of range at padded positions: the same bits, and a gradient of exactly zero."""
    loss_fn = distpad.DistributedLoss(cross_entropy, backend=world.backend)

    def step(batch):
        with tf.GradientTape() as tape:
            tape.watch(batch["logits"])
            loss = loss_fn(batch["y"], batch["logits"], lengths=batch["lengths"])
        return loss, tape.gradient(loss, batch["logits"])

    found = []
    for label, logit in [(0, 0.0), (-99, np.nan), (10**6, np.inf), (-1, -np.inf), (3, 1e30)]:

        def given(r, label=label, logit=logit):
            batch = oracle.padded(oracle.rows_of(r, "uneven", world.num_replicas), "float32")
            logits = np.random.default_rng(r).normal(size=[*batch["y"].shape, oracle.CLASSES]).astype("float32")
            return {
                "y": np.where(batch["mask"], batch["y"], label).astype("int32"),
                "logits": np.where(batch["mask"][..., None], logits, np.float32(logit)).astype("float32"),
                "lengths": batch["lengths"],
            }

        if graph and not found:
            world.run(step, given, graph=True)  # the other cases have the same graph
        found.append(world.run(step, given, graph=graph))
    for results in found[1:]:
        for replica, (loss, gradient) in results.items():
            lengths = given(replica)["lengths"]
            assert loss.tobytes() == found[0][replica][0].tobytes()
            assert gradient.tobytes() == found[0][replica][1].tobytes()
            beyond = np.arange(gradient.shape[1]) >= lengths[:, None]
            assert not gradient[beyond].any()


def test_keras_losses_of_reduction_none(world):
    """Keras's losses of classes, one-hot vectors and images equal the means of their positions."""
    losses = tf.keras.losses
    lengths = [[3, 0, 2], [1], [4, 1], [2, 2]]

    def given(r):
        random = np.random.default_rng([5, r])
        mine = lengths[r % 4]
        shape = [len(mine), 4]
        return {
            "classes": random.integers(0, 3, size=shape),
            "onehot": np.eye(3)[random.integers(0, 3, size=shape)].astype("float32"),
            "images": random.normal(size=[*shape, 2, 3, 1]).astype("float32"),
            "p": random.dirichlet([1, 1, 1], size=shape).astype("float32"),
            "predicted": random.normal(size=[*shape, 2, 3, 1]).astype("float32"),
            "lengths": np.array(mine),
        }

    makers = {
        "classes": (losses.SparseCategoricalCrossentropy(reduction="none"), "p"),
        "onehot": (losses.CategoricalCrossentropy(reduction="none"), "p"),
        "images": (losses.MeanSquaredError(reduction="none"), "predicted"),
    }

    def step(batch):
        values = {}
        for label, (loss, prediction) in makers.items():
            loss_fn = distpad.DistributedLoss(loss, backend=world.backend)
            values[label] = loss_fn.global_value(loss_fn(batch[label], batch[prediction], lengths=batch["lengths"]))
        return values

    results = world.run(step, given, graph=False)
    wanted: dict[str, list] = {label: [] for label in makers}
    for batch in map(given, range(world.num_replicas)):
        for i, n in enumerate(batch["lengths"]):
            for t in range(n):
                wanted["classes"].append(-np.log(batch["p"][i, t, batch["classes"][i, t]]))
                wanted["onehot"].append(-np.log(batch["p"][i, t] @ batch["onehot"][i, t]))
                wanted["images"].append(np.mean((batch["images"][i, t] - batch["predicted"][i, t]) ** 2))
    for found in results.values():
        for label, values in wanted.items():
            assert oracle.relative_error(found[label], np.mean(values)) <= 2e-6, label


@pytest.mark.parametrize("average", ["token", "sequence_sum", "sequence_mean"])
def test_ctc_of_each_sequence(world, average):
    """The labels of tf.nn.ctc_loss are a nest with lengths; the oracle concatenates the rows on one device."""
    label_lengths = [[2, 0, 3], [1, 1], [], [4]]

    def given(r):
        random = np.random.default_rng([8, r])
        mine = np.array(label_lengths[r % 4], np.int32)
        return {
            "labels": random.integers(1, 5, size=[len(mine), 4]).astype("int32"),
            "lengths": mine,
            "logits": random.normal(size=[len(mine), 11, 5]).astype(
                "float32"
            ),  # the only dtype that tf.nn.ctc_loss takes
            "frames": np.full([len(mine)], 11, np.int32),
        }

    def ctc(y_true, y_pred):
        labels, lengths, frames = y_true
        return tf.nn.ctc_loss(labels, y_pred, lengths, frames, logits_time_major=False, blank_index=0)

    loss_fn = distpad.DistributedLoss(ctc, average=average, per="sequence", backend=world.backend)

    def step(batch):
        with tf.GradientTape() as tape:
            tape.watch(batch["logits"])
            nest = (batch["labels"], batch["lengths"], batch["frames"])
            loss = loss_fn(nest, batch["logits"], lengths=batch["lengths"])
        return loss_fn.global_value(loss), tape.gradient(loss, batch["logits"])

    results = world.run(step, given, graph=False)
    batches = [given(r) for r in range(world.num_replicas)]
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    counted = joined["lengths"] > 0
    count = float(joined["lengths"].sum() if average == "token" else counted.sum())
    logits = tf.constant(joined["logits"])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        each = ctc((joined["labels"], joined["lengths"], joined["frames"]), logits)
        value = tf.reduce_sum(tf.boolean_mask(each, counted)) / count
    gradient = tape.gradient(value, logits).numpy()
    starts = np.cumsum([0] + [len(batch["lengths"]) for batch in batches])
    scale = np.abs(gradient).max()
    for replica, (found, found_gradient) in results.items():
        assert oracle.relative_error(found, value.numpy()) <= 1e-5
        mine = gradient[starts[replica] : starts[replica + 1]] * world.backend.gradient_scale
        assert np.all(np.abs(found_gradient - mine) <= 1e-5 * scale * world.num_replicas)


def test_long_float16_sequences_do_not_overflow(world):
    """The sum of 100,000 losses of 4 exceeds the range of float16."""
    loss_fn = distpad.DistributedLoss(lambda t, p: tf.square(t - p)[..., 0], backend=world.backend)

    def step(batch):
        with tf.GradientTape() as tape:
            tape.watch(batch)
            loss = loss_fn(tf.zeros_like(batch, tf.float32), batch)
        return loss_fn.global_value(loss), tape.gradient(loss, batch)

    results = world.run(step, lambda r: np.full([1, 100_000 // world.num_replicas, 1], 2.0, np.float16), graph=False)
    for value, gradient in results.values():
        assert value.dtype == np.float32
        assert oracle.relative_error(value, 4.0) <= 1e-5
        assert np.all(np.isfinite(gradient)) and gradient.any()


def test_labels_of_rows_that_do_not_count_are_replaced(world):
    """A loss that fails on labels out of range never sees the labels of a row that does not count."""

    def strict(y_true, y_pred):
        tf.debugging.assert_less(y_true, 4)
        return tf.reduce_sum(y_pred, 1)

    labels, given = tf.constant([[1, 2], [99, 99]]), {"mask": [True, False], "sample_weight": [1.0, 0.0]}
    for name, value in given.items():
        loss_fn = distpad.DistributedLoss(strict, per="sequence", average="sequence_sum", backend=world.backend)
        call = lambda rows, name=name, loss_fn=loss_fn: loss_fn.global_value(
            loss_fn(labels, tf.constant([[1.0, 2.0], [5.0, 5.0]]), lengths=[2, 2], **{name: rows})
        )
        for found in world.run(call, lambda r, value=value: np.array(value), graph=False).values():
            assert found == 3.0


def test_a_mask_of_rows_decides_alone_which_rows_count(world):
    """An empty text is the label of a picture without text, and its row counts."""
    loss_fn = distpad.DistributedLoss(
        lambda t, p: tf.reduce_sum(p, 1), per="sequence", average="sequence_sum", backend=world.backend
    )
    y_pred = tf.constant([[1.0, 2.0], [5.0, 6.0], [7.0, 7.0]])
    arguments = {"lengths": np.array([2, 0, 0]), "mask": np.array([True, True, False])}
    call = lambda given: loss_fn.global_value(loss_fn(tf.zeros([3, 2], tf.int32), y_pred, **given))
    for found in world.run(call, lambda r: arguments, graph=False).values():
        assert found == 7.0
    for found in world.run(lambda x: call({"lengths": x}), lambda r: arguments["lengths"], graph=False).values():
        assert found == 3.0


@pytest.mark.parametrize("average", ["token", "sequence_sum"])
@pytest.mark.parametrize("form", ["class", "column", "one-hot", "one-hot by hand"])
def test_classes_of_a_sequence_are_no_positions(world, form, average):
    """Labels ``[batch, classes]`` have an axis of classes, which lengths do not mask."""
    lengths = lambda r: np.array([2 + r, 9, 0])
    classes, scores = np.array([4, 0, 1]), np.random.default_rng(0).normal(size=[3, 5])
    y_true = np.eye(5)[classes] if "one-hot" in form else classes[:, None] if form == "column" else classes
    keras = tf.keras.losses
    loss = (keras.CategoricalCrossentropy if form == "one-hot" else keras.SparseCategoricalCrossentropy)(
        from_logits=True, reduction="none"
    )
    if form == "one-hot by hand":
        loss = tf.nn.softmax_cross_entropy_with_logits
    loss_fn = distpad.DistributedLoss(loss, per="sequence", average=average, backend=world.backend)
    call = lambda rows: loss_fn.global_value(loss_fn(tf.constant(y_true), tf.constant(scores), lengths=rows))
    each = np.log(np.exp(scores).sum(1)) - scores[np.arange(3), classes]
    count = sum(lengths(r).sum() if average == "token" else 2 for r in range(world.num_replicas))
    for found in world.run(call, lengths, graph=False).values():
        assert oracle.relative_error(found, world.num_replicas * each[:2].sum() / count) <= 1e-6


def test_an_empty_replica_has_all_gradients_that_the_others_have(world):
    """Gradients reach the loss's own variables (a CRF's transitions) and every leaf of the predictions, eagerly too."""
    transitions, weight = tf.Variable(tf.ones([3], tf.float64)), tf.Variable(tf.constant(2.0, tf.float64))

    def crf(y_true, y_pred):
        return tf.reduce_sum(tf.square(y_pred["a"] - transitions) + y_pred["b"], axis=-1)

    loss_fn = distpad.DistributedLoss(crf, per="sequence", average="sequence_sum", backend=world.backend)

    def step(x):
        with tf.GradientTape() as tape:
            y_pred = {"a": x * weight, "b": x * weight * weight}
            loss = loss_fn(tf.zeros_like(x, tf.int32), y_pred, lengths=tf.fill([tf.shape(x)[0]], 3))
        return world.reduce(distpad.gradient(tape, loss, [transitions, weight], backend=world.backend))

    last = world.num_replicas - 1
    given = lambda r: np.full([0 if r == last and last > 0 else 2, 3], r + 1.0)
    rows = np.concatenate([given(r) for r in range(world.num_replicas)])
    expected = (
        np.sum(-2 * (rows * 2 - 1), axis=0) / len(rows),
        np.sum(2 * (rows * 2 - 1) * rows + 4 * rows) / len(rows),
    )
    for graph in (False, True):
        for found in world.run(step, given, graph=graph).values():
            for a, b in zip(found, expected):
                assert oracle.relative_error(a, b) < 1e-12


def test_positions_of_weight_0_are_replaced(world):
    y_true = tf.constant([[1, 2], [1, 99]])

    def step(y_pred, weights, lengths):
        with tf.GradientTape() as tape:
            tape.watch(y_pred)
            loss_fn = distpad.DistributedLoss(cross_entropy, backend=world.backend)
            loss = loss_fn(y_true, y_pred, weights, lengths=lengths)
        return loss_fn.global_value(loss), distpad.gradient(tape, loss, [y_pred], backend=world.backend)[0]

    logits = np.random.default_rng(0).normal(size=[2, 2, 4])
    poisoned = logits.copy()
    poisoned[1] = np.nan
    for weights, lengths in (([[1.0], [0.0]], [2, 2]), ([1.0, 0.0], [2, 2]), ([[1.0, 1.0], [np.nan, np.nan]], [2, 0])):
        call = lambda x, weights=weights, lengths=lengths: step(x, tf.constant(weights), lengths)
        found = world.run(call, lambda r: poisoned, graph=False)
        expected = world.run(call, lambda r: logits, graph=False)
        for r, (value, gradient) in found.items():
            assert np.isfinite(value) and value == expected[r][0]
            assert np.array_equal(gradient, expected[r][1]) and not gradient[1].any() and gradient[0].any()


def test_half_precision_labels_and_a_padding_value_of_nan(world):
    loss_fn = distpad.DistributedLoss(lambda t, p: tf.square(t - p), padding_value=float("nan"), backend=world.backend)
    for dtype in ("float16", "float32"):
        call = lambda y, dtype=dtype: loss_fn.global_value(loss_fn(y, tf.zeros([2, 2], dtype)))
        for found in world.run(
            call, lambda r, dtype=dtype: np.array([[1, np.nan], [2, 3]], dtype), graph=False
        ).values():
            assert found == pytest.approx(14 / 3)


def test_an_empty_replica_may_pass_empty_lists(world):
    loss_fn = distpad.DistributedLoss(lambda t, p: p, backend=world.backend)
    last = world.num_replicas - 1

    def call(r):
        rows = 0 if int(r) == last else 2
        y_pred = tf.ones([rows, 3]) * 2.0
        return loss_fn.global_value(loss_fn(y_pred, y_pred, lengths=[3] * rows, mask=[True] * rows))

    for found in world.run(call, np.int64, graph=False).values():
        assert found == (2.0 if last else 0.0)
