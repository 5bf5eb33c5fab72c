"""A saved position is refused on all workers if the source of one begins with other examples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import distpad


@pytest.fixture(autouse=True)
def _several(world):
    assert world.backend.num_workers > 1


def made(world, source, **options):
    padding = {"y": distpad.Pad()}
    return distpad.PaddedBatches(source, 2, padding=padding, tokens="y", backend=world.backend, **options)


@pytest.mark.parametrize("changed", [None, 0, 1])
def test_one_workers_other_order_is_refused_on_all(world, changed):
    """All workers load the state of one, as from a checkpoint. Worker 1 has fewer examples than were consumed."""
    worker = world.backend.worker_index
    count = [20, 3][min(worker, 1)]
    source = [{"y": np.array([100 * worker + i])} for i in range(count)]
    before = made(world, source)
    for _ in itertools.islice(before, 4):
        pass
    state = before.state_dict()
    begins = world.backend.host_all_gather(np.array(state["begins"], np.float64))
    assert (begins == begins[0]).all() and state["step"] == 4
    after = made(world, source[::-1] if worker == changed else source, lookahead=5)
    after.load_state_dict(state)
    if changed is None:
        assert sum(1 for _ in after) == 6
        return
    with pytest.raises(ValueError, match="source begins with other examples than when the position was saved"):
        next(iter(after))
