"""The epochs that fit trains when it is called again, after an evaluation, or with a loaded position."""

from __future__ import annotations

import numpy as np
import pytest
import test_for_keras as feeding
from test_for_keras import collected  # noqa: F401 (the fixture collects the iterators of fit)

import distpad
import oracle

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")


@pytest.mark.parametrize(
    ("how", "count"),
    [
        pytest.param("new datasets", 20, marks=pytest.mark.worlds("local", "multiworker:2", "horovod:2")),
        pytest.param("one dataset", 20, marks=pytest.mark.worlds("mirrored:2")),
        pytest.param("one dataset", 12, marks=pytest.mark.wide),
        pytest.param("one dataset", 38, marks=pytest.mark.wide),
        pytest.param("one dataset", 46, marks=pytest.mark.wide),
        pytest.param("repeat", 46, marks=pytest.mark.wide),
        pytest.param("repeat", 15, marks=pytest.mark.wide),
    ],
)
def test_three_calls_of_fit_train_three_epochs(world, how, count):
    """Also with an evaluation and a saved position between the calls; a resumed job trains the fourth epoch."""
    data = feeding.examples(count)
    sampler = distpad.LengthSampler([len(e["y"]) for e in data], global_batch_size=8, seed=1)
    steps = len(sampler.plan(0))
    batches, held_out, resumed = (feeding.made(world, (data, sampler)) for _ in range(3))
    model, validation = feeding.model_in(world), feeding.fed_by(world, held_out, steps, x="x", y="y")
    repeat = how == "repeat" or feeding.must_repeat(world)
    options = {"steps_per_epoch": steps} if repeat else {}
    known = batches.for_keras(x="x", y="y", repeat=repeat) if how == "one dataset" else None

    def train(batches, number):
        dataset = known or batches.for_keras(x="x", y="y", repeat=repeat)
        history = feeding.fit(world, model, (dataset, options))
        epochs = [[[data[i] for i in step] for step in sampler.plan(e)] for e in range(number + 1)]
        means, weights = feeding.expected(epochs)
        assert oracle.relative_error(history.history["loss"], means[-1:]) <= 1e-5, number
        for found, wanted, start in zip(model.get_weights(), weights, oracle.weights()):
            assert oracle.relative_error(found - start, wanted - start) <= 1e-5, number

    for number in range(3):
        train(batches, number)
        state = batches.state_dict()
        assert (state["epoch"], state["step"]) == (number + 1, 0)
        if number == 0 and not feeding.must_repeat(world):
            with world.scope():
                model.evaluate(validation[0], verbose=0)
    known = None
    resumed.load_state_dict(state)
    train(resumed, 3)


def test_fit_and_loops_take_turns(world):
    """An epoch in a loop, one in fit, half of one in a loop: the next fit trains the epoch after it."""
    if world.kind == "multiworker":
        pytest.skip("tf.data's threads and the loop's cannot both lead a worker's exchanges")
    data = feeding.examples(20)
    sampler = distpad.LengthSampler([len(e["y"]) for e in data], global_batch_size=8, seed=1)
    batches, model = feeding.made(world, (data, sampler)), feeding.model_in(world)

    def loop(steps):
        found = [batch.counts.tokens for batch, _ in zip(batches, range(steps))]
        return [int(world.strategy.experimental_local_results(each)[0] if world.strategy else each) for each in found]

    def wanted(number):
        return [sum(len(data[i]["y"]) for i in step) for step in sampler.plan(number)]

    assert loop(9) == wanted(0)
    feeding.fit(world, model, (batches.for_keras(x="x", y="y"), {}))
    assert loop(2) == wanted(2)[:2]
    feeding.fit(world, model, (batches.for_keras(x="x", y="y"), {}))
    assert loop(9) == wanted(4)
    assert np.isfinite(model.get_weights()[0]).all()
