"""Checkpoints in every engine: bit for bit on the same number of replicas, the same training on one device."""

from __future__ import annotations

import itertools
import os
import pathlib
import signal
import time

import numpy as np
import pytest
import tensorflow as tf

import checkpointed
import distpad
import oracle
from checkpointed import Training
from distpad import backends
from distpad.saving import files
from replica_world import alone

WORLDS = ("mirrored:2", "multiworker:2", "horovod:2")


@pytest.fixture
def folder(world, tmp_path):
    """One folder for all workers."""
    return pathlib.Path(world.backend.host_all_gather_bytes(str(tmp_path).encode())[0].decode())


def test_workers_go_on_bit_for_bit(world, folder):
    """Interrupted at step 4, in the second epoch; each worker has random numbers and stats of its own."""
    undisturbed = Training(world.backend, folder / "whole", noisy=True).run(7)[1]
    Training(world.backend, folder / "parts", noisy=True, every_steps=2).run(4)
    first, resumed = Training(world.backend, folder / "parts", noisy=True).run(7)
    assert first == 4
    assert all((a == b).all() for a, b in zip(resumed.pop("weights"), undisturbed.pop("weights")))
    assert resumed == undisturbed


@pytest.mark.worlds("mirrored:2")
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


@pytest.mark.worlds("mirrored:2")
def test_fit_goes_on_with_the_next_epoch(world, folder):
    """fit makes the metric of the loss in its first step: it is no part of what must be there before."""

    def fit(epochs, where):
        with world.scope():
            layers = tf.keras.Input([None, 2]), tf.keras.layers.Dense(1, kernel_initializer="ones")
            model = tf.keras.Sequential(layers)
            squared = lambda t, p: tf.square(p[..., 0] - tf.cast(t, tf.float32))
            loss = distpad.DistributedLoss(squared, backend=world.backend)
            optimizer = distpad.DistributedOptimizer(tf.keras.optimizers.Adam(0.1), backend=world.backend)
            model.compile(loss=loss, optimizer=optimizer)
            model.optimizer.build(model.trainable_variables)
        data = checkpointed.EXAMPLES, distpad.LengthSampler(checkpointed.LENGTHS, global_batch_size=4)
        padding = {"x": distpad.Pad(), "y": distpad.Pad()}
        batches = distpad.PaddedBatches(data, padding=padding, tokens="y", backend=world.backend)
        objects = {"model": model, "batches": batches, "backend": world.backend}
        with distpad.Checkpoints(folder / where, every_steps=1, **objects) as checkpoints:
            first = checkpoints.restore()
            save = tf.keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: checkpoints.step(epoch + 1))
            dataset = batches.for_keras(x="x", y="y")
            model.fit(dataset, initial_epoch=first, epochs=epochs, callbacks=[save], verbose=0)
        return first, model.get_weights()

    undisturbed = fit(3, "whole")[1]
    fit(2, "parts")
    first, resumed = fit(3, "parts")
    assert first == 2
    assert all((a == b).all() for a, b in zip(resumed, undisturbed))


@pytest.mark.worlds("mirrored:2")
def test_stats_count_what_was_consumed(world):
    """Batches that were padded ahead would count again after a restart."""
    source = [{"y": np.ones(1 + (i + world.backend.worker_index) % 3)} for i in range(60)]
    batches = distpad.PaddedBatches(source, 2, padding={"y": distpad.Pad()}, tokens="y", backend=world.backend)
    real = 0
    for batch in itertools.islice(batches, 6):
        time.sleep(0.05)  # the next ones are padded
        real += sum(int(part.numpy().sum()) for part in world.backend.local_results(batch.lengths["y"]))
        assert batches.stats.real == real


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


@pytest.mark.worlds("mirrored:2")
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("a byte less", r"state\.data-\S+ has \d+ bytes, expected \d+"),
        ("another byte", r"state\.data-\S+ does not have its checksum"),
        ("no index", r"\S+state\.index cannot be read \(No such file"),
        ("half a manifest", r"manifest\.json cannot be read"),
    ],
)
def test_what_is_not_whole_is_not_loaded(world, folder, how, why):
    weight = variable(world)
    with distpad.Checkpoints(folder, every_steps=2, backend=world.backend, weight=weight) as checkpoints:
        for done in range(1, 5):
            weight.assign([done, done])
            checkpoints.step(done)
    if world.backend.worker_index == 0:
        damage(files.path_of(folder, 4), how)
    world.backend.host_sum(np.zeros(1))
    again = variable(world)
    assert files.newest_whole(folder)[0] == 2
    world.backend.host_sum(np.zeros(1))
    assert distpad.Checkpoints(folder, backend=world.backend, weight=again).restore() == 2
    assert again.numpy().tolist() == [2, 2] and files.steps(folder) == [2]
    if world.backend.worker_index == 0:
        damage(files.path_of(folder, 2), how)
    world.backend.host_sum(np.zeros(1))
    with pytest.raises(distpad.DistpadError, match=rf"no checkpoint in .* is whole: step 2: {why}.*\. Start with"):
        distpad.Checkpoints(folder, backend=world.backend, weight=again).restore()


@pytest.mark.worlds("mirrored:2")
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


def test_a_state_that_cannot_be_saved_is_an_error_on_all(world, folder):
    class Own:
        def state_dict(self):
            return {"taken": object()} if world.backend.worker_index == 0 else {}

        def load_state_dict(self, state):
            pass

    error, text = TypeError, "Checkpoints: objects is with a object"
    if world.backend.worker_index:
        error, text = distpad.PeerError, "worker 0 failed at step 1: TypeError"
    with pytest.raises(error, match=text):  # noqa: SIM117
        with distpad.Checkpoints(folder, backend=world.backend, weight=variable(world), own=Own()) as checkpoints:
            checkpoints.step(1)


def test_objects_that_differ_between_workers_are_refused(world, folder):
    if not world.several_workers:
        pytest.skip("one worker has all objects")
    objects = {f"weight{world.backend.worker_index}": variable(world)}
    text = r"Checkpoints: the number of variables is \[\{'weight0': 1\}, \{'weight1': 1\}\], expected the same"
    with pytest.raises(distpad.DistpadError, match=text):  # noqa: SIM117
        with distpad.Checkpoints(folder, backend=world.backend, **objects) as checkpoints:
            checkpoints.step(1)
    assert not files.steps(folder)


@pytest.mark.worlds("mirrored:2")
def test_what_is_told_of_objects_and_folders(world, folder):
    given = {"every_steps": 1, "backend": world.backend}
    module = tf.Module()
    module.weight, module.stats = variable(world), [1, 2]  # no stats of PaddedBatches
    with distpad.Checkpoints(folder, **given, module=module) as checkpoints:
        checkpoints.step(4)
    with pytest.raises(
        distpad.DistpadError, match=r"Checkpoints: other is not in the checkpoint, expected one of \['module'\]"
    ):
        distpad.Checkpoints(folder, **given, other=module).restore()
    with pytest.raises(distpad.DistpadError, match=r"objects is with \['draw'\], expected among those"):
        distpad.Checkpoints(folder, **given, module=module, draw=np.random.default_rng()).restore()
    resumed = distpad.Checkpoints(folder, **given, module=module)
    assert resumed.restore() == 4
    with pytest.raises(
        ValueError, match=r"done is 1, expected at least 4, as before\. Count on, also from the steps that were rest"
    ):
        resumed.step(1)
    (folder / "file").touch()
    with pytest.raises(NotADirectoryError, match="a file, expected a folder"):
        distpad.Checkpoints(folder / "file", **given, module=module).restore()
    for wrong, name in (("gs://bucket/saved", "module"), (folder, "save_counter")):
        with pytest.raises(ValueError, match=r"Checkpoints: (folder|objects) is"):
            distpad.Checkpoints(wrong, **given, **{name: module})


@pytest.mark.worlds("mirrored:2")
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
