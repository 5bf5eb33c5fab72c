"""A checkpoint that was cut off, changed, killed or had no room is never loaded: the last whole one is."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

import distpad
from distpad import versions
from distpad.saving import files

NAMES = ("state.data-00000-of-00001", "state.index", files.MANIFEST)


def saved(folder, *steps, size=2):
    """Checkpoints of a variable whose value is the step."""
    weight = tf.Variable(tf.zeros([size]))
    checkpoints = distpad.Checkpoints(folder, every_steps=1, weight=weight)
    checkpoints.restore()
    for step in steps:
        weight.assign(tf.fill([size], float(step)))
        checkpoints.step(step)
    return weight


def loaded(folder, size=2):
    """The step that is restored, and the value."""
    weight = tf.Variable(tf.zeros([size]))
    step = distpad.Checkpoints(folder, weight=weight).restore()
    return step, float(weight[0])


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_every_byte_of_every_file(tmp_path, record_fault, how):
    began, count = time.monotonic(), 0
    saved(tmp_path, 1, 2)
    path = files.path_of(tmp_path, 2)
    for name in NAMES:
        content = (path / name).read_bytes()
        for at in range(len(content)):
            changed = content[:at] if how == "cut" else content[:at] + bytes([content[at] ^ 32]) + content[at + 1 :]
            (path / name).write_bytes(changed)
            assert files.newest_whole(tmp_path)[0] == 1, (name, at)
            count += 1
        (path / name).write_bytes(content)
    assert files.newest_whole(tmp_path) == (2, {}) and count > 900
    record_fault(
        f"checkpoint {how} at a byte", "one device", f"last whole one, {count} of {count}", time.monotonic() - began
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file(tmp_path, caplog, name):
    saved(tmp_path, 1, 2, 3)
    (files.path_of(tmp_path, 3) / name).unlink()
    assert loaded(tmp_path) == (2, 2.0)
    assert f"Checkpoints: step 3 in {tmp_path} is not whole: " in caplog.text and name in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "broken-step-00000003"
    saved(tmp_path, 3, 4)
    assert files.steps(tmp_path) == [2, 3, 4] and loaded(tmp_path) == (4, 4.0)


def test_nothing_is_whole(tmp_path):
    saved(tmp_path, 1, 2)
    for step, name in ((1, NAMES[0]), (2, NAMES[2])):
        os.truncate(files.path_of(tmp_path, step) / name, 10)
    text = r"no checkpoint in .* is whole: step 2: manifest.json cannot be read .*; step 1: state.data-\S+ has 10 bytes"
    with pytest.raises(distpad.DistpadError, match=text):
        loaded(tmp_path)
    assert loaded(tmp_path / "empty") == (0, 0.0)


def test_killed_at_every_change_of_the_folder(tmp_path, record_fault):
    """SIGKILL before each call that opens, makes, renames or removes a file, until one process comes to its end."""
    began, found = time.monotonic(), []
    for at in range(200):
        folder = tmp_path / str(at)
        write(folder, 1)
        write(folder, 2)
        process = os.fork()
        if process == 0:
            kill_before(at, str(folder))
            write(folder, 3)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        step, broken = files.newest_whole(folder)
        assert not broken and files.check(files.path_of(folder, step))["step"] == step
        found.append(step)
        write(folder, 4)  # goes on from there
        assert files.newest_whole(folder) == (4, {}) and len(list(folder.iterdir())) <= 2
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert found == sorted(found) and set(found) == {2, 3} and len(found) > 10
    record_fault("SIGKILL while saving", "one device", f"last whole one, {at} of {at}", time.monotonic() - began)


def write(folder, step):
    unfinished = files.prepare(folder)
    for name in NAMES[:2]:
        (unfinished / name).write_bytes(bytes([step]) * 100)
    files.commit(unfinished, step, keep=2)


def kill_before(count, folder):
    """End this process at the call after so many that change the folder."""
    left = [count]

    def hook(event, arguments):
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and folder in str(arguments[0]):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.fixture(params=["a limit of the process", "a full disk"])
def full(request, tmp_path):
    """A folder with room for a small checkpoint but not for a large one, and what makes room."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "a full disk":
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a small disk needs the right to mount: {done.stderr}")
        yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        subprocess.run(["umount", folder], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    room = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    yield folder, room
    room()


def test_no_room(full, record_fault, request):
    began, (folder, make_room) = time.monotonic(), full
    saved(folder, 1)
    weight = tf.Variable(tf.zeros([2]))
    other = tf.Variable(np.random.default_rng(0).random(100_000))
    checkpoints = distpad.Checkpoints(folder, every_steps=1, weight=weight)
    checkpoints.restore()
    large = distpad.Checkpoints(folder, every_steps=1, weight=weight, other=other)
    large._may_begin = True
    with pytest.raises((OSError, tf.errors.OpError)):
        large.step(2)
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]  # nothing takes the room that is left
    assert loaded(folder) == (1, 1.0)
    make_room()
    large.step(2)
    assert files.newest_whole(folder) == (2, {})
    record_fault("no room for a checkpoint", "one device", "error, last whole one", time.monotonic() - began)


def test_a_checkpoint_of_other_objects(tmp_path):
    saved(tmp_path, 1)
    for objects, text in (
        ({"bias": tf.Variable([0.0, 0.0])}, r"bias is not in the checkpoint, expected one of \['weight'\]"),
        ({"weight": [tf.Variable(0.0), tf.Variable(0.0)]}, "weight is with 2 variables, expected 1, as it was saved"),
    ):
        with pytest.raises(distpad.DistpadError, match=text):
            distpad.Checkpoints(tmp_path, **objects).restore()


def test_an_optimiser_that_is_not_built(tmp_path):
    model = tf.keras.Sequential([tf.keras.Input([2]), tf.keras.layers.Dense(1)])
    built, other = (tf.keras.optimizers.SGD(0.1, momentum=0.9) for _ in range(2))
    built.build(model.trainable_variables)
    distpad.Checkpoints(tmp_path, every_steps=1, model=model, optimizer=built).step(1)
    with pytest.raises(distpad.DistpadError, match=r"optimizer is with \d variables, expected \d, .* Build it before"):
        distpad.Checkpoints(tmp_path, model=model, optimizer=other).restore()


def test_random_generators_of_all_kinds(tmp_path):
    """Seeds of Keras's Dropout among them, which tf.train.Checkpoint leaves out. Keras 2 has no access to them."""

    def made():
        layer = (tf.keras if versions.KERAS >= 3 else distpad).layers.Dropout(0.5, seed=1)
        model = tf.keras.Sequential([tf.keras.Input([20]), layer])
        kept = {"model": model, "noise": tf.random.Generator.from_seed(1), "order": np.random.default_rng(1)}
        return {
            **kept,
            "old": np.random.RandomState(1),
            "numbers": random.Random(1),
            "python": random,
            "numpy": np.random,
        }

    def drawn(objects):
        dropped = objects["model"](tf.ones([1, 20]), training=True).numpy().tolist()
        noise = float(objects["noise"].normal([]))
        return [dropped, noise, objects["order"].random(), objects["old"].rand(), random.random(), np.random.rand()]

    before, after = made(), made()
    drawn(before)
    distpad.Checkpoints(tmp_path, every_steps=1, **before).step(1)
    expected = drawn(before)
    assert distpad.Checkpoints(tmp_path, **after).restore() == 1
    assert drawn(after) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "objects is none, expected model=model"),
        ({"distpad_x": 1}, ValueError, r"objects is with \['distpad_x'\], expected names other than root"),
        ({"lock": object()}, TypeError, "lock is a object, expected an object of TensorFlow or Keras, a random"),
        ({"x": tf.Module(), "every_steps": 0}, ValueError, "every_steps is 0, expected at least 1"),
        ({"x": tf.Module(), "every_s": 0}, ValueError, "every_s is 0, expected above 0"),
        ({"x": tf.Module(), "every_s": "1"}, TypeError, "every_s is '1', expected a number"),
        ({"x": tf.Module(), "keep": 0}, ValueError, "keep is 0, expected at least 1"),
        ({"x": tf.Module(), "sync_every": 1.5}, TypeError, "sync_every is 1.5, expected an integer"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, error, message):
    with pytest.raises(error, match=f"Checkpoints: {message}"):
        distpad.Checkpoints(tmp_path, **arguments)
