"""An error of one replica is raised on all replicas, with its evidence, within seconds."""

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


@pytest.mark.core
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
        pytest.skip("one replica cannot differ from itself")
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
    with pytest.raises(ValueError, match="rows are out of range"):
        world.run(lambda x: distpad.gather(x, rows=3, backend=world.backend), lambda r: np.ones([2, 2]), graph=False)


def test_a_loss_of_shape_batch_needs_per_sequence(world):
    loss_fn = distpad.DistributedLoss(lambda t, p: tf.reduce_sum(p, 1), backend=world.backend)
    call = lambda x: loss_fn(x, x, lengths=[1, 2])
    with pytest.raises(ValueError, match='per="sequence"'):
        world.run(call, lambda r: np.ones([2, 2]), graph=False)


def test_a_single_process_raises_while_tracing(world):
    """In one process, an error that tracing can see is a ValueError of the trace."""
    if world.several_workers:
        pytest.skip("there it is an InvalidArgumentError of the run, on all workers: tests/workers")
    call = lambda mask: loss_of(world)(tf.zeros([2, 3]), tf.ones([2, 3]), mask=mask)
    with pytest.raises(ValueError, match="mask has shape"):
        world.run(call, lambda r: np.ones([2, 5], bool), graph=True)


def test_the_world_still_works_after_errors(world):
    call = lambda x: loss_of(world).global_value(loss_of(world)(tf.zeros_like(x), x))
    for value in world.run(call, lambda r: np.full([2, 3], 2.0, "float32"), graph=False).values():
        assert value == 2.0


# -- shapes that only show when the step runs, on one replica alone ---------------------------------------------------


def hidden(tensor):
    """Return the same tensor with a shape that tracing does not know."""
    return tf.compat.v1.placeholder_with_default(tensor, [None] * tensor.shape.rank)


MISFITS = {
    "mask of one row": ({"mask": np.ones([1, 3], bool)}, {"mask": np.ones([2, 3], bool)}),
    "mask too wide": ({"mask": np.ones([2, 5], bool)}, {"mask": np.ones([2, 3], bool)}),
    "mask of one column": ({"mask": np.ones([2, 1], bool), "lengths": [1, 2]}, {"mask": np.ones([2, 3], bool)}),
    "lengths of one row": ({"lengths": [1]}, {"lengths": [1, 2]}),
    "lengths of three rows": ({"lengths": [1, 2, 3]}, {"lengths": [1, 2]}),
    "weights of one row": ({"sample_weight": np.ones([1, 3])}, {"sample_weight": np.ones([2, 3])}),
    "a mask of one row beside lengths": (
        {"mask": np.ones([1, 3], bool), "lengths": [1, 2]},
        {"mask": np.ones([2, 3], bool)},
    ),
}


TRACED = ("mask of one row", "lengths of three rows", "weights of one row")  # one of each kind


@pytest.mark.parametrize(
    ("case", "graph"),
    [
        *[(case, False) for case in MISFITS],
        *[pytest.param(case, True, marks=() if case in TRACED else pytest.mark.wide) for case in MISFITS],
    ],
)
def test_a_wrong_shape_is_not_broadcast(world, case, graph):
    wrong, right = MISFITS[case]
    right = {"mask": np.ones([2, 3], bool), "lengths": [2, 3], "sample_weight": np.ones([2, 3]), **right}
    wrong, right = ({name: np.array(each[name]) for name in sorted(wrong)} for each in (wrong, right))
    given = wrong_on_the_last(world, wrong, right)

    def call(arguments):
        known = hidden if graph else tf.identity
        arguments = {name: known(tf.convert_to_tensor(value)) for name, value in arguments.items()}
        return loss_of(world)(known(tf.zeros([2, 3])), known(tf.ones([2, 3])), **arguments)

    with pytest.raises((ValueError, tf.errors.OpError), match=r"mask|lengths|weight|shape"):
        world.run(call, given, graph=graph)


@pytest.mark.parametrize("name", ["mask", "sample_weight", "lengths"])
def test_rows_of_a_loss_of_sequences_are_not_broadcast(world, name):
    wrong, right = {
        "mask": ([True], [True, True]),
        "sample_weight": ([1.0], [1.0, 1.0]),
        "lengths": ([3], [3, 3]),
    }[name]
    loss_fn = distpad.DistributedLoss(
        lambda t, p: tf.reduce_sum(p, 1), per="sequence", average="sequence_sum", backend=world.backend
    )
    given = wrong_on_the_last(world, np.array(wrong), np.array(right))
    call = lambda rows: loss_fn(hidden(tf.zeros([2, 3])), hidden(tf.ones([2, 3])), **{name: hidden(rows)})
    with pytest.raises((ValueError, tf.errors.OpError), match=r"mask|lengths|shape"):
        world.run(call, given, graph=True)


def wrongly(world, call, right=lambda: None):
    """Run ``call`` on the last replica and ``right`` on the others, eagerly."""
    last = world.num_replicas - 1
    return world.run(lambda r: call() if int(r) == last else right(), np.int64, graph=False)


WRONG_HERE = {
    "lengths of floats": ({"lengths": [1.0, 2.0]}, "lengths have dtype float32"),
    "lengths of other rows": ({"lengths": [1, 2, 1]}, r"lengths"),
    "a scalar length": ({"lengths": 2}, r"lengths have shape \(\)"),
    "a value of another dtype": ({"value": 0.5}, r"value is 0\.5, expected a int32"),
    "a value of two": ({"value": [1, 2]}, "value is .1, 2., expected one number"),
    "an axis of text": ({"axis": "1"}, "axis is '1', expected an integer"),
}


@pytest.mark.parametrize("case", WRONG_HERE)
@pytest.mark.parametrize("function", [distpad.pad_to_global_max, distpad.gather])
def test_an_error_of_the_last_replica_raises_on_all(world, function, case):
    arguments, message = WRONG_HERE[case]
    x = np.ones([2, 3], "int32")
    call = lambda **given: function(x, backend=world.backend, **given).values
    with pytest.raises((ValueError, TypeError), match=message):
        wrongly(world, lambda: call(**arguments), call)


def test_a_ragged_tensor_on_the_last_replica_raises_on_all(world):
    ragged = tf.ragged.constant([[1, 2], [3]])
    call = lambda x: distpad.pad_to_global_max({"y": x}, backend=world.backend).values["y"]
    with pytest.raises((ValueError, TypeError), match=r"tensors\['y'\] is RaggedTensor, expected a padded tensor"):
        wrongly(world, lambda: call(ragged), lambda: call(np.ones([2, 2], "int32")))


@pytest.mark.core
def test_an_exception_in_the_loss_of_the_last_replica_raises_on_all(world):
    def fails(y_true, y_pred):
        raise KeyError("no such class")

    def call(loss):
        return distpad.DistributedLoss(loss, backend=world.backend)(tf.zeros([2, 3]), tf.ones([2, 3]))

    with pytest.raises((ValueError, KeyError), match="no such class"):
        wrongly(world, lambda: call(fails), lambda: call(lambda t, p: p))


def test_other_wrong_arguments_are_named(world):
    x = np.ones([2, 3])
    with pytest.raises(TypeError, match=r"buckets is \[8\], expected a distpad.Buckets"):
        distpad.pad_to_global_max(x, buckets=[8], backend=world.backend)
    with pytest.raises(TypeError, match=r"rows is of shape \(1,\)"):
        wrongly(world, *[lambda: distpad.gather(x, rows=[1], backend=world.backend).values] * 2)
    with pytest.raises((ValueError, TypeError), match="axis is -2, expected an axis after the first"):
        wrongly(world, *[lambda: distpad.gather(x, axis=-2, backend=world.backend).values] * 2)
    with pytest.raises(TypeError, match="variables is with a str, expected only variables"):
        distpad.broadcast_variables(["a"], backend=world.backend)
    with pytest.raises(ValueError, match="root is '0', expected a worker"):
        distpad.broadcast_variables([], root="0", backend=world.backend)
    with pytest.raises(TypeError, match=r"tape is None, expected a tf\.GradientTape"):
        distpad.gradient(None, x, [], backend=world.backend)
    with pytest.raises(TypeError, match="expected a list of variables"):
        distpad.gradient(tf.GradientTape(), x, tf.Variable(1.0), backend=world.backend)
    with pytest.raises(ValueError, match=r"losses is of shapes \[\(2,\)\], expected scalars"):
        distpad.scale_regularization([tf.ones([2])], backend=world.backend)
