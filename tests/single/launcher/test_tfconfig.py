"""TF_CONFIG from addresses and Kubernetes, as TensorFlow reads it."""

from __future__ import annotations

import os

import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from distpad.launcher import tfconfig

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


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tfconfig.cluster([], 0), "TF_CONFIG: index is 0, expected"),
        (lambda: tfconfig.cluster(["a:1"], 1), "TF_CONFIG: index is 1, expected an integer from 0 to 0"),
        (lambda: tfconfig.cluster(["a:1"], "-1"), "TF_CONFIG: index is '-1', expected an integer from 0 to 0"),
        (lambda: tfconfig.from_indexed_job("t", 2, "2", service="s", port=9), "index is '2', expected"),
        (lambda: tfconfig.from_jobset("t", [("a", 1, 1)], "c", 0, 0, port=9), "replicated_job is 'c', expected one of"),
        (lambda: tfconfig.from_jobset("t", [("a", 2, 3)], "a", 1, 3, port=9), "pod_index is 3, expected"),
        (lambda: tfconfig.from_jobset("t", [("a", 2, 3)], "a", 2, 0, port=9), "job_index is 2, expected"),
    ],
)
def test_indices_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
