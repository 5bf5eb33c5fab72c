"""The launcher's times: one factor for all of them, on every host of a job."""

from __future__ import annotations

import dataclasses

import pytest

from distpad.launcher import render, spec, times


def test_one_factor_scales_all():
    plain, halved = times.scaled({}), times.scaled({times.SCALE: "0.5"})
    assert plain == times.scaled({times.SCALE: ""}) == times.Times()
    assert dataclasses.astuple(halved) == tuple(value / 2 for value in dataclasses.astuple(plain))


@pytest.mark.parametrize("text", ["fast", "0", "-1", "nan", "inf", "1e9"])
def test_another_factor_is_refused(text):
    with pytest.raises(ValueError, match=f"DISTPAD_TIME_SCALE is '{text}', expected a number from 0.01 to 100"):
        times.scaled({times.SCALE: text})


def test_signs_of_life_come_well_within_the_patience_for_them():
    assert all(2 * times.sign_of_life_s(lost_after_s) < lost_after_s for lost_after_s in (1, 10, 120, 3600))


@pytest.mark.parametrize("by_srun", [False, True])
def test_agents_of_other_hosts_get_it(by_srun):
    environ = {times.SCALE: "0.5", "HOME": "/home/me"}
    argv = render.remote_argv(["python"], spec.Host("node1", 1), environ, by_srun=by_srun)
    assert "env DISTPAD_TIME_SCALE=0.5 python" in argv[-1] or by_srun  # srun hands on its own variables
    assert render.agent_env(environ)[times.SCALE] == "0.5"
