"""Nothing that comes from another process or from a checkpoint is unpickled, or run in another way."""

from __future__ import annotations

import ast
import json
import pathlib
import pickle

import numpy as np
import pytest

import distpad
from distpad.backends import messages
from distpad.collectives import dataset
from distpad.data import plan, schema, sync

ROOT = pathlib.Path(distpad.__file__).parent
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "joblib", "marshal", "copyreg"}
NAMES = {"broadcast_object", "allgather_object", "loads_pickle", "unsafe_load", "full_load", "eval", "exec"}
ALLOWED = {("padding/reading.py", "marshal")}  # dumps alone


def findings(source):
    """What a module uses that runs, or may run, what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ({alias.name.split(".")[0] for alias in node.names} & MODULES)
        elif isinstance(node, ast.ImportFrom):
            yield from ({(node.module or "").split(".")[0]} | {alias.name for alias in node.names}) & (MODULES | NAMES)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec", "yaml.load", "marshal.loads"):
            yield ast.unparse(node.func)
        elif isinstance(node, ast.Attribute) and node.attr in NAMES - {"eval", "exec"}:
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "safe_mode"):
            if node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                yield node.arg
            if node.arg == "safe_mode" and ast.unparse(node.value) != "True":
                yield node.arg


@pytest.mark.one_stack
def test_distpad_uses_no_pickle():
    paths = sorted(ROOT.rglob("*.py"))
    assert len(paths) > 100
    found = {(path.relative_to(ROOT).as_posix(), each) for path in paths for each in findings(path.read_text("utf-8"))}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as c",
        "hvd.broadcast_object(1)",
        "eval(text)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "marshal.loads(f)",
        "load_model(path, safe_mode=False)",
    ],
)
def test_the_search_finds(source):
    assert list(findings(source))


class Evil:
    """Unpickled, it calls ``ran``."""

    def __reduce__(self):
        return ran, ()


RAN = []


def ran():
    RAN.append(1)


BAD = {
    "a pickle": pickle.dumps(Evil()),
    "a pickle of protocol 0": pickle.dumps(Evil(), protocol=0),
    "nothing": b"",
    "another version": b'{"kind2": [1]}',
    "deep": b"[" * 100_000,
    "objects": json.dumps({"array": ["|O", [1], "AAAAAAAAAAA="]}).encode(),
    "a size": json.dumps({"array": ["<i8", [2**40], "AAAAAAAAAAA="]}).encode(),
    "no bytes": b'{"array": ["<i8", [1], "%%"]}',
    "code": b"__import__('os').system('true')",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_state_that_is_none_is_refused(kind):
    with pytest.raises(distpad.PeerError, match="the state of another worker is malformed"):
        messages.unpack(BAD[kind], "the state")
    assert not RAN


def test_a_state_arrives_as_it_was():
    given = {
        "step": 3,
        "rate": 0.1,
        "name": "a",
        "none": None,
        "t": (1, (2, [True])),
        "a": np.arange(6.0).reshape(2, 3),
    }
    given |= {
        "n": np.float32(0.5),
        "dict": {"array": {"tuple": [1]}},
        "big": 2**70,
        "inf": float("inf"),
        "keys": {1: 2, (3, "b"): 4},
    }
    found = messages.unpack(messages.pack(given, "state"), "state")
    np.testing.assert_array_equal(found.pop("a"), given.pop("a"))
    assert found == given and type(found["n"]) is np.float32
    for other in ({3}, {object(): 1}, object(), np.array([None]), Evil()):
        with pytest.raises(TypeError, match="numbers, strings, None"):
            messages.pack(other, "state")


@pytest.mark.parametrize("kind", BAD)
def test_rows_that_are_none_are_refused(kind, tmp_path):
    data = [BAD[kind]]
    if kind == "objects":
        np.savez(tmp_path / "f.npz", header=np.array([Evil()], object))
        data.append((tmp_path / "f.npz").read_bytes())
    for each in data:
        with pytest.raises((distpad.PeerError, Exception)) as raised:
            dataset._unpacked(each)
        assert raised.type is distpad.PeerError
    assert not RAN


@pytest.mark.parametrize("kind", BAD)
def test_a_checkpoint_that_is_none_is_refused(kind):
    padding = {"y": distpad.Pad()}
    batches = distpad.PaddedBatches([{"y": [1]}], 1, padding=padding, tokens="y", backend="local")
    with pytest.raises((ValueError, TypeError)):
        batches.deserialize(BAD[kind].decode("latin-1"))
    assert not RAN and len(list(batches)) == 1


class Peer:
    """A backend of two workers, of which the other one is broken: it changes what the reductions return."""

    name, num_workers, num_replicas, worker_index, replicas_here, strategy, is_elastic = (
        "local",
        2,
        2,
        0,
        1,
        None,
        False,
    )

    def __init__(self, change):
        self.change = change

    def host_merge(self, maxima, sums, limit_s, channel=0):
        return self.change(maxima.copy(), sums.copy())


CHANGES = {
    "nan": lambda maxima, sums: (maxima, sums * np.nan),
    "infinite": lambda maxima, sums: (maxima + np.inf, sums),
    "too few": lambda maxima, sums: (maxima[:-1], sums),
    "too many": lambda maxima, sums: (maxima, np.append(sums, 0)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_numbers_that_no_worker_sends_are_refused(kind):
    config = distpad.PaddedBatches([{"y": [1]}], 1, padding={"y": distpad.Pad()}, tokens="y", backend="local")._config
    exchange = sync.WindowSync(Peer(CHANGES[kind]), config, sync.Channel())
    with pytest.raises(distpad.PeerError, match=r"malformed.*numbers"):
        exchange.merge((np.zeros(3), np.zeros(2)), lambda _: (np.ones(3), np.ones(2)), "steps 0 to 1")


def test_texts_that_are_no_bytes_are_refused():
    config = distpad.PaddedBatches([{"y": [1]}], 1, padding={"y": distpad.Pad()}, tokens="y", backend="local")._config
    for change in (lambda m, s: (m, s + 0.5), lambda m, s: (m, s + 300), lambda m, s: (m + 2.0**40, s)):
        exchange = sync.WindowSync(Peer(change), config, sync.Channel())
        with pytest.raises(distpad.PeerError, match="a text of another worker is malformed"):
            exchange.gather_texts("abc")


@pytest.mark.parametrize(
    "text", ["[]", "{}", "x", '{"structure": 3}', '{"structure": 0, "features": [["y", "os", []]]}']
)
def test_descriptions_of_examples_are_refused(text):
    with pytest.raises(distpad.PeerError, match="malformed"), messages.checked("a description"):
        schema.Features.from_text(text, {})


@pytest.mark.parametrize("at", range(4, 11))
@pytest.mark.parametrize("value", [-1.0, 0.5, 1e18])
def test_reports_that_no_worker_sends_are_refused(at, value):
    config = distpad.PaddedBatches([{"y": [1]}], 1, padding={"y": distpad.Pad()}, tokens="y", backend="local")._config
    maxima, sums = plan.pack(plan.Report.blank(config, 2), 0, 2)
    plan.check(maxima, sums, 2, 2)
    vector, place = (maxima, at) if at < len(maxima) else (sums, at - len(maxima))
    vector[place] = value
    if vector is sums and value == 1e18:
        pytest.skip("a count")
    with pytest.raises(ValueError, match="no batch has"):
        plan.check(maxima, sums, 2, 2)
