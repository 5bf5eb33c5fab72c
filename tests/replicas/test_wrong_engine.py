"""A backend, counts or a place of the call that is not the engine's: an error that says what to write, no number."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
import keras_world
from distpad import backends


@pytest.fixture(autouse=True)
def _several(world):
    if world.num_replicas == 1:
        pytest.skip("one replica is one device")


def calls(backend):
    """Each function of a training step, given a backend."""
    weight = tf.Variable(1.0)

    def loss_of(average="token"):
        loss_fn = distpad.DistributedLoss("mse", average=average, backend=backend)
        return lambda: loss_fn(tf.zeros([1, 2, 1]), tf.ones([1, 2, 1]), lengths=[2])

    def gradient():
        with tf.GradientTape() as tape:
            loss = weight * 1.0
        return distpad.gradient(tape, loss, [weight], backend=backend)[0]

    return {
        "loss": loss_of(),
        "loss of sequences": loss_of("sequence_mean"),
        "loss with a denominator": lambda: distpad.DistributedLoss("mae", backend=backend)(
            tf.zeros([1, 2, 1]), tf.ones([1, 2, 1]), lengths=[2], denominator=2
        ),
        "gradient": gradient,
        "clip_by_global_norm": lambda: distpad.clip_by_global_norm([tf.ones([])], 1.0, backend=backend)[1],
        "scale_regularization": lambda: distpad.scale_regularization([tf.ones([])], backend=backend),
        "global_value": lambda: distpad.global_value(tf.ones([]), backend=backend),
    }


ONE_DEVICE = {
    "name": lambda: "local",
    "backend": backends.LocalBackend,
    "strategy": lambda: tf.distribute.OneDeviceStrategy("CPU:0"),
}


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", ONE_DEVICE)
def test_a_backend_of_one_device_in_a_step_of_several_replicas(world, kind, graph):
    made = calls(ONE_DEVICE[kind]())
    refused = rf"backend is .*, with 1 replica, expected one of all {world.num_replicas} "
    for name in list(made)[:1] if graph else made:
        with pytest.raises(ValueError, match=refused):
            world.run(lambda _, name=name: made[name](), np.int64, graph=graph)


def test_padding_and_gathering_of_one_device_in_a_replica(world):
    if world.strategy is None:
        pytest.skip("a rank of Horovod is a process, which may pad for itself")
    for function in (distpad.pad_to_global_max, distpad.gather):
        with pytest.raises(ValueError, match="backend is 'local', with 1 replica"):
            world.run(lambda _, function=function: function(tf.ones([1, 2]), backend="local"), np.int64, graph=False)


def test_one_device_beside_the_engine_is_run_alone(world):
    def alone():
        loss_fn = distpad.DistributedLoss("mae", backend="local")
        return loss_fn(tf.zeros([1, 2, 1]), tf.ones([1, 2, 1]), lengths=[2])

    assert float(backends.run_alone(alone)) == 1.0


# -- batches and counts of another engine ------------------------------------------------------------------------------


def local_batch():
    source = [{"y": np.ones([n, 1], "float32")} for n in (3, 1)]
    batches = distpad.PaddedBatches(source, 2, padding={"y": distpad.Pad()}, tokens="y", backend="local")
    return next(iter(batches))


@pytest.mark.parametrize("average", ["token", "sequence_sum", "sequence_mean"])
@pytest.mark.parametrize("how", ["batch", "denominator"])
def test_a_batch_that_was_made_for_one_device(world, average, how):
    """As tutorials make data sets: outside the scope. Its counts are those of one replica."""
    batch = local_batch()
    loss_fn = distpad.DistributedLoss("mae", average=average, backend=world.backend)

    def step(_):
        y = batch.data["y"]
        given = {"batch": batch} if how == "batch" else {"lengths": batch.lengths["y"], "denominator": batch.counts}
        return loss_fn(y, tf.zeros_like(y), **given)

    found = rf"\(1, {world.num_replicas}\)"
    with pytest.raises(ValueError, match=rf"another number of replicas .*backend=.*{found}"):
        world.run(step, np.int64, graph=False)


def test_a_batch_that_was_made_for_one_device_in_a_graph(world):
    if world.several_workers and world.strategy is not None:
        pytest.skip("TensorFlow's own collectives do not work again after a graph that failed")
    batch = local_batch()
    loss_fn = distpad.DistributedLoss("mae", backend=world.backend)
    step = lambda _: loss_fn(batch.data["y"], tf.zeros_like(batch.data["y"]), batch=batch)
    with pytest.raises(tf.errors.InvalidArgumentError, match="another number of replicas"):
        world.run(step, np.int64)


@pytest.mark.parametrize("average", ["token", "sequence_mean"])
def test_counts_of_another_feature(world, average):
    """Speech: frames are counted, the loss is averaged over the positions of texts. Found out without a collective."""
    source = [{"x": np.ones([4 * n]), "y": np.ones([n, 1], "float32")} for n in (3, 1)]
    padding = {"x": distpad.Pad(), "y": distpad.Pad()}
    with world.scope():
        batches = distpad.PaddedBatches(source, 2, padding=padding, tokens="x", replicated=True, backend=world.backend)
    (batch,) = map(world.backend.local_results, batches)
    loss_fn = distpad.DistributedLoss("mae", average=average, backend=world.backend)

    def step(replica):
        mine = batch[int(replica) % len(batch)]
        y = mine.data["y"]
        return loss_fn(y, tf.zeros_like(y), lengths=mine.lengths["y"], denominator=mine.counts)

    with pytest.raises(ValueError, match="Counts of other positions than this call averages over"):
        world.run(step, np.int64, graph=False)


# -- add_loss ----------------------------------------------------------------------------------------------------------


def endpoint(world):
    """A model as Keras's OCR example is written: a layer adds the loss."""
    loss_fn = distpad.DistributedLoss("mse", backend=world.backend)

    class Endpoint(tf.keras.layers.Layer):
        def call(self, inputs):
            y_true, y_pred = inputs
            self.add_loss(loss_fn(y_true, y_pred, lengths=tf.fill([tf.shape(y_true)[0]], 2)))
            return y_pred

    x, y = tf.keras.Input([2, 3]), tf.keras.Input([2, 1])
    return tf.keras.Model([x, y], Endpoint()([y, tf.keras.layers.Dense(1)(x)]))


def test_a_loss_that_a_layer_adds(world):
    """Keras divides what is added by the number of replicas of a strategy; Horovod's ranks it does not know."""
    data = [tf.ones([4, 2, 3]), tf.zeros([4, 2, 1])]
    if world.strategy is None:
        model = endpoint(world)
        model.compile(optimizer=keras_world.fit_optimizer(world, tf.keras.optimizers.SGD(0.1)))
        distpad.broadcast_variables(model.variables)
        before = [variable.numpy() for variable in model.trainable_variables]
        model.fit(data, batch_size=4, verbose=0)
        predicted = data[0].numpy() @ before[0] + before[1]  # the same rows on all ranks: one device's step
        expected = before[0] - 0.1 * np.mean(2 * predicted * data[0].numpy(), axis=(0, 1))[:, None]
        np.testing.assert_allclose(model.trainable_variables[0].numpy(), expected, rtol=1e-5)
        return

    def train():
        with world.scope():
            model = endpoint(world)
            model.compile(optimizer=tf.keras.optimizers.SGD(0.1))
        model.fit(data, batch_size=4, verbose=0)

    with pytest.raises(ValueError, match=r"the layer Endpoint, expected outside of layers: Keras divides .*add_loss"):
        train()
