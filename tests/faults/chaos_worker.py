"""A worker of an elastic job that trains until a file appears: run by test_chaos.py, under horovodrun.

It commits after each few steps, saves a checkpoint after each epoch, from which a new attempt of the launcher goes on,
and writes to the files ``events`` and ``books`` of its folder, whose every line is an epoch with its examples.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time

import numpy as np

import distpad

EXAMPLES, WIDTH, BATCH, COMMIT_EVERY, RATE, MOMENTUM = 46, 3, 4, 3, 0.05, 0.5
SECONDS = 0.1  # per step, which leaves the cores to the workers that join


def examples() -> list[dict[str, np.ndarray]]:
    """Rows of 1 to 9 positions. The test computes the same rows."""
    rng = np.random.default_rng(5)
    return [{"x": rng.normal(size=[n, WIDTH]), "y": rng.normal(size=[n])} for n in rng.integers(1, 10, size=EXAMPLES)]


def sampler(rows: list[dict[str, np.ndarray]]) -> distpad.LengthSampler:
    return distpad.LengthSampler([len(row["y"]) for row in rows], global_batch_size=BATCH, seed=3)


def main(folder: pathlib.Path) -> None:
    import tensorflow as tf  # the test, which imports this module, does without

    engine = distpad.backends.start("horovod")
    rows = examples()
    padding = {"x": distpad.Pad(), "y": distpad.Pad()}
    batches = distpad.PaddedBatches(
        (rows, sampler(rows)), padding=padding, tokens="y", lookahead=4, backend=engine, timeout_s=120
    )
    weights, velocity = (tf.Variable(np.zeros([WIDTH, 1]), trainable=trains) for trains in (True, False))
    loss_fn = distpad.DistributedLoss(tf.keras.losses.MeanSquaredError(reduction="none"), backend=engine)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, WIDTH], tf.float64),
            tf.TensorSpec([None, None], tf.float64),
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([], tf.float64),
        ]
    )
    def step(x, y, lengths, count):
        with tf.GradientTape() as tape:
            predictions = tf.einsum("blw,wo->blo", x, weights)
            loss = loss_fn(y[..., tf.newaxis], predictions, lengths=lengths, denominator=count)
        (gradient,) = distpad.gradient(tape, loss, [weights], backend=engine)
        velocity.assign(MOMENTUM * velocity - RATE * gradient)
        weights.assign_add(velocity)

    def record(what: str, **more: object) -> None:
        facts = {"what": what, "pid": os.getpid(), "workers": engine.num_workers, "worker": engine.worker_index, **more}
        with (folder / "events").open("a") as events:
            events.write(json.dumps({"at": time.time(), "host": os.uname().nodename, **facts}) + "\n")

    checkpoint = tf.train.Checkpoint(weights=weights, velocity=velocity, batches=batches)
    manager = tf.train.CheckpointManager(checkpoint, str(folder / "saved"), max_to_keep=5)
    if manager.latest_checkpoint:  # equal on all workers of a new job; those that join receive the others' state
        checkpoint.restore(manager.latest_checkpoint)
    position = lambda: batches.state_dict()["epoch"]
    state = distpad.ElasticState([weights, velocity], batches=batches, backend=engine, seen={}, step=0)

    def enter(state: distpad.ElasticState) -> None:
        """Write the epochs that are done to the books."""
        for done in sorted({*state.seen} - {position()}):
            seen = state.seen.pop(done)
            if engine.worker_index == 0:
                with (folder / "books").open("a") as books:
                    books.write(json.dumps([done, seen]) + "\n")

    @distpad.ElasticState.run
    def train(state: distpad.ElasticState) -> str:
        record("began", step=state.step)
        enter(state)  # an epoch at whose last step the workers changed
        # a job ends after whole epochs, also where its workers changed within one
        while batches.state_dict()["step"] or not engine.host_max(np.array([float((folder / "go").exists())]))[0]:
            epoch = position()
            for batch in state.batches:
                step(batch.data["x"], batch.data["y"], batch.lengths["y"], batch.counts.tokens)
                indices = engine.all_gather_rows(tf.convert_to_tensor(batch.indices)).numpy()
                state.seen.setdefault(epoch, []).extend(int(index) for index in indices if index >= 0)
                state.step += 1
                record("step", step=state.step)
                time.sleep(SECONDS)
                if state.step % COMMIT_EVERY == 0:
                    state.commit()
            enter(state)
            if engine.worker_index == 0:
                manager.save(checkpoint_number=position())
            state.commit()
        return "done"

    assert train(state) == "done"
    if engine.worker_index == 0:
        result = {"weights": np.ravel(weights.numpy()).tolist(), "epochs": position()}
        (folder / f"result-{os.getpid()}").write_text(json.dumps(result))
    engine.close()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
