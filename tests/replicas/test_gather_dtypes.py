"""pad_to_global_max and gather of every dtype of TensorFlow, and of inner axes of any size."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad

WORLDS = ("local", "mirrored:2", "multiworker:2", "horovod:2")

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
NUMBERS = ("bool", *INTEGERS, "float16", "bfloat16", "float32", "float64", "complex64", "complex128")


def tensor_of(replica, dtype):
    """Return two rows of 1 + replica elements: the largest integers, or complex numbers with both parts."""
    counts = np.arange(1, 3 + 2 * replica).reshape(2, -1) + 10 * replica
    if dtype in INTEGERS:
        return tf.constant(np.iinfo(dtype).max - counts.astype(dtype))
    if dtype == "string":
        return tf.constant(counts.astype(str).astype(object))
    return tf.cast(counts * (1 - 2j) if dtype.startswith("complex") else counts % 3, dtype)


def nest_of(replica, dtypes):
    return {dtype: tensor_of(replica, dtype) for dtype in dtypes}


def padded(replica, dtype, replicas):
    """Return the expected padded values, by NumPy."""
    rows = tensor_of(replica, dtype).numpy()
    return np.pad(rows, [(0, 0), (0, replicas - 1 - replica)], constant_values=b"" if dtype == "string" else 0)


def test_every_dtype_is_gathered(world):
    step = lambda nest: distpad.gather(nest, backend=world.backend).values
    for found in world.run(step, lambda r: nest_of(r, NUMBERS), graph=False).values():
        for dtype in NUMBERS:
            wanted = np.concatenate([padded(r, dtype, world.num_replicas) for r in range(world.num_replicas)])
            assert found[dtype].dtype == wanted.dtype
            np.testing.assert_array_equal(found[dtype], wanted)


def test_unusual_dtypes_are_gathered_in_a_graph(world):
    dtypes = ("bool", "uint32", "uint64", "bfloat16", "complex64")
    step = lambda nest: distpad.gather(nest, backend=world.backend).values
    for found in world.run(step, lambda r: nest_of(r, dtypes)).values():
        for dtype in dtypes:
            wanted = np.concatenate([padded(r, dtype, world.num_replicas) for r in range(world.num_replicas)])
            np.testing.assert_array_equal(found[dtype], wanted)


def test_every_dtype_is_padded(world):
    dtypes = (*NUMBERS, "string")
    values = {dtype: "" if dtype == "string" else 0 for dtype in dtypes}
    step = lambda nest: distpad.pad_to_global_max(nest, value=values, backend=world.backend).values
    for r, found in world.run(step, lambda r: nest_of(r, dtypes), graph=False).items():
        for dtype in dtypes:
            np.testing.assert_array_equal(found[dtype], padded(r, dtype, world.num_replicas))


@pytest.mark.parametrize("graph", [False, True])
def test_strings_are_not_gathered(world, graph):
    """The message is that of gather with indices; it reaches all replicas if one replica alone has strings."""
    step = lambda nest: distpad.gather(nest, backend=world.backend).values
    given = lambda r: {"a": tensor_of(r, "int32"), "b": tensor_of(r, "string")}
    text = r"gather: the dtype of tensors\[\\?'b\\?'\] is string, expected numbers. Gather numbers, such as ids"
    with pytest.raises((TypeError, tf.errors.InvalidArgumentError), match=text):
        world.run(step, given, graph=graph)


def test_strings_of_one_replica(world):
    if world.num_replicas == 1 or not world.several_workers:
        pytest.skip("the replicas of one process have one dtype")
    last = world.num_replicas - 1
    step = lambda tensor: distpad.gather(tensor, backend=world.backend)
    with pytest.raises((TypeError, ValueError), match="the dtype of tensors is string, expected numbers"):
        world.run(step, lambda r: tensor_of(r, "string" if r == last else "int32"), graph=False)


@pytest.mark.parametrize(
    "shapes",
    [
        ([2, 1, 100, 100, 100, 3], [2, 1, 100, 100, 100, 4]),  # equal if a float64 held five digits of each
        ([2, 1, 1, 0], [2, 1, 0, 100000]),
        ([2, 1, 0, 3], [2, 1, 0, 4]),
        ([0, 1, 10**9, 1, 5], [0, 1, 10**9, 1, 6]),
        ([1] * 8, [1] * 7 + [2]),
    ],
)
def test_inner_axes_that_differ(world, shapes):
    """The sizes differ on the last replica; the message shows the sizes of all."""
    if world.num_replicas == 1:
        pytest.skip("one replica does not differ from itself")
    last = world.num_replicas - 1
    step = lambda tensor: distpad.gather(tensor, backend=world.backend).values
    with pytest.raises(ValueError, match="inner axes that differ, expected the same on all replicas") as raised:
        world.run(step, lambda r: tf.zeros(shapes[r == last], tf.uint8), graph=False)
    for shape, replica in zip(shapes, (0, last)):
        sizes = ", ".join(f"{size:g}" for size in [*shape[2:], *[-1] * 6][:6])
        assert f"{replica}→({sizes})" in str(raised.value)
    assert world.run(step, lambda r: tf.zeros([*shapes[0][:1], 1 + r, *shapes[0][2:]], tf.uint8), graph=False)


@pytest.mark.parametrize("shape", [[2, 0], [0, 3], [0, 0, 2], [2, 3, 0]])
def test_no_rows_on_any_replica(world, shape):
    """TensorFlow's own gather without rows crashes the processes of several workers."""
    step = lambda tensor: distpad.gather(tensor, backend=world.backend)
    for values, lengths, mask in world.run(step, lambda _: tf.zeros(shape), graph=False).values():
        rows = shape[0] * world.num_replicas
        assert values.shape == (rows, *shape[1:]) and mask.shape == (rows, shape[1])
        np.testing.assert_array_equal(lengths, [shape[1]] * rows)


def test_more_axes_than_can_be_padded(world):
    for function in (distpad.gather, distpad.pad_to_global_max):
        with pytest.raises(ValueError, match="tensors is of rank 9, expected at most 8 axes"):
            world.run(
                lambda t, f=function: f(t, backend=world.backend).values, lambda r: tf.zeros([1] * 9), graph=False
            )
