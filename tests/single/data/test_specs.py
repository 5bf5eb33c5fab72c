"""element_spec is that of the batches, before an epoch and after it, for every kind of source."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from test_readers import EXAMPLES, SOURCES, Iterable, made

import distpad


def assert_fits(spec, batch):
    tf.nest.assert_same_structure(spec, batch)
    for one, leaf in zip(tf.nest.flatten(spec), tf.nest.flatten(batch)):
        assert one.is_compatible_with(leaf) and one.shape.rank == leaf.shape.rank, (one, leaf)


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind not in ("iterable", "tf.data of unknown rank")])
def test_it_fits_the_batches_before_an_epoch(kind):
    source, options = SOURCES[kind]()
    batches = made(source, **options)
    before = batches.element_spec
    batch = next(iter(batches))
    assert_fits(before, batch)
    assert_fits(batches.element_spec, batch)
    assert before.data["y"].shape.as_list() == [4, None]


@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize("tokens", ["y", {"a": "y", "b": "image"}])
def test_it_has_the_losses_and_the_rows_of_a_sampler(tokens, weights):
    source = [{**example, "w": np.float32(1)} for example in EXAMPLES]
    lengths = [len(example["y"]) for example in EXAMPLES]
    for options, rows in (({"global_batch_size": 4}, 4), ({"max_tokens": 12}, None)):
        sampler = distpad.LengthSampler(lengths, **options)
        batches = made((source, sampler), None, tokens=tokens, weights=weights)
        assert batches.element_spec.indices.shape.as_list() == [rows]
        assert_fits(batches.element_spec, next(iter(batches)))


def test_an_iterable_shows_it_after_the_first_window():
    batches = made(Iterable())
    with pytest.raises(ValueError, match=r"element_spec is unknown for this Iterable, .* Begin an epoch first"):
        batches.element_spec  # noqa: B018
    batch = next(iter(batches))
    assert_fits(batches.element_spec, batch)
