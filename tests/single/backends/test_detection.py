"""Detection of the engine: by name, by scope, by environment; and the errors where two engines are possible."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import tensorflow as tf

import distpad
from distpad import backends
from distpad.backends import detection

SIZES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
TWO_WORKERS = json.dumps({"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}})


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("TF_CONFIG", *SIZES):
        monkeypatch.delenv(name, raising=False)


def needs_horovod():
    return pytest.mark.skipif(
        importlib.util.find_spec("horovod") is None, reason="Horovod is not installed: launch/install_horovod.sh"
    )


# -- by name ----------------------------------------------------------------------------------------------------------


def test_each_rank_takes_its_own_gpu():
    start = sys.modules["distpad.backends.start"]  # distpad.backends.start is the function in it
    gpus = ["GPU:0", "GPU:1"]
    assert [start._gpu_of(rank, gpus) for rank in (0, 1)] == gpus
    assert start._gpu_of(3, ["GPU:0"]) == "GPU:0"  # the launcher made a single GPU visible, whose index is 0
    with pytest.raises(ValueError, match=r"start: local rank is 2, expected below 2, the GPUs here"):
        start._gpu_of(2, gpus)


def test_alone_is_local():
    found = backends.resolve()
    assert (found.name, found.num_replicas, found.num_workers, found.worker_index) == ("local", 1, 1, 0)


def test_a_backend_is_returned_unchanged():
    backend = backends.LocalBackend()
    assert backends.resolve(backend) is backend


def test_a_strategy_becomes_a_backend():
    found = backends.resolve(tf.distribute.OneDeviceStrategy("CPU:0"))
    assert isinstance(found, backends.StrategyBackend) and found.num_replicas == 1


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="distpad: backend is 'Horovod', expected one of 'local', 'horovod'"):
        backends.resolve("Horovod")


@pytest.mark.parametrize("wrong", [3, True, ["local"], backends.LocalBackend, tf.distribute.MirroredStrategy])
def test_a_wrong_type_lists_the_types(wrong):
    with pytest.raises(TypeError, match=r"backend is \w+, expected a Backend, a tf.distribute.Strategy, 'local'"):
        backends.resolve(wrong)


CALLS = {
    "DistributedLoss": lambda: distpad.DistributedLoss(abs, backend="gloo")(tf.zeros([1, 1]), tf.zeros([1, 1])),
    "pad_to_global_max": lambda: distpad.pad_to_global_max(tf.zeros([1, 1]), backend="gloo"),
    "gather": lambda: distpad.gather(tf.zeros([1, 1]), backend="gloo"),
    "broadcast_variables": lambda: distpad.broadcast_variables([], backend="gloo"),
    "scale_regularization": lambda: distpad.scale_regularization([], backend="gloo"),
    "global_value": lambda: distpad.global_value(1.0, backend="gloo"),
    "gradient": lambda: distpad.gradient(tf.GradientTape(), 1.0, [], backend="gloo"),
    "certify": lambda: distpad.certify(backend="gloo"),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_message_names_the_function_that_was_called(name):
    with pytest.raises(ValueError, match=f"^{name}: backend is 'gloo'"):
        CALLS[name]()


# -- by scope ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda: tf.distribute.OneDeviceStrategy("CPU:0"), lambda: tf.distribute.MirroredStrategy(["CPU:0"])],
    ids=["onedevice", "mirrored"],
)
def test_the_strategy_in_scope(make):
    strategy = make()
    with strategy.scope():
        assert backends.resolve().strategy is strategy
    found = []
    strategy.run(lambda: found.append((backends.resolve().strategy, backends.resolve().in_replica())))
    assert found == [(strategy, True)]
    assert backends.resolve().name == "local"


def test_backend_overrides_the_scope():
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        assert backends.resolve("local").name == "local"


def test_a_collective_outside_run_is_refused():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    backend = backends.resolve(strategy)
    with pytest.raises(ValueError, match=r"called outside MirroredStrategy.run, expected inside it"):
        backend.all_reduce(tf.constant(1.0))


def test_a_parameter_server_strategy_is_refused():
    """The check looks at the class; making a strategy would start a cluster."""
    strategy = object.__new__(tf.distribute.ParameterServerStrategy)
    for refuse in (backends.resolve, backends.StrategyBackend):
        with pytest.raises(ValueError, match=r"ParameterServerStrategy.*, expected a synchronous strategy"):
            refuse(strategy)


def test_a_strategy_backend_needs_a_strategy():
    with pytest.raises(TypeError, match=r"strategy is str, expected a tf.distribute.Strategy"):
        backends.StrategyBackend("mirrored")


# -- by environment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cluster", [{"worker": ["a:1", "b:1"]}, {"chief": ["a:1"], "worker": ["b:1"]}], ids=["workers", "chief"]
)
def test_a_worker_of_several_needs_its_strategy(monkeypatch, cluster):
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster}))
    with pytest.raises(ValueError, match=r"^gather: TF_CONFIG names 2 workers, but no strategy is in scope") as raised:
        distpad.gather(tf.zeros([1, 1]))
    assert "backend=strategy" in str(raised.value) and "backend='local'" in str(raised.value)


@pytest.mark.parametrize("variable", SIZES)
def test_a_rank_of_several_needs_horovod(monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(ValueError, match=f"{variable} expects 2 ranks, but Horovod is not initialised") as raised:
        distpad.gather(tf.zeros([1, 1]))
    assert "init()" in str(raised.value) and "backend='local'" in str(raised.value)


def test_local_is_accepted_in_a_job_of_several(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", TWO_WORKERS)
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    assert backends.resolve("local").num_replicas == 1
    assert float(distpad.global_value(tf.constant(2.0), backend="local")) == 2
    assert distpad.gather(tf.ones([2, 1]), backend="local").values.shape == (2, 1)


def test_a_scope_is_accepted_in_a_job_of_several(monkeypatch):
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        assert backends.resolve().strategy is strategy


@pytest.mark.parametrize(
    "harmless",
    [
        {"TF_CONFIG": ""},
        {"TF_CONFIG": "{}"},
        {"TF_CONFIG": "not JSON"},
        {"TF_CONFIG": json.dumps({"cluster": {"worker": ["a:1"]}})},
        {"HOROVOD_SIZE": "1"},
        {"HOROVOD_SIZE": ""},
    ],
    ids=str,
)
def test_one_worker_is_alone(monkeypatch, harmless):
    for name, value in harmless.items():
        monkeypatch.setenv(name, value)
    assert backends.resolve().name == "local"


# -- Horovod ----------------------------------------------------------------------------------------------------------


def test_horovod_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", None)
    with pytest.raises(ImportError, match=r"Horovod is not installed.*launch/install_horovod.sh"):
        backends.resolve("horovod")
    assert backends.resolve().name == "local"


@needs_horovod()
def test_horovod_that_is_not_initialised():
    with pytest.raises(ValueError, match=r"Horovod is not initialised. Call horovod.tensorflow.init\(\) first"):
        backends.resolve("horovod")
    assert backends.resolve().name == "local"


@pytest.mark.parametrize("op", ["adasum", "Adasum"])
def test_adasum_is_refused(op):
    with pytest.raises(ValueError, match=f"op is '{op}', expected a mean or a sum; Adasum is neither"):
        backends.HorovodBackend(op=op)


@pytest.mark.parametrize("op", ["mean", "max", None])
def test_unknown_reductions_are_refused(op):
    with pytest.raises(ValueError, match=f"op is {op!r}, expected one of 'average', 'sum'"):
        backends.HorovodBackend(op=op)


def test_several_ranks_and_a_strategy_of_several_replicas(monkeypatch):
    """Both engines would reduce. Here both are simulated; tests/workers has real ones."""
    monkeypatch.setattr(detection, "_horovod_ranks", lambda: 2)
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    monkeypatch.setattr(type(strategy), "num_replicas_in_sync", property(lambda self: 4))
    with strategy.scope(), pytest.raises(ValueError, match=r"Horovod runs 2 ranks and OneDeviceStrategy.* 4 replicas"):
        backends.resolve()


# -- start ------------------------------------------------------------------------------------------------------------


def test_start_lists_its_kinds():
    with pytest.raises(ValueError, match="kind is 'gpu', expected one of 'auto', 'local', 'mirrored', 'multiworker'"):
        backends.start("gpu")


def test_start_compares_the_number_of_replicas():
    with pytest.raises(ValueError, match="replicas is 3, expected 1, the number of replicas of local"):
        backends.start("local", 3)
    assert backends.start("local", 1).name == backends.start().name == "local"


def test_start_needs_a_cluster_for_multiworker():
    with pytest.raises(ValueError, match="TF_CONFIG is not set"):
        backends.start("multiworker")
