"""TF_CONFIG from addresses and Kubernetes, as TensorFlow reads it; errors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from distpad.launcher import tfconfig
from worlds import end

pytestmark = pytest.mark.one_stack

LABELS = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
COUNTS = st.integers(1, 4)
unhurried = settings(deadline=None)  # the machine may be busy


def read(config: str) -> tuple[list[str], int]:
    """Read TF_CONFIG with TensorFlow's own resolver: the workers' addresses, and the index."""
    before = os.environ.get("TF_CONFIG")
    os.environ["TF_CONFIG"] = config
    try:
        found = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        assert found.task_type == "worker" and found.cluster_spec().jobs == ["worker"]
        return found.cluster_spec().job_tasks("worker"), found.task_id
    finally:
        del os.environ["TF_CONFIG"]
        if before is not None:
            os.environ["TF_CONFIG"] = before


# -- the same on all workers, but for the index -----------------------------------------------------------------------


@unhurried
@given(st.lists(LABELS, min_size=1, max_size=6, unique=True), st.data())
def test_tensorflow_reads_a_cluster(names, data):
    addresses = [f"{name}:{data.draw(st.integers(1, 65535))}" for name in names]
    for index in range(len(addresses)):
        assert read(tfconfig.cluster(addresses, index)) == (addresses, index)
        assert tfconfig.cluster(addresses, str(index)) == tfconfig.cluster(tuple(addresses), index)


@unhurried
@given(LABELS, LABELS, st.integers(1, 12))
def test_every_pod_of_an_indexed_job_finds_itself(job, service, completions):
    for index in range(completions):
        addresses, own = read(tfconfig.from_indexed_job(job, completions, str(index), service=service, port=2222))
        assert addresses[own] == f"{job}-{index}.{service}:2222" and len(set(addresses)) == completions
    config = tfconfig.from_indexed_job(job, 1, 0, service=service, namespace="team-a", port="2222")
    assert read(config) == ([f"{job}-0.{service}.team-a.svc:2222"], 0)


@unhurried
@given(LABELS, st.dictionaries(LABELS, st.tuples(COUNTS, COUNTS), min_size=1, max_size=3), st.booleans())
def test_every_pod_of_a_jobset_finds_itself(jobset, sizes, renamed):
    subdomain = {"subdomain": "workers"} if renamed else {}
    listed = [(name, *size) for name, size in sizes.items()]
    rank = 0
    for name, jobs, pods in listed:
        for job in range(jobs):
            for pod in range(pods):
                config = tfconfig.from_jobset(jobset, listed, name, str(job), str(pod), port=2222, **subdomain)
                addresses, own = read(config)
                host = f"{jobset}-{name}-{job}-{pod}.{'workers' if renamed else jobset}"
                assert (own, addresses[own]) == (rank, f"{host}:2222")
                rank += 1
    assert len(addresses) == rank


SERVES = """
import os, socket, sys
import tensorflow as tf
from distpad.launcher import tfconfig
host = sys.argv[1]
with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as held:  # as late as can be: others look too
    held.bind((host, 0))
    port = held.getsockname()[1]
os.environ["TF_CONFIG"] = tfconfig.cluster([f"[{host}]:{port}" if ":" in host else f"{host}:{port}"], 0)
strategy = tf.distribute.MultiWorkerMirroredStrategy()
print("replicas", strategy.num_replicas_in_sync, flush=True)
"""


@pytest.mark.one_stack
@pytest.mark.wide  # by IPv4 in every world
@pytest.mark.parametrize("host", ["::1", "127.0.0.1"])
def test_tensorflow_serves_at_such_an_address(host):
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as held:
            held.bind((host, 0))
    except OSError as error:
        pytest.skip(f"{host} cannot be bound here: {error}")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVES, host],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        end(process)
    assert process.returncode == 0 and "replicas 1" in output, output


# -- errors -----------------------------------------------------------------------------------------------------------

ERRORS = [
    (lambda: tfconfig.cluster([], 0), "cluster: addresses is [], expected at least one"),
    (lambda: tfconfig.cluster(["a:1"], 1), "cluster: index is 1, expected from 0 to 0, of 1"),
    (lambda: tfconfig.cluster(["a:1"], -1), "cluster: index is -1, expected at least 0"),
    (lambda: tfconfig.cluster(["a:1"], "-1"), "cluster: index is '-1', expected an integer from 0"),
    (lambda: tfconfig.cluster(["a:1"], ""), "cluster: index is '', expected an integer from 0"),
    (lambda: tfconfig.from_indexed_job("t", 1, 0, service="s", port=0), "port is 0, expected at least 1"),
    (lambda: tfconfig.from_indexed_job("t", 1, 0, service="s", port=65536), "port is 65536, expected at most 65535"),
    (
        lambda: tfconfig.from_indexed_job("Train", 2, 0, service="s", port=9),
        "from_indexed_job: job is 'Train', expected a DNS label: at most 63 lower-case letters",
    ),
    (
        lambda: tfconfig.from_indexed_job("t" * 61, 11, 0, service="s", port=9),
        "-10', with 64 characters",
    ),
    (
        lambda: tfconfig.from_indexed_job("t", 2, 0, service="s", namespace="", port=9),
        "from_indexed_job: namespace is '', expected a DNS label",
    ),
    (lambda: tfconfig.from_indexed_job("t", 2, 2, service="s", port=9), "index is 2, expected from 0 to 1, of 2"),
    (
        lambda: tfconfig.from_jobset("t", [("a", 1, 1), ("b", 1, 1)], "c", 0, 0, port=9),
        "from_jobset: replicated_job is 'c', expected one of 'a', 'b'",
    ),
    (
        lambda: tfconfig.from_jobset("t", [("a", 1, 1), ("a", 1, 1)], "a", 0, 0, port=9),
        "from_jobset: replicated_jobs is 'a', expected each name once",
    ),
    (
        lambda: tfconfig.from_jobset("t", [("a", 2, 3)], "a", 1, 3, port=9),
        "from_jobset: pod_index is 3, expected from 0 to 2, of 3",
    ),
    (
        lambda: tfconfig.from_jobset("t", [("a", 2, 3)], "a", 2, 0, port=9),
        "from_jobset: job_index is 2, expected from 0 to 1, of 2",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=r"^\w+: \w+ is .*, expected ") as caught:
        call()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["", "a", "a:", ":1", "a:0", "a:65536", "a:-1", "a:+1", "a: 1", "a b:1", "a/b:1", "http://a:1", "a:1:2", "fd00::1",
     "fd00::1:22", "[fd00::1]", "[a]:1", "[10.0.0.1]:1", "[fe80::1%eth0]:1", "-a:1", "a..b:1", "a\n:1", "a:1\n", "a:１",
     "${HOST}:1", f"{'a' * 254}:1"],
)  # fmt: skip
def test_malformed_addresses_are_refused(address):
    with pytest.raises(ValueError, match=r"^cluster: addresses is .*, expected host:port with a port from 1 to 65535"):
        tfconfig.cluster(["good:1", address], 0)


@pytest.mark.parametrize("same", [["n:1", "N:1"], ["n:1", "n.:1"], ["n:1", "n:01"], ["[::1]:1", "[0:0::1]:1"]])
def test_an_address_counts_once_however_it_is_written(same):
    with pytest.raises(ValueError, match=r"expected each address once\. Workers 0 and 1 would share it"):
        tfconfig.cluster(same, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: tfconfig.cluster("a:1", 0),
        lambda: tfconfig.cluster([1], 0),
        lambda: tfconfig.cluster(["a:1"], 0.0),
        lambda: tfconfig.cluster(["a:1"], True),
        lambda: tfconfig.from_indexed_job("t", 1, 0, service="s", port=None),
        lambda: tfconfig.from_indexed_job(None, 1, 0, service="s", port=1),
        lambda: tfconfig.from_jobset(None, [("a", 1, 1)], "a", 0, 0, port=1),
    ],
)
def test_wrong_types_are_type_errors(call):
    with pytest.raises(TypeError, match=r"^\w+: \w+ is .*, expected "):
        call()


def test_it_is_json_on_one_line():
    """So that it can be passed on by `env`, by ssh and in YAML."""
    text = tfconfig.cluster(["a:1", "b:1"], 0)
    assert "\n" not in text and json.loads(text)["task"] == {"type": "worker", "index": 0}
