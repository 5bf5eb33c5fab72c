"""Checkpoints in every engine: bit for bit on the same number of replicas, the same training on one device."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import random
import signal
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

import distpad
import oracle
from distpad import backends
from distpad.saving import files
from replica_world import alone

WORLDS = ("mirrored:2", "multiworker:2", "horovod:2")
LENGTHS = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5, 2, 4]
EXAMPLES = [
    {"x": np.linspace(-1, i / 12, 2 * n, dtype="float32").reshape(n, 2), "y": np.ones(n)} for i, n in enumerate(LENGTHS)
]


@pytest.fixture
def folder(world, tmp_path):
    """One folder for all workers."""
    return pathlib.Path(world.backend.host_all_gather_bytes(str(tmp_path).encode())[0].decode())


class Training:
    """A linear model with momentum and dropout, whose every random number comes from a saved state."""

    def __init__(self, backend, folder, *, noisy=False, **options):
        self.backend, self.noisy = backend, noisy  # a generator's numbers differ between replicas
        with backend.scope():
            self.dropout = distpad.layers.Dropout(0.5, seed=3)
            self.dense = tf.keras.layers.Dense(1, kernel_initializer="ones")
            self.model = tf.keras.Sequential([tf.keras.Input([None, 2]), self.dense])
            self.dropout.build([None, None, 2])
            self.optimizer = tf.keras.optimizers.SGD(0.05, momentum=0.9)
            self.optimizer.build(self.model.trainable_variables)
            self.noise = tf.random.Generator.from_seed(5)
        self.order, self.numbers = np.random.default_rng(backend.worker_index), random.Random(backend.worker_index)
        data = EXAMPLES, distpad.LengthSampler(LENGTHS, global_batch_size=4)
        padding = {"x": distpad.Pad(), "y": distpad.Pad()}
        self.batches = distpad.PaddedBatches(data, padding=padding, tokens="y", backend=backend)
        self.loss = distpad.DistributedLoss(lambda t, p: tf.square(p[..., 0] - t), backend=backend)
        saved = {"model": self.model, "optimizer": self.optimizer, "batches": self.batches, "noise": self.noise}
        objects = {**saved, "dropout": self.dropout, "order": self.order, "numbers": self.numbers}
        self.checkpoints = distpad.Checkpoints(folder, backend=backend, **objects, **options)

    def step(self, batch):
        with tf.GradientTape() as tape:
            x = self.dropout(batch.data["x"], training=True, indices=batch.indices)
            x = x + self.noise.normal([1, 1, 2]) if self.noisy else x
            loss = self.loss(tf.cast(batch.data["y"], tf.float32), self.model(x), batch=batch)
        variables = self.model.trainable_variables
        gradients = distpad.gradient(tape, loss, variables, backend=self.backend)
        self.optimizer.apply_gradients(zip(gradients, variables))

    def run(self, last):
        """Train from where the folder's checkpoint is to step ``last``; all that belongs to the state."""
        run = self.backend.strategy.run if self.backend.strategy else lambda function, args: function(*args)
        # Python handles signals in the main thread alone
        is_main = threading.current_thread() is threading.main_thread()
        with self.checkpoints if is_main else contextlib.nullcontext():
            first = self.checkpoints.restore()
            for done, batch in zip(range(first + 1, last + 1), self.batches.repeat()):
                run(self.step, args=(batch,))
                self.checkpoints.step(done)
        return first, self.state()

    def state(self):
        stats = {name: count for name, count in self.batches.stats.as_dict().items() if not name.endswith("seconds")}
        drawn = [self.order.random(), self.numbers.random()]
        random_state = [self.noise.state.numpy().tolist(), int(self.dropout.step.numpy()), *drawn]
        weights = [value.copy() for value in self.model.get_weights()]
        return {"weights": weights, "random": random_state, "stats": stats, "position": self.batches.state_dict()}


def test_it_goes_on_bit_for_bit(world, folder):
    """Interrupted at step 4, in the second epoch; each worker has random numbers and stats of its own."""
    undisturbed = Training(world.backend, folder / "whole", noisy=True).run(7)[1]
    Training(world.backend, folder / "parts", noisy=True, every_steps=2).run(4)
    first, resumed = Training(world.backend, folder / "parts", noisy=True).run(7)
    assert first == 4
    assert all((a == b).all() for a, b in zip(resumed.pop("weights"), undisturbed.pop("weights")))
    assert resumed == undisturbed


@pytest.mark.parametrize("shrinks", [True, False])
def test_it_goes_on_on_another_engine_and_number_of_replicas(world, folder, shrinks):
    """From the engine to one device, and from there to the engine: the same training to rounding."""
    here = lambda last: Training(world.backend, folder / "parts").run(last)

    @alone
    def on_one_device(last, where):
        results.append(Training(backends.LocalBackend(), folder / where, every_steps=1).run(last))

    results = []
    mine = f"whole-{world.backend.worker_index}"
    on_one_device(last=5, where=mine)
    undisturbed = results.pop()[1]
    if shrinks:
        here(3)
        on_one_device(last=5, where="parts" if world.backend.worker_index == 0 else mine)
    else:
        if world.backend.worker_index == 0:
            on_one_device(last=3, where="parts")
        world.backend.host_sum(np.zeros(1))
        results[:] = [here(5)]
    first, found = results[0]
    if world.backend.worker_index == 0:
        assert first == 3
    for one, other in zip(found["weights"], undisturbed["weights"]):
        assert oracle.relative_error(one, other) <= 1e-6
    assert found["position"] == undisturbed["position"] and found["random"][:2] == undisturbed["random"][:2]
    real = np.array(found["stats"]["real"])
    total = real if shrinks or world.backend.num_workers == 1 else world.backend.host_sum(real)
    assert int(total) == undisturbed["stats"]["real"]


def test_workers_without_the_folder_get_the_files(world, tmp_path):
    """Each worker has a folder of its own: worker 0 writes into its own, and sends the files."""
    Training(world.backend, tmp_path).run(2)
    assert files.steps(tmp_path) == ([2] if world.backend.worker_index == 0 else [])
    assert Training(world.backend, tmp_path).run(3)[0] == 2


def variable(world, value=1.0):
    with world.scope():
        return tf.Variable([value, value])


def damage(path, how):
    data = path / "state.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    if how == "a byte less":
        data.write_bytes(content[:-1])
    elif how == "another byte":
        content[-1] ^= 1
        data.write_bytes(content)
    elif how == "no index":
        (path / "state.index").unlink()
    else:
        (path / files.MANIFEST).write_bytes((path / files.MANIFEST).read_bytes()[:-9])


@pytest.mark.parametrize("how", ["a byte less", "another byte", "no index", "half a manifest"])
def test_what_is_not_whole_is_not_loaded(world, folder, how):
    weight = variable(world)
    with distpad.Checkpoints(folder, every_steps=2, backend=world.backend, weight=weight) as checkpoints:
        for done in range(1, 5):
            weight.assign([done, done])
            checkpoints.step(done)
    if world.backend.worker_index == 0:
        damage(files.path_of(folder, 4), how)
    world.backend.host_sum(np.zeros(1))
    again = variable(world)
    assert distpad.Checkpoints(folder, backend=world.backend, weight=again).restore() == 2
    assert again.numpy().tolist() == [2, 2] and files.steps(folder) == [2]
    if world.backend.worker_index == 0:
        damage(files.path_of(folder, 2), how)
    world.backend.host_sum(np.zeros(1))
    with pytest.raises(distpad.DistpadError, match=r"no checkpoint in .* is whole: step 2: .*\. Start with an empty"):
        distpad.Checkpoints(folder, backend=world.backend, weight=again).restore()


def test_it_has_its_name_only_when_it_is_on_the_disk(world, folder, monkeypatch):
    seen, flush = [], files._flush
    monkeypatch.setattr(files, "_flush", lambda path: (seen.append(files.steps(folder)), flush(path)))
    weight = variable(world)
    with distpad.Checkpoints(folder, every_steps=1, keep=2, backend=world.backend, weight=weight) as checkpoints:
        for done in (1, 2, 3):
            checkpoints.step(done)
    world.backend.host_sum(np.zeros(1))
    assert files.steps(folder) == [2, 3] and len(list(folder.iterdir())) == 2
    if world.backend.worker_index == 0:
        assert seen == [*[[]] * 4, [1], *[[1]] * 4, [1, 2], *[[1, 2]] * 4, [1, 2, 3]]


def test_weights_that_differ_are_not_saved(world, folder):
    weight = variable(world)
    local = world.backend.local_results(weight)
    if world.backend.worker_index == world.backend.num_workers - 1:
        local[-1].assign([1.0, 2.0])
    last = world.num_replicas - 1
    text = rf"Checkpoints: weight: .* differs between replicas at step 1: replicas \[{last}\] do not have the values"
    with pytest.raises(distpad.DistpadError, match=text):  # noqa: SIM117
        with distpad.Checkpoints(folder, every_steps=1, backend=world.backend, weight=weight) as checkpoints:
            checkpoints.step(1)
    assert not files.steps(folder)


def test_a_worker_that_cannot_write_is_an_error_on_all(world, folder):
    (folder / "taken").write_text("a file")
    error, text = OSError, "taken"
    if world.backend.worker_index:
        error, text = distpad.PeerError, "Checkpoints: worker 0 failed at step 1: .*taken"
    with pytest.raises(error, match=text):  # noqa: SIM117
        with distpad.Checkpoints(folder / "taken", backend=world.backend, weight=variable(world)) as checkpoints:
            checkpoints.step(1)


def test_a_folder_of_another_training_is_refused(world, folder):
    weight = variable(world)
    with distpad.Checkpoints(folder, every_steps=1, backend=world.backend, weight=weight) as checkpoints:
        checkpoints.step(1)
    world.backend.host_sum(np.zeros(1))
    checkpoints = distpad.Checkpoints(folder, backend=world.backend, weight=weight)
    with pytest.raises(
        ValueError, match=r"Checkpoints: folder is .*, which has checkpoints already, expected an empty"
    ):
        checkpoints.step(1)


def test_sigterm_saves_and_ends_with_143(world, folder, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(world.backend, "close", lambda: None, raising=False)
    checkpoints = distpad.Checkpoints(folder, sync_every=4, backend=world.backend, weight=variable(world))

    def loop():
        with checkpoints:
            for done in itertools.count(1):
                if done == 2 and world.backend.worker_index == world.backend.num_workers - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                    while checkpoints._noted_at is None:  # by a thread
                        time.sleep(0.001)
                checkpoints.step(done)

    with pytest.raises(SystemExit) as ended:
        loop()
    signal.signal(signal.SIGTERM, before)
    world.backend.host_sum(np.zeros(1))
    assert ended.value.code == 143 and files.steps(folder) == [4]


def test_by_time(world, folder):
    """Seconds go by on one worker's clock: all save."""
    weight = variable(world)
    checkpoints = distpad.Checkpoints(folder, every_s=100, sync_every=2, backend=world.backend, weight=weight)
    with checkpoints:
        for done in (1, 2, 3):
            checkpoints._saved_at -= 60 * (done == 2) * (1 + world.backend.worker_index)
            checkpoints.step(done)
            if done == 2:
                world.backend.host_sum(np.zeros(1))
                assert files.steps(folder) == ([2] if world.several_workers else [])
