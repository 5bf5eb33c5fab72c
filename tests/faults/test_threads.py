"""A thread of the input pipeline that dies, in any way, is an error in the training at once."""

from __future__ import annotations

import ctypes
import threading
import time

import numpy as np
import pytest

import distpad

ROWS = [{"y": np.arange(1 + i % 3)} for i in range(64)]
SOON_S = 5.0  # far below timeout_s, on a busy machine


class Indexable:
    def __init__(self, at=-1, does=lambda: None):
        self.at, self.does = at, does

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        if index == self.at:
            self.does()
        return ROWS[index]


def made(source, **options):
    given = {"padding": {"y": distpad.Pad()}, "tokens": "y", "backend": "local", "lookahead": 4}
    return distpad.PaddedBatches(source, 2, **given, **options)


def fails_soon(batches, kind, match=None):
    began = time.monotonic()
    with pytest.raises(kind, match=match):
        list(batches)
    assert time.monotonic() - began < SOON_S


def kill(thread, kind=ZeroDivisionError):
    """Raise an error in a thread, wherever it is in Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(kind))


def named(name):
    return [thread for thread in threading.enumerate() if thread.name == name and thread.ident]


@pytest.mark.parametrize("name", ["distpad-reader", "distpad-padder", "distpad-read"])
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_a_thread_that_cannot_be_started(monkeypatch, name, error):
    start, before = threading.Thread.start, threading.active_count()

    def starts(self):
        if self.name == name:
            raise error
        start(self)

    monkeypatch.setattr(threading.Thread, "start", starts)
    fails_soon(made(Indexable(), num_parallel_reads=2), type(error), str(error) or None)
    monkeypatch.undo()
    time.sleep(0.1)
    assert threading.active_count() <= before


@pytest.mark.parametrize("name", ["distpad-reader", "distpad-padder", "distpad-read"])
def test_a_thread_that_ends_before_its_loop(monkeypatch, name):
    run = threading.Thread.run
    monkeypatch.setattr(threading.Thread, "run", lambda self: None if self.name == name else run(self))
    fails_soon(made(Indexable(), num_parallel_reads=2), distpad.DistpadError, f"thread {name} has died")


@pytest.mark.parametrize("error", [SystemExit, MemoryError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("reads", [1, 2])
def test_an_error_that_would_end_a_thread_silently(error, reads):
    def does():
        raise error

    fails_soon(made(Indexable(9, does), num_parallel_reads=reads), error)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", ["distpad-reader", "distpad-padder", "distpad-read"])
def test_an_asynchronous_error(name):
    goes_on = threading.Event()
    batches = iter(made(Indexable(40, goes_on.wait), num_parallel_reads=1 + (name == "distpad-read")))
    for _ in range(4):
        next(batches)
    for thread in named(name):
        kill(thread)
    goes_on.set()
    fails_soon(batches, (ZeroDivisionError, distpad.DistpadError))


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_asynchronous_errors_at_random_times():
    random = np.random.default_rng(0)
    for _ in range(200):
        name = str(random.choice(["distpad-reader", "distpad-padder", "distpad-read"]))
        batches, began, seen = made(Indexable(), num_parallel_reads=1 + (name == "distpad-read")), time.monotonic(), 0
        at = random.integers(0, 31)
        try:
            for seen, _ in enumerate(batches, 1):
                if seen == at:
                    time.sleep(random.random() * 0.003)
                    for thread in named(name)[:1]:
                        kill(thread)
        except (ZeroDivisionError, distpad.DistpadError):
            pass
        else:
            assert seen == 32  # the thread had done all its work
        assert time.monotonic() - began < SOON_S
