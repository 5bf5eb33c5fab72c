"""What is wrong on one replica is refused on all, with the evidence, within seconds; nobody is left waiting."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad


def loss_of(world, **options):
    return distpad.DistributedLoss(lambda t, p: tf.abs(t - p), backend=world.backend, **options)


LAST_WRONG = {
    "a negative length": ([2, -1], "lengths hold a value below 0"),
    "a length above the labels": ([9, 1], "lengths hold a value above the size of axis 1"),
}


def wrong_on_the_last(world, wrong, right):
    return lambda r: wrong if r == world.num_replicas - 1 else right


@pytest.mark.parametrize("case", LAST_WRONG)
def test_wrong_lengths_on_one_replica(world, case):
    wrong, message = LAST_WRONG[case]
    given = wrong_on_the_last(world, np.array(wrong), np.array([1, 2]))
    calls = {
        "loss": lambda lengths: loss_of(world)(tf.zeros([2, 3]), tf.ones([2, 3]), lengths=lengths),
        "pad": lambda lengths: (
            distpad.pad_to_global_max(tf.zeros([2, 3]), lengths=lengths, backend=world.backend).values
        ),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=message) as raised:
            world.run(call, given, graph=False)
        if world.num_replicas > 1:  # the evidence of each replica
            assert f"{world.num_replicas - 1}→{9 if 9 in wrong else -1}" in str(raised.value)


def test_ranks_that_differ_between_replicas(world):
    if world.num_replicas == 1:
        return  # one replica cannot differ from itself
    given = wrong_on_the_last(world, np.zeros([2, 3, 1], "float32"), np.zeros([2, 3], "float32"))
    for function in (distpad.pad_to_global_max, distpad.gather):
        with pytest.raises(ValueError, match="ranks that differ") as raised:
            world.run(lambda x, function=function: function({"y": x}, backend=world.backend), given, graph=False)
        assert "tensors['y']" in str(raised.value) and f"{world.num_replicas - 1}→3" in str(raised.value)
    given = wrong_on_the_last(world, np.zeros([2, 3], "float64"), np.zeros([2, 3], "float32"))
    with pytest.raises(ValueError, match="dtypes that differ"):
        world.run(lambda x: distpad.gather(x, backend=world.backend), given, graph=False)
    given = wrong_on_the_last(world, np.zeros([2, 3, 4], "float32"), np.zeros([2, 3, 5], "float32"))
    with pytest.raises(ValueError, match="inner axes that differ"):
        world.run(lambda x: distpad.gather(x, backend=world.backend), given, graph=False)


def test_a_mask_of_wrong_shape_on_one_replica(world):
    given = wrong_on_the_last(world, np.ones([2, 5], bool), np.ones([2, 3], bool))
    call = lambda mask: loss_of(world)(tf.zeros([2, 3]), tf.ones([2, 3]), mask=mask)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5\), expected \(2, 3\)"):
        world.run(call, given, graph=False)


def test_a_mask_with_more_axes_than_the_loss(world):
    call = lambda mask: loss_of(world)(tf.zeros([2, 3]), tf.ones([2, 3]), mask=mask)
    with pytest.raises(ValueError, match="rank 3, expected at most 2"):
        world.run(call, lambda r: np.ones([2, 3, 1], bool), graph=False)


def test_an_axis_out_of_range(world):
    with pytest.raises(ValueError, match="axis of tensors is out of range"):
        world.run(
            lambda x: distpad.pad_to_global_max(x, axis=4, backend=world.backend),
            lambda r: np.ones([1, 2]),
            graph=False,
        )


def test_plain_numbers_are_no_tensors(world):
    with pytest.raises(TypeError, match=r"tensors\[0\]\[0\] is 1, expected a tensor"):
        distpad.pad_to_global_max([[1, 2], [3]], backend=world.backend)
    with pytest.raises(ValueError, match="tensors is empty"):
        distpad.gather({}, backend=world.backend)
    with pytest.raises(TypeError, match=r"value is 0\.5, expected a int32"):
        distpad.gather(np.ones([1, 1], "int32"), value=0.5, backend=world.backend)
    with pytest.raises(ValueError, match=r"axis is .*expected a nest like that of tensors"):
        distpad.gather({"a": np.ones([1, 1])}, axis={"b": 1}, backend=world.backend)


def test_rows_out_of_range(world):
    with pytest.raises(ValueError, match="rows are expected"):
        world.run(lambda x: distpad.gather(x, rows=3, backend=world.backend), lambda r: np.ones([2, 2]), graph=False)


def test_a_loss_of_shape_batch_needs_per_sequence(world):
    call = lambda x: distpad.DistributedLoss(lambda t, p: tf.reduce_sum(p, 1), backend=world.backend)(x, x)
    with pytest.raises(ValueError, match='per="sequence"'):
        world.run(call, lambda r: np.ones([2, 2]), graph=False)


def test_a_single_process_raises_while_tracing(world):
    """In a tf.function of one process what is known while tracing is a ValueError; it need not wait for a run."""
    if world.several_workers:
        return  # there it is an InvalidArgumentError of the run, on all workers: tests/workers
    call = lambda mask: loss_of(world)(tf.zeros([2, 3]), tf.ones([2, 3]), mask=mask)
    with pytest.raises(ValueError, match="mask has shape"):
        world.run(call, lambda r: np.ones([2, 5], bool), graph=True)


def test_the_world_still_works_after_errors(world):
    call = lambda x: loss_of(world).global_value(loss_of(world)(tf.zeros_like(x), x))
    for value in world.run(call, lambda r: np.full([2, 3], 2.0, "float32"), graph=False).values():
        assert value == 2.0
