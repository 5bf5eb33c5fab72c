"""Hostile arguments of all public functions: only the documented errors, in bounded time and memory."""

from __future__ import annotations

from fractions import Fraction

import hostile
import numpy as np
import pytest
import tensorflow as tf
from hostile_values import Own
from hypothesis import given
from hypothesis import strategies as st

import distpad
import drawn
from distpad import layers, metrics, precision
from distpad.cli import launch
from distpad.data import schema
from distpad.launcher import allocation, spec, topology

HUGE = np.broadcast_to(np.int8(1), [1, 2**40])  # 1 TiB, of which a byte is stored


@pytest.fixture(autouse=True)
def _bounded():
    with hostile.bounded_memory():
        yield


@pytest.mark.parametrize("target", hostile.TARGETS)
@drawn.examples(125)
@given(data=st.binary(min_size=40, max_size=40))
def test_only_documented_errors(target, data):
    case = hostile.run(target, data)
    assert case.error is None
    assert case.seconds < 20  # on a busy machine; fuzz.py has a second on a free one


def deep(depth: int) -> list:
    item: list = []
    for _ in range(depth):
        item = [item]
    return item


CYCLE: list = [1]
CYCLE.append(CYCLE)


class Liar(list):
    def __len__(self) -> int:
        return 10**9


class Failing:
    def __len__(self) -> int:
        raise Own

    __iter__ = __array__ = __index__ = __repr__ = __eq__ = __len__


def batches(**options):
    given = {"batch_size": 1, "padding": {"y": distpad.Pad()}, "tokens": "y", **options}
    return distpad.PaddedBatches([{"y": [1]}], **given)


def sampler(lengths=(1, 2), **options):
    return distpad.LengthSampler(lengths, **{"global_batch_size": 2, **options})


TENSOR = tf.zeros([2, 3])
# what it is | the call | the beginning of the error
KNOWN = {
    "a bool of NumPy as a number": (lambda: distpad.pad([[1]], length=np.True_), "pad: length is"),
    "a bool as a number": (lambda: distpad.pad([[1]], length=True), "pad: length is True, expected an integer"),
    "a length of 5,001 digits": (lambda: distpad.pad([[1]], length=10**5000), "pad: length is a int, expected at most"),
    "a length above int32": (lambda: distpad.pad([[1]], length=2**31), "pad: length is 2147483648, expected at most"),
    "a length of a terabyte": (lambda: distpad.pad([np.zeros([1, 2**20])], length=2**30), "a padded batch is an array of"),
    "a list that contains itself": (lambda: distpad.pad([CYCLE]), r"pad: sequences\[0\] is nested deeper"),
    "a deep list": (lambda: distpad.pad(deep(3000)), "pad: "),
    "a deep list as an option": (lambda: distpad.pad([[1]], padding=deep(3000)), r"pad: padding is \[\[\[\[\[\[\[...\]+, exp"),
    "an array as an option": (lambda: distpad.pad([[1]], padding=np.array(["pre", "post"])), "pad: padding is array"),
    "an array larger than the memory": (lambda: distpad.pad([HUGE[0]]), "a padded batch is an array of shape"),
    "a value larger than the memory": (lambda: distpad.pad([[1]], value=HUGE), "pad: value is an array of shape"),
    "a set": (lambda: distpad.pad({1, 2}), "pad: sequences is a set"),
    "an object without a length": (lambda: distpad.Buckets(Failing()), "|"),
    "a boundary above int64": (lambda: distpad.Buckets([2**63]), "Buckets: boundaries is 9223372036854775808, expected"),
    "boundaries without end": (lambda: distpad.Buckets.geometric(1, 2**60, 1 + 1e-9), "Buckets.geometric: factor is 1.0"),
    "a factor of 1e300": (lambda: distpad.Buckets.geometric(1, 5, float("inf")), "Buckets.geometric: factor is inf"),
    "a fraction above all floats": (lambda: sampler(randomness=Fraction(10**400)), "LengthSampler: randomness is Frac"),
    "NaN": (lambda: sampler(randomness=float("nan")), "LengthSampler: randomness is nan, expected a finite number"),
    "lengths larger than the memory": (lambda: sampler(HUGE[0]), "LengthSampler: lengths is an array of shape"),
    "lengths of several axes": (lambda: sampler([[1], [2, 3]]), "LengthSampler: lengths is"),
    "a batch of 2**31": (lambda: sampler(global_batch_size=2**31), "LengthSampler: global_batch_size is 2147483648"),
    "a batch size of 2**31": (lambda: batches(batch_size=2**31), "PaddedBatches: batch_size is 2147483648, expected"),
    "2**31 micro-batches": (lambda: batches(accumulation_steps=2**31), "PaddedBatches: accumulation_steps is 21474836"),
    "2**31 threads": (lambda: batches(num_parallel_reads=2**31), "PaddedBatches: num_parallel_reads is 2147483648"),
    "a time limit of 1e300": (lambda: batches(timeout_s=1e300), r"PaddedBatches: timeout_s is 1e\+300, expected above"),
    "a state of 2**62 steps": (lambda: batches().load_state_dict({**batches().state_dict(), "step": 2**62}), "PaddedBatches: state's step is"),
    "a state with an array": (lambda: batches().load_state_dict({**batches().state_dict(), "source": np.ones(2)}), "PaddedBatches: state is"),
    "keys that are no names": (lambda: batches(padding={(1,): distpad.Pad()}), "PaddedBatches: padding is"),
    "a deep example": (lambda: schema.Features.learn([{"y": deep(3000)}], {}, guess=True), "PaddedBatches: an example is"),
    "a deep tensor": (lambda: precision.to_tensor(deep(3000), "mask"), "mask is nested more than 32 times"),
    "an object as a tensor": (lambda: precision.to_tensor(object(), "mask"), "mask is <object object"),
    "a tensor larger than the memory": (lambda: precision.to_tensor([HUGE], "mask"), "mask is an array of shape"),
    "a padding value of axes": (lambda: metrics.Perplexity(padding_value=HUGE), "Perplexity: padding_value is"),
    "an axis of 1e400": (lambda: layers.BatchNormalization(axis=10**400), "BatchNormalization: axis is 1000"),
    "labels of 20 axes": (lambda: metrics.TokenAccuracy().update_state(tf.ones([1] * 20), tf.ones([1] * 20)), "labels or pred"),
    "a nest of different rows": (lambda: distpad.gather((TENSOR, TENSOR[:1])), r"gather: tensors\[1\] have other numbers of rows"),
    "an array as a variable": (lambda: distpad.gradient(tf.GradientTape(), TENSOR, [np.ones(2)]), "gradient: variables is"),
    "a string as a gradient": (lambda: distpad.clip_by_global_norm(["a"], 1.0), "clip_by_global_norm: gradients is"),
    "a number of 5,000 digits": (lambda: spec.parse_hosts("a:" + "9" * 5000), "launch: -H a:999"),
    "ranks of 5,000 digits": (lambda: spec.parse_ranks("9" * 5000), "launch: --ranks holds"),
    "a variable of 5,000 digits": (lambda: topology.number({"DISTPAD_HOSTS": "9" * 5000}, "DISTPAD_HOSTS"), "distpad: DISTPAD_HOSTS"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KNOWN)
def test_known_kinds_are_refused(kind):
    call, beginning = KNOWN[kind]
    with pytest.raises(Exception, match=f"^({beginning})") as raised:
        call()
    assert isinstance(raised.value, hostile.DOCUMENTED)


def test_an_object_with_a_wrong_length():
    assert distpad.pad(Liar([[1], [2, 3]])).values.tolist() == [[1, 0], [2, 3]]


def test_max_tokens_needs_no_more_rows_than_can_be_read():
    assert max(sampler(global_batch_size=None, max_tokens=2**62).of_epoch(0).rows) == 2**24


def test_deep_json_and_slurm_numbers(monkeypatch):
    assert topology.expected_workers({"TF_CONFIG": "[" * 3000}) == ("", 1)
    monkeypatch.setattr(allocation, "_expand", lambda nodes: ["a", "b"])
    with pytest.raises(ValueError, match="expected numbers for 2 nodes"):
        allocation.hosts({"SLURM_JOB_NODELIST": "n", "SLURM_TASKS_PER_NODE": "1(x999999999)"})


def test_a_hostfile_that_is_no_text(tmp_path):
    (tmp_path / "hosts").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"launch: --hostfile .* cannot be read"):
        spec.read_hostfile(tmp_path / "hosts")


ALIASES = "hosts:\n- &a [x, x]\n" + "".join(
    f"- &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij")
)


@pytest.mark.parametrize(
    "text", ["hosts: " + "[" * 3000, ALIASES, "np: " + "9" * 5000, "np: 2001-99-99", "np: &a [*a]"]
)
def test_configuration_files(text, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(hostile.DOCUMENTED, match=f"{path.name} cannot be read|a nest of lists|recursive"):
        launch._read_config(hostile.plain.CONTEXT, path)
