"""certify: its arguments, what it draws, and what a certificate says."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

import distpad
from distpad import losses
from distpad.certification import certificate, deviation

pytestmark = pytest.mark.one_stack


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cases": 0}, ValueError, "certify: cases is 0, expected at least 1"),
        ({"cases": 1.5}, TypeError, r"certify: cases is 1\.5, expected an integer"),
        ({"seed": -1}, ValueError, "certify: seed is -1, expected at least 0"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        distpad.certify(backend="local", **arguments)


@pytest.mark.wide
def test_all_kinds_and_all_averages_are_in_the_least_number_of_cases(monkeypatch):
    asked = []

    class Recording(distpad.DistributedLoss):
        def __init__(self, loss, *, average, **options):
            asked.append(average)
            super().__init__(loss, average=average, **options)

    monkeypatch.setattr(losses, "DistributedLoss", Recording)
    result = distpad.certify(cases=1, backend="local")
    assert result.passed and set(asked) == {"token", "sequence_sum", "sequence_mean", 7.5}
    kinds = [line.kind for line in result.lines]
    assert {"random masks", "sample weights", "an empty replica", "all padding", "accumulation"} <= set(kinds)
    assert {line.dtype for line in result.lines} == {"float32", "float64"} and {
        line.cases for line in result.lines
    } == {1}


@pytest.mark.wide  # tests/replicas names what does not pass
def test_a_mask_that_is_ignored_does_not_pass():
    loss = distpad.DistributedLoss(tf.nn.sparse_softmax_cross_entropy_with_logits, backend="local")
    deaf = lambda y, p, w=None, *, lengths, mask: loss(y, p, w, lengths=lengths)
    result = distpad.certify(loss=deaf, cases=1, backend="local")
    assert not result.passed and not next(line for line in result.lines if line.kind == "random masks").passed
    assert next(line for line in result.lines if line.kind == "random lengths").passed


def test_nan_does_not_pass():
    line = deviation.Line("kind", "float64", 1, float("nan"), 1e-12)
    broken = certificate.Certificate("local", 1, 1, (line,))
    assert not broken.passed and np.isnan(broken.max_relative_error) and "NOT PASSED" in str(broken)
