"""What people do with fit: each trains as one device does, in NumPy, or is refused with what to write instead."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tensorflow as tf
import test_for_keras as feeding
from test_for_keras import collected  # noqa: F401 (the fixture collects the iterators of fit)

import distpad
import oracle
from keras_world import KERAS, fit_optimizer

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")
SGD, RATE, callbacks = tf.keras.optimizers.SGD, feeding.RATE, tf.keras.callbacks


def trained(world, made_in=tf.keras.Model, *, epochs=2, optimizer=None, y="y", per_row=False, **options):
    """Fit a linear model; options of compile have the prefix ``compile_``, the others are those of fit."""
    compiled = {name[8:]: options.pop(name) for name in list(options) if name.startswith("compile_")}
    data, sampler, batches = feeding.sampled(world)
    with world.scope():
        inputs = tf.keras.Input([None, oracle.FEATURES])
        pooled = tf.keras.layers.GlobalMaxPooling1D()(inputs) if per_row else inputs
        model = made_in(inputs, tf.keras.layers.Dense(oracle.CLASSES, dtype="float32")(pooled))
        model.set_weights(oracle.weights())
        entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        make = optimizer or (lambda: fit_optimizer(world, SGD(RATE)))
        model.compile(loss=distpad.DistributedLoss(entropy), optimizer=make(), **{"run_eagerly": True, **compiled})
    fed = feeding.fed_by(world, batches, len(sampler.plan(0)), x="x", y=y)
    history = feeding.fit(world, model, fed, **{"epochs": epochs, **options})
    return model, history, [[[data[i] for i in step] for step in sampler.plan(e)] for e in range(epochs)]


def expected(epochs, rates):
    """The weights after these epochs, with the learning rate of each step."""
    kernel, bias = oracle.weights()
    for rows, rate in zip((rows for steps in epochs for rows in steps), rates):
        _, d_kernel, d_bias = oracle.cross_entropy(rows, kernel, bias, "token", False)
        kernel, bias = kernel - rate * d_kernel, bias - rate * d_bias
    return kernel, bias


def check_weights(model, wanted, tolerance=1e-5):
    for found, after, start in zip(model.get_weights(), wanted, oracle.weights()):
        assert oracle.relative_error(found - start, after - start) <= tolerance


class Own(tf.keras.Model):
    """A model whose own train_step gives raw gradients to the optimiser."""

    def train_step(self, data):
        x, y, weights = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True), weights)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"own": loss}


# -- ranks that train alone -------------------------------------------------------------------------------------------


@pytest.mark.worlds("horovod:2")
@pytest.mark.parametrize(
    "graph", [pytest.param(False, marks=[pytest.mark.wide] * (KERAS >= 3)), pytest.param(True, marks=pytest.mark.wide)]
)
def test_own_train_step(world, graph):
    """DistributedOptimizer reduces what apply_gradients gets, in Keras 2 too."""
    ours = lambda: distpad.DistributedOptimizer(SGD(RATE, global_clipnorm=100.0))
    model, _, epochs = trained(world, Own, optimizer=ours, epochs=1, compile_run_eagerly=not graph)
    check_weights(model, feeding.expected(epochs)[1])


def with_horovods(rate):
    import horovod.tensorflow.keras as hvd

    return hvd.DistributedOptimizer(SGD(rate))


@pytest.mark.parametrize(
    ("made_in", "optimizer"),
    [
        pytest.param(Own, with_horovods, marks=[pytest.mark.wide] * (KERAS >= 3)),  # test_optimizer.py shows it there
        pytest.param(tf.keras.Model, SGD, marks=pytest.mark.wide),
    ],
    ids=["own train_step", "plain optimizer"],
)
def test_gradients_that_are_not_reduced_are_noticed(world, made_in, optimizer):
    if world.kind not in ("horovod", "mpirun"):
        pytest.skip("strategies keep the weights equal")
    with pytest.raises(
        ValueError, match=r"fit: the weights differ between the ranks after two steps \(.*kernel.*alone"
    ):
        trained(world, made_in, optimizer=lambda: optimizer(RATE))


@pytest.mark.wide
def test_weights_that_were_not_broadcast_are_noticed(world):
    if world.kind not in ("horovod", "mpirun"):
        pytest.skip("strategies keep the weights equal")
    _, sampler, batches = feeding.sampled(world)
    model = feeding.model_in(world)
    model.set_weights([weight + world.backend.worker_index for weight in oracle.weights()])
    fed = feeding.fed_by(world, batches, len(sampler.plan(0)), x="x", y="y")
    with pytest.raises(ValueError, match=r"\d on rank 0.* on rank 1.*distpad\.broadcast_variables"):
        feeding.fit(world, model, fed)


class StopsAlone(callbacks.Callback):
    """As a callback that looks at its own clock."""

    def __init__(self, world):
        super().__init__()
        self.worker = world.backend.worker_index

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch == 1 and self.worker == 0


@pytest.mark.worlds("multiworker:2", "horovod:2")
def test_workers_stop_after_the_same_epoch(world):
    if not world.several_workers:
        pytest.skip("one worker stops alone anyway")
    _, history, _ = trained(world, epochs=4, callbacks=[StopsAlone(world)])
    assert len(history.history["loss"]) == 2


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.worlds("multiworker:2")
def test_class_weight_is_refused(world):
    with pytest.raises(
        ValueError, match=r"fit: class_weight is \{0: 2.0\}, expected None with for_keras.*weights=NAME"
    ):
        trained(world, class_weight={0: 2.0})


@pytest.mark.worlds("horovod:2")
def test_compilation_by_xla_is_refused(world):
    if world.num_replicas == 1:
        pytest.skip("one device compiles")
    with pytest.raises(ValueError, match=r"fit: jit_compile is True, expected False (under Horovod|on several CPU)"):
        trained(world, compile_jit_compile=True, compile_run_eagerly=False)


def test_callbacks_of_horovod_are_refused_in_keras_3(world):
    if world.kind not in ("horovod", "mpirun") or KERAS < 3:
        pytest.skip("Horovod's matter, and Keras 3's")
    import horovod.tensorflow.keras as hvd

    with pytest.raises(
        ValueError, match=r"fit: callbacks is MetricAverageCallback, expected none of Horovod's.*broadcast"
    ):
        trained(world, callbacks=[hvd.callbacks.MetricAverageCallback()])


@pytest.mark.wide
def test_callbacks_of_horovod_in_keras_2(world):
    if world.kind not in ("horovod", "mpirun") or KERAS >= 3:
        pytest.skip("Horovod's matter, and Keras 2's")
    import horovod.tensorflow.keras as hvd

    called = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()]
    warmup = hvd.callbacks.LearningRateWarmupCallback(RATE, warmup_epochs=1, momentum_correction=False)
    model, history, epochs = trained(world, callbacks=called, epochs=2)
    feeding.check(model, history, *feeding.expected(epochs))
    model, history, _ = trained(world, callbacks=[warmup], epochs=2)
    assert float(model.optimizer.learning_rate.numpy()) == pytest.approx(RATE)


@pytest.mark.wide
def test_several_steps_at_once(world):
    if KERAS >= 3 and world.strategy is not None and world.num_replicas > 1:
        with pytest.raises(ValueError, match=r"fit: steps_per_execution is 2, expected 1 with several replicas"):
            trained(world, compile_steps_per_execution=2, compile_run_eagerly=False)
        return
    model, history, epochs = trained(world, compile_steps_per_execution=2, compile_run_eagerly=False)
    feeding.check(model, history, *feeding.expected(epochs))


@pytest.mark.wide
def test_a_second_strategy_with_other_devices(world):
    if world.kind != "mirrored" or world.num_replicas < 4:
        pytest.skip("needs more devices than a strategy has")
    trained(world)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = tf.keras.Sequential([tf.keras.Input([None, 1]), tf.keras.layers.Dense(1)])
        model.compile(loss=distpad.DistributedLoss("mse"), optimizer="sgd")
    with pytest.raises(ValueError, match=r"fit: strategy is on \[.*expected on the devices of .* first"):
        model.fit(np.ones([4, 3, 1]), np.ones([4, 3, 1]), verbose=0)


# -- what works -------------------------------------------------------------------------------------------------------


@pytest.mark.wide
def test_class_weights_as_weights(world):
    """The remedy for class_weight, one weight per position."""
    data = feeding.examples()
    for each in data:
        each["w"] = np.where(each["y"] == 0, 2.0, 1.0).astype("float32")
    sampler = distpad.LengthSampler([len(each["y"]) for each in data], global_batch_size=8, seed=1)
    batches = feeding.made(world, (data, sampler), weights="w", padding={**feeding.PADDING, "w": distpad.Pad()})
    model = feeding.model_in(world)
    history = feeding.fit(world, model, feeding.fed_by(world, batches, len(sampler.plan(0)), x="x", y="y"))
    steps = [[data[i] for i in step] for step in sampler.plan(0)]
    feeding.check(model, history, *feeding.expected([steps], weighted=True))


@pytest.mark.wide
def test_callbacks_of_keras(world, tmp_path):
    """Each worker has the same values, and so decides alike; validation has other buckets."""
    path = world.backend.host_all_gather_bytes(str(tmp_path).encode())[0].decode()
    # Keras 2 lets one worker of a strategy write; Keras 3 and Horovod let all, which would write over each other
    path = os.path.join(path, "all" if KERAS < 3 and world.strategy else str(world.backend.worker_index))
    data, sampler, held_out = feeding.sampled(world)
    held_out = feeding.made(world, (data, sampler), buckets=distpad.Buckets([4, 9]))
    validation, steps = feeding.fed_by(world, held_out, len(sampler.plan(0)), x="x", y="y")
    stats = held_out.stats.callback(os.path.join(str(tmp_path), "stats"))
    used = [
        callbacks.EarlyStopping("val_loss", min_delta=100.0, patience=2),
        callbacks.ReduceLROnPlateau("val_loss", factor=0.5, min_delta=100.0, patience=1),
        callbacks.ModelCheckpoint(os.path.join(path, "model.keras")),
        callbacks.TensorBoard(os.path.join(str(tmp_path), "board")),
        stats,
    ]
    options = {"validation_steps": steps["steps_per_epoch"]} if steps else {}
    model, history, epochs = trained(world, epochs=9, callbacks=used, validation_data=validation, **options)
    assert len(history.history["loss"]) == 3
    each = len(epochs[0])
    check_weights(model, expected(epochs[:3], [RATE] * 2 * each + [RATE / 2] * each))
    values = np.array([value for values in history.history.values() for value in values], np.float64)
    for theirs in world.backend.host_all_gather(values):
        np.testing.assert_array_equal(theirs, values)
    assert os.listdir(tmp_path / "stats")
    custom = {"SGD": type(model.optimizer)} if KERAS < 3 and world.kind in ("horovod", "mpirun") else None
    with world.scope():
        loaded = tf.keras.models.load_model(os.path.join(path, "model.keras"), custom_objects=custom)
    for found, wanted in zip(loaded.get_weights(), model.get_weights()):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.wide
def test_our_accuracy_is_exact_where_keras_s_is_not(world):
    with world.scope():
        ours = distpad.metrics.TokenAccuracy(name="ours")
        keras_s = tf.keras.metrics.SparseCategoricalAccuracy(name="keras_s")
    zero = lambda: fit_optimizer(world, SGD(0.0))
    _, history, epochs = trained(world, optimizer=zero, epochs=1, compile_weighted_metrics=[ours, keras_s])
    kernel, bias = oracle.weights()
    right = [np.argmax(row["x"] @ kernel + bias, -1) == row["y"] for rows in epochs[0] for row in rows]
    exact = np.concatenate(right).mean()
    assert history.history["ours"][0] == pytest.approx(exact, rel=1e-6)
    is_exact = history.history["keras_s"][0] == pytest.approx(exact, rel=1e-4)
    assert is_exact == (KERAS < 3 and world.kind not in ("horovod", "mpirun"))


@pytest.mark.wide
def test_a_schedule_counts_steps(world):
    """Not ranks, replicas or micro-batches."""
    schedule = tf.keras.optimizers.schedules.ExponentialDecay(RATE, 1, 0.5)
    model, _, epochs = trained(world, optimizer=lambda: fit_optimizer(world, SGD(schedule)))
    check_weights(model, expected(epochs, [RATE * 0.5**step for step in range(99)]))


@pytest.mark.wide
def test_mixed_precision(world):
    """float16 with loss scaling; the errors are those of float16."""
    policy = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        scaling = (tf.keras.optimizers if KERAS >= 3 else tf.keras.mixed_precision).LossScaleOptimizer
        ours = lambda: distpad.DistributedOptimizer(scaling(SGD(RATE)))
        off = {"compile_auto_scale_loss": False} if KERAS >= 3 else {}
        model, history, epochs = trained(world, optimizer=ours, compile_run_eagerly=False, **off)
    finally:
        tf.keras.mixed_precision.set_global_policy(policy)
    losses, weights = feeding.expected(epochs)
    np.testing.assert_allclose(history.history["loss"], losses, rtol=1e-2)
    check_weights(model, weights, 1e-2)


@pytest.mark.wide
def test_swapped_averages_of_weights(world):
    if KERAS < 3:
        pytest.skip("Keras 3's")
    averaging = lambda: fit_optimizer(world, SGD(RATE, use_ema=True, ema_momentum=0.5))
    model, _, epochs = trained(world, optimizer=averaging, epochs=1, callbacks=[callbacks.SwapEMAWeights(True)])
    averages = None
    for step in range(len(epochs[0])):
        weights = expected([epochs[0][: step + 1]], [RATE] * 99)
        averages = weights if averages is None else [0.5 * a + 0.5 * w for a, w in zip(averages, weights)]
    check_weights(model, averages)


@pytest.mark.wide
def test_a_restored_checkpoint_goes_on_with_the_next_epoch(world, tmp_path):
    """Model, optimiser and position in the data, which BackupAndRestore does not save: it warns."""

    def made():
        data, sampler, batches = feeding.sampled(world)
        model = feeding.model_in(world)
        with world.scope():
            checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer, batches=batches)
            manager = tf.train.CheckpointManager(checkpoint, str(tmp_path), max_to_keep=1)
            manager.restore_or_initialize()
        first = batches.state_dict()["epoch"]
        fed = feeding.fed_by(world, batches, len(sampler.plan(0)), x="x", y="y")
        save = callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: manager.save())
        history = feeding.fit(world, model, fed, initial_epoch=first, epochs=first + 1, callbacks=[save])
        return model, history, [[[data[i] for i in step] for step in sampler.plan(e)] for e in range(first + 1)]

    made()
    model, history, epochs = made()
    losses, weights = feeding.expected(epochs)
    assert len(epochs) == 2
    assert oracle.relative_error(history.history["loss"], losses[1:]) <= 1e-5
    check_weights(model, weights)


@pytest.mark.wide
def test_backup_and_restore_warns_of_the_position(world, tmp_path):
    backup = callbacks.BackupAndRestore(str(tmp_path / "backup"))
    with pytest.warns(UserWarning, match=r"fit: BackupAndRestore restores .*not the position.*tf\.train\.Checkpoint"):
        trained(world, epochs=1, callbacks=[backup])


@pytest.mark.wide
def test_several_losses_of_which_one_is_per_sequence(world):
    """The second loss is the square of the first position's output, averaged over the sequences that are not empty."""
    data, sampler, _ = feeding.sampled(world)
    batches = feeding.made(world, (data, sampler), tokens={"tags": "y", "first": "y"})
    kernel = np.linspace(-1, 1, oracle.FEATURES)[:, np.newaxis]
    with world.scope():
        inputs = tf.keras.Input([None, oracle.FEATURES])
        heads = {
            "tags": tf.keras.layers.Dense(oracle.CLASSES, name="tags"),
            "first": tf.keras.layers.Dense(1, name="first"),
        }
        model = tf.keras.Model(inputs, {name: head(inputs) for name, head in heads.items()})
        heads["tags"].set_weights(oracle.weights())
        heads["first"].set_weights([kernel, np.zeros(1)])
        entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        square = distpad.DistributedLoss(lambda _, p: p[:, 0, 0] ** 2, per="sequence", average="sequence_mean")
        losses = {"tags": distpad.DistributedLoss(entropy), "first": square}
        model.compile(loss=losses, optimizer=fit_optimizer(world, SGD(RATE)), run_eagerly=True)
    steps = [[data[i] for i in step] for step in sampler.plan(0)]
    fed = feeding.fed_by(world, batches, len(steps), x="x", y={"tags": "y", "first": "y"})
    history = feeding.fit(world, model, fed).history
    (mean,), weights = feeding.expected([steps])
    bias, values = 0.0, []
    for rows in steps:
        x = np.stack([row["x"][0] for row in rows if len(row["x"])]).astype(np.float64)
        output = x @ kernel + bias
        values.append(np.mean(output**2))
        kernel = kernel - RATE * 2 * x.T @ output / len(x)
        bias -= RATE * 2 * output.mean()
    assert oracle.relative_error(history["tags_loss"], mean) <= 1e-5
    assert oracle.relative_error(history["first_loss"], np.mean(values)) <= 1e-5
    for found, wanted in zip([*heads["tags"].get_weights(), *heads["first"].get_weights()], [*weights, kernel, bias]):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.wide
def test_a_model_that_was_compiled_before_its_batches(world):
    model = feeding.model_in(world)
    data, sampler, batches = feeding.sampled(world)
    epochs = [[[data[i] for i in step] for step in sampler.plan(0)]]
    history = feeding.fit(world, model, feeding.fed_by(world, batches, len(epochs[0]), x="x", y="y"))
    feeding.check(model, history, *feeding.expected(epochs))
