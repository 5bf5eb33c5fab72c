"""Preemption: SIGTERM at one worker ends all of them at one step, after they have saved."""

from __future__ import annotations

import os
import signal
import time

import pytest
import tensorflow as tf

import distpad

WORLDS = ("mirrored:2", "multiworker:2", "horovod:2")


@pytest.fixture(autouse=True)
def open_engine(world, monkeypatch):
    """The engine goes on for the tests that follow."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(world.backend, "close", lambda: None, raising=False)
    yield
    signal.signal(signal.SIGTERM, before)


def loop(world, preemption, saved_at, told_at):
    """Steps, in one of which the last worker gets SIGTERM; returns the steps that were done."""
    done = 0
    with preemption:
        for done in range(1, 10):
            if done == told_at and world.backend.worker_index == world.backend.num_workers - 1:
                os.kill(os.getpid(), signal.SIGTERM)
                while preemption._noted_at is None:  # by a thread
                    time.sleep(0.001)
            saved_at.append(done)  # what save() finds last
            preemption.step(done)
    return done


@pytest.mark.parametrize(("told_at", "ends_at"), [(2, 4), (4, 4), (9, 9)])
def test_all_workers_save_and_leave_at_one_step(world, told_at, ends_at):
    assert world.backend.num_workers == (2 if world.several_workers else 1)
    steps, saved = [], []
    preemption = distpad.Preemption(lambda: saved.append(steps[-1]), every=4, backend=world.backend)
    with pytest.raises(SystemExit) as ended:
        loop(world, preemption, steps, told_at)
    assert ended.value.code == 143 and saved == [ends_at] and steps[-1] == ends_at
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_without_a_signal_nothing_is_saved(world):
    steps, saved = [], []
    preemption = distpad.Preemption(lambda: saved.append(steps[-1]), every=4, backend=world.backend)
    assert loop(world, preemption, steps, told_at=0) == 9 and not saved


@pytest.mark.parametrize("at_the_end", [False, True])
def test_workers_that_meet_at_different_steps_are_refused(world, at_the_end):
    """The first one leaves its loop early, or counts otherwise: all raise, and nobody waits."""
    if not world.several_workers:
        pytest.skip("one worker meets no other")
    mine = 3 if at_the_end and world.backend.worker_index == 0 else 4 + 4 * world.backend.worker_index
    text = r"Preemption: done is \d on worker \d, expected the same on all workers \(they are at [34] to 8\)"
    with pytest.raises(ValueError, match=text), distpad.Preemption(print, every=4, backend=world.backend) as preemption:
        [*map(preemption.step, (0, mine))]


@pytest.mark.parametrize("argument", ["every", "sync_every", "every_steps"])
def test_workers_that_would_meet_at_different_steps_are_refused(world, argument, tmp_path):
    """Before the first step at which one worker would wait for the other, which makes another collective."""
    if not world.several_workers:
        pytest.skip("one worker meets no other")
    numbers = {argument: 7 + world.backend.worker_index, "backend": world.backend}
    if argument == "every":
        saving = distpad.Preemption(print, **numbers)
    else:
        saving = distpad.Checkpoints(tmp_path, **numbers, weight=tf.Variable(1.0))
    text = rf"{argument} is \d on worker \d, expected the same on all workers \(7 to 8\)"
    with pytest.raises(ValueError, match=text), saving:
        saving.step(1)


def test_steps_that_count_backwards_are_refused(world):
    preemption = distpad.Preemption(print, every=4, backend=world.backend)
    preemption.step(3)
    with pytest.raises(ValueError, match="Preemption: done is 2, expected at least 3, as before"):
        preemption.step(2)


def test_one_block_at_a_time(world):
    """Another object leaves the handler of SIGTERM as it is, and a block within a block is refused."""
    with distpad.Preemption(print, backend=world.backend):
        handler = signal.getsignal(signal.SIGTERM)
        other = distpad.Preemption(print, backend=world.backend)
        with pytest.raises(ValueError, match="the block is within another one"), other:
            pass
        assert signal.getsignal(signal.SIGTERM) == handler != signal.SIG_DFL
    with other:
        pass


def test_a_step_that_is_no_number(world):
    with pytest.raises(TypeError, match=r"Preemption: done is 1\.5, expected an integer"):  # noqa: SIM117
        with distpad.Preemption(print, backend=world.backend) as preemption:
            preemption.step(1.5)


def test_errors_of_the_loop_are_raised(world):
    saved = []
    with pytest.raises(ZeroDivisionError), distpad.Preemption(lambda: saved.append(1), backend=world.backend):
        raise ZeroDivisionError
    assert not saved


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"save": None}, TypeError, "Preemption: save is None, expected a function without arguments"),
        ({"save": print, "every": 0}, ValueError, "Preemption: every is 0, expected at least 1"),
        ({"save": print, "every": 1.5}, TypeError, "Preemption: every is 1.5, expected an integer"),
    ],
)
def test_wrong_arguments(world, arguments, error, message):
    with pytest.raises(error, match=message):
        distpad.Preemption(**arguments, backend=world.backend)
