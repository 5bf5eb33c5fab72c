"""ElasticState in one process: commit, restore, and argument errors. tests/launch has jobs of several."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad

LENGTHS = [3, 1, 4, 1, 5, 9, 2]


def batches(**changes):
    source = [{"y": list(range(n))} for n in LENGTHS], distpad.LengthSampler(LENGTHS, global_batch_size=2)
    return distpad.PaddedBatches(source, padding={"y": distpad.Pad()}, tokens="y", backend="local", **changes)


def made(optimizer=None):
    model = tf.keras.Sequential([tf.keras.Input([2]), tf.keras.layers.Dense(1)])
    optimizer = optimizer or tf.keras.optimizers.Adam(0.1)
    return model, optimizer


def train(model, optimizer, steps=1):
    for _ in range(steps):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tf.ones([1, 2])))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))


def test_model_and_optimiser_go_back_to_the_last_commit():
    model, optimizer = made()
    optimizer.build(model.trainable_variables)
    state = distpad.ElasticState([model, optimizer], backend="local")
    train(model, optimizer, steps=2)
    state.commit()
    kept = [np.array(variable) for variable in [*model.variables, *optimizer.variables]]
    assert len(kept) >= 2 + 1 + 4  # weights, the count of steps, two moments of each
    train(model, optimizer)
    assert int(optimizer.iterations.numpy()) == 3
    state.restore()
    for variable, value in zip([*model.variables, *optimizer.variables], kept):
        np.testing.assert_array_equal(np.array(variable), value)
    assert int(optimizer.iterations.numpy()) == 2


def test_the_place_in_the_data_goes_back_too():
    state = distpad.ElasticState([], batches=batches(), backend="local", seen=[])
    for number, batch in enumerate(state.batches):
        state.seen += [int(i) for i in batch.indices if i >= 0]
        if number == 1:
            state.commit()
        if number == 2:
            break
    state.restore()
    assert len(state.seen) == 4  # a list is copied, not shared with the commit
    for batch in state.batches:
        state.seen += [int(i) for i in batch.indices if i >= 0]
    assert sorted(state.seen) == list(range(len(LENGTHS)))
    assert state.batches.state_dict()["epoch"] == 1


def test_a_function_runs_alone_once():
    calls = []

    @distpad.ElasticState.run
    def train_alone(state, more):
        calls.append(more)
        state.step += more
        state.check_host_updates()
        return state.step

    assert train_alone(distpad.ElasticState([], backend="local", step=1), 2) == 3 and calls == [2]
    assert train_alone.__name__ == "train_alone"
    with pytest.raises(TypeError, match=r"run: state is int, expected a distpad.ElasticState"):
        train_alone(3, 2)


def test_an_optimiser_that_was_not_built_is_named_at_the_first_commit():
    model, optimizer = made()
    state = distpad.ElasticState([model, optimizer], backend="local")
    train(model, optimizer)
    with pytest.raises(
        ValueError, match=r"variables is \d+ now, expected \d+, as in the constructor. Build optimisers"
    ):
        state.commit()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"variables": tf.Variable(1.0)}, TypeError, r"expected a list. Write \[model, optimizer\]"),
        ({"variables": [1.0]}, TypeError, "variables is with a float"),
        ({"batches": [1]}, TypeError, "batches is list, expected a distpad.PaddedBatches"),
        ({"commit": 1}, ValueError, r"objects is with \['commit'\]"),
        ({"batches": None, "_saved": 1}, ValueError, r"objects is with \['_saved'\]"),
        ({"backend": tf.distribute.OneDeviceStrategy("CPU:0")}, ValueError, "expected Horovod, which is elastic"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        distpad.ElasticState(**{"variables": [], "backend": "local", **arguments})


def test_a_source_of_each_workers_own_is_refused():
    own = distpad.PaddedBatches([{"y": [1]}], 1, padding={"y": distpad.Pad()}, tokens="y", backend="local")
    with pytest.raises(ValueError, match="batches is without a sampler"):
        distpad.ElasticState([], batches=own, backend="local")


def test_a_launched_horovod_must_be_initialised(monkeypatch):
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    with pytest.raises(ValueError, match="ElasticState: HOROVOD_SIZE expects 2 ranks, but Horovod is not"):
        distpad.ElasticState([])
