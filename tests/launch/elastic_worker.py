"""A worker of an elastic job that trains a linear model: run by test_elastic.py, under horovodrun or alone.

It records its events in files of its folder, and waits at two thirds of its steps until the test creates a file there.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time

import numpy as np

import distpad

EXAMPLES, WIDTH, BATCH, EPOCHS, COMMIT_EVERY, RATE = 46, 3, 4, 3, 5, 0.05
SECONDS = 0.05  # per step


def examples() -> list[dict[str, np.ndarray]]:
    """Rows of 1 to 9 positions. The test computes the same rows."""
    rng = np.random.default_rng(5)
    return [{"x": rng.normal(size=[n, WIDTH]), "y": rng.normal(size=[n])} for n in rng.integers(1, 10, size=EXAMPLES)]


def sampler(rows: list[dict[str, np.ndarray]]) -> distpad.LengthSampler:
    return distpad.LengthSampler([len(row["y"]) for row in rows], global_batch_size=BATCH, seed=3)


def main(folder: pathlib.Path) -> None:
    import tensorflow as tf  # the tests, which import this module, do without

    engine = distpad.backends.start("horovod" if "HOROVOD_RANK" in os.environ else "local")
    tf.keras.backend.set_floatx("float64")
    rows = examples()
    padding = {"x": distpad.Pad(), "y": distpad.Pad()}
    batches = distpad.PaddedBatches(
        (rows, sampler(rows)), padding=padding, tokens="y", lookahead=4, backend=engine, timeout_s=120
    )
    model = tf.keras.Sequential([tf.keras.Input([None, WIDTH]), tf.keras.layers.Dense(1, use_bias=False)])
    model.set_weights([np.zeros([WIDTH, 1])])
    optimizer = tf.keras.optimizers.SGD(RATE, momentum=0.5)
    optimizer.build(model.trainable_variables)
    loss_fn = distpad.DistributedLoss(tf.keras.losses.MeanSquaredError(reduction="none"), backend=engine)

    # Traced once, for batches of any shape, so that the trace is the same for any number of workers.
    traces = []

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, WIDTH], tf.float64),
            tf.TensorSpec([None, None], tf.float64),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([], tf.float64),
        ]
    )
    def step(x, y, lengths, count):
        traces.append(None)
        with tf.GradientTape() as tape:
            loss = loss_fn(y[..., tf.newaxis], model(x), lengths=lengths, denominator=count)
        gradients = distpad.gradient(tape, loss, model.trainable_variables, backend=engine)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        # includes a collective in the step whose result has a slot for each replica
        widest, _, _ = distpad.pad_to_global_max(y, lengths=lengths, backend=engine)
        return distpad.global_value(loss, backend=engine), tf.shape(widest)[1]

    def record(what: str, **more: object) -> None:
        facts = {"what": what, "pid": os.getpid(), "workers": engine.num_workers, "worker": engine.worker_index, **more}
        with (folder / "events").open("a") as events:
            events.write(json.dumps({"at": time.time(), **facts}) + "\n")

    state = distpad.ElasticState([model, optimizer], batches=batches, backend=engine, step=0, seen=[], losses=[])
    steps = EPOCHS * -(-EXAMPLES // BATCH)
    hold = 2 * steps // 3

    @distpad.ElasticState.run
    def train(state: distpad.ElasticState) -> str:
        record("began", step=state.step)
        if state.step == hold:
            wait(state)
        while state.step < steps:
            epoch = state.batches.state_dict()["epoch"]
            for batch in state.batches:
                loss, _ = step(batch.data["x"], batch.data["y"], batch.lengths["y"], batch.counts.tokens)
                indices = engine.all_gather_rows(tf.convert_to_tensor(batch.indices)).numpy()
                state.seen.append([epoch, *(int(index) for index in indices if index >= 0)])
                state.losses.append(float(loss))
                state.step += 1
                record("step", step=state.step)
                time.sleep(SECONDS)
                if state.step % COMMIT_EVERY == 0:
                    state.commit()
                if state.step == hold:
                    state.commit()
                    wait(state)
        engine.host_sum(np.zeros(1))  # no worker leaves before all are done
        return "done"

    def wait(state: distpad.ElasticState) -> None:
        record("waits", step=state.step)
        while not engine.host_max(np.array([float((folder / "go").exists())]))[0]:
            time.sleep(0.1)
            state.check_host_updates()

    assert train(state) == "done"
    assert len(traces) <= 2, "the optimiser's first step is traced twice, but a change of workers is no reason to"
    record("done", step=state.step)
    if engine.worker_index == 0:
        weights = np.ravel(model.get_weights()[0]).tolist()
        result = {"weights": weights, "seen": state.seen, "losses": state.losses, "step": state.step}
        (folder / f"result-{os.getpid()}").write_text(json.dumps(result))
    engine.close()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
