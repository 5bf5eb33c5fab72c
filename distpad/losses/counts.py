"""Counts: a step's denominators, counted before the step; and the checks that the loss counts the same positions."""

from __future__ import annotations

import collections.abc
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from distpad import backends, errors, precision
from distpad.collectives.checked import Check
from distpad.losses import averages, weights

_NAME = "DistributedLoss"


class Counts(NamedTuple):
    """The global counts of one optimiser step, over all replicas of all workers and all micro-batches.

    ``loss_fn(..., denominator=counts)`` divides by the count of its average.

    Attributes:
      tokens: the number of valid positions, a float64 scalar.
      sequences: the number of rows with a valid position, a float64 scalar.
      local: ``[2]`` float64, this replica's own tokens and sequences in this micro-batch, which the loss compares with
        its own counts; None: not compared.
      replicas: the number of replicas in ``tokens`` and ``sequences``, a float64 scalar, which the loss compares with
        the number of replicas that run it; None: not compared.

    >>> Counts(tokens=12.0, sequences=3.0).tokens
    12.0
    """

    tokens: Any
    sequences: Any
    local: Any = None
    replicas: Any = None


class WeightedCounts(Counts):
    """Counts that sum sample weights instead of ones. The loss needs the same weights.

    >>> isinstance(WeightedCounts(tokens=7.5, sequences=3.0), Counts)
    True
    """

    __slots__ = ()


class LossInputs(NamedTuple):
    """The arguments that a batch of ``PaddedBatches`` carries for one loss: ``loss_fn(y_true, y_pred, batch=batch)``.

    Attributes:
      lengths: ``[batch]`` int32, the valid positions of each row; of a pre-padded feature ``PreLengths``.
      sample_weight: ``[batch]`` or ``[batch, length, ...]``; ``()``, an empty nest, without weights.
      counts: ``Counts``, the loss's denominator.

    >>> LossInputs(lengths=[2, 1], sample_weight=(), counts=Counts(3.0, 2.0)).counts.tokens
    3.0
    """

    lengths: Any
    sample_weight: Any
    counts: Any


def read_batch(batch: Any, sources: dict[str, Any], denominator: Any) -> tuple[dict[str, Any], Counts]:
    """Return ``sources`` with the lengths and weights of a batch, and the batch's counts.

    Raises: TypeError: no batch of PaddedBatches. ValueError: a batch of several losses; an argument given twice.
    """
    inputs = getattr(batch, "loss_inputs", batch)
    if isinstance(inputs, collections.abc.Mapping):
        remedy = "Write batch=batch.loss_inputs[NAME]."
        raise ValueError(errors.sentence(_NAME, "batch", f"of the losses {list(inputs)}", "that of one", remedy))
    if not isinstance(inputs, LossInputs):
        raise TypeError(errors.sentence(_NAME, "batch", type(batch).__name__, "a batch of distpad.PaddedBatches"))
    twice = [name for name in ("lengths", "sample_weight") if sources[name] is not None]
    twice += [] if denominator is None else ["denominator"]
    if twice:
        raise ValueError(errors.sentence(_NAME, "batch", f"given beside {', '.join(twice)}", "alone: it carries them"))
    lengths, weight = inputs.lengths, inputs.sample_weight
    if not (tf.is_tensor(weight) or isinstance(weight, np.ndarray)):
        weight = None
    elif len(weight.shape) > 2:  # several ragged axes: lengths describe the first one alone
        lengths = None
    return {**sources, "lengths": lengths, "sample_weight": weight}, inputs.counts


def as_scalar(denominator: Any, average: str | float) -> tf.Tensor:
    """Return the number that this average divides by, a float64 scalar. Raises: TypeError, ValueError."""
    if not isinstance(average, str):
        raise ValueError(
            f"{_NAME}: denominator was given with average={average}, expected one of them: both set the divisor."
        )
    if isinstance(denominator, Counts):
        denominator = denominator.tokens if average == "token" else denominator.sequences
    elif isinstance(denominator, collections.abc.Mapping):
        raise TypeError(
            f"{_NAME}: denominator is a mapping with {list(denominator)}, expected one loss's counts. Write "
            "denominator=counts[NAME]."
        )
    count = precision.to_tensor(denominator, f"{_NAME}: denominator")
    if count.shape.rank != 0 or not (count.dtype.is_floating or count.dtype.is_integer):
        raise ValueError(
            f"{_NAME}: denominator has shape {tuple(count.shape)} and dtype {count.dtype.name}, expected one "
            "number or Counts."
        )
    return tf.cast(count, tf.float64)


def check_sources(counts: Counts, sources: dict[str, Any], drops_invalid: bool) -> None:
    """Raise ValueError for a mask or weight that the pipeline did not count: it would make the mean wrong."""
    given = {name for name, source in sources.items() if source is not None}
    weighted = isinstance(counts, WeightedCounts) and len(getattr(sources["sample_weight"], "shape", ())) > 1
    if not (given & {"lengths", "keras_mask", "padding_value"} or weighted):
        raise ValueError(
            f"{_NAME}: denominator holds Counts, but no argument tells which positions are valid. Give lengths= too."
        )
    if "mask" in given:
        raise ValueError(
            f"{_NAME}: mask was not counted in denominator, expected lengths alone. Give the number instead."
        )
    if ("sample_weight" in given) != isinstance(counts, WeightedCounts):
        raise ValueError(
            f"{_NAME}: denominator is a {type(counts).__name__}, but sample_weight is "
            f"{'given' if 'sample_weight' in given else 'missing'}; expected WeightedCounts with the weights that were "
            "counted, Counts without. Count them in the pipeline."
        )
    if drops_invalid:
        raise ValueError(
            f"{_NAME}: denominator holds Counts, but the loss itself drops sequences that the pipeline counted. "
            "Omit denominator, or give the number of the sequences that are left."
        )


def checks_of(
    denominator: Any, count: tf.Tensor, backend: backends.Backend, sums: averages.Sums, *, has_tokens: bool
) -> list[Check]:
    """Check that a denominator is a count, and Counts those of these positions on as many replicas.

    Args:
      denominator: the argument of the loss.
      count: its number for this average, float64.
      backend: the engine.
      sums: this replica's sums.
      has_tokens: whether the loss knows the number of its positions; without it, sequences alone are compared.
    """
    is_nothing = tf.logical_and(tf.equal(count, 0), tf.equal(sums.tokens, 0))
    is_count = tf.logical_or(tf.logical_and(count > 0, tf.math.is_finite(count)), is_nothing)
    text = (
        "denominator is below 0, not finite, or 0 beside valid positions, expected their count "
        "(found: denominator, and the valid positions here)"
    )
    checks = [Check(text, (count, sums.tokens), is_count)]
    if not isinstance(denominator, Counts):
        return checks
    if denominator.replicas is not None:
        text = (
            "denominator counts another number of replicas than run this step, expected the same. Make "
            "PaddedBatches inside `with strategy.scope():`, after hvd.init(), or with backend= "
            "(found: replicas counted, and running)"
        )
        found = tf.cast(denominator.replicas, tf.float64), tf.cast(backend.replica_count(), tf.float64)
        checks.append(Check(text, found, tf.equal(*found)))
    if denominator.local is not None:
        text = (
            "denominator holds Counts of other positions than this call averages over, expected the same. Give lengths "
            "(and weights) of the feature that tokens= names, no further mask or padding value, or one number as the "
            "denominator (found: tokens and sequences that were counted, and those of this call)"
        )
        counted, here = tf.cast(denominator.local, tf.float64), tf.stack([sums.tokens, sums.sequences])
        here = here if has_tokens else tf.stack([counted[0], here[1]])
        error = 1e-4 if isinstance(denominator, WeightedCounts) else 1e-7  # sums of ones are nearly exact
        is_close = tf.reduce_all(tf.abs(counted - here) <= error * tf.maximum(tf.abs(counted), tf.abs(here)))
        checks.append(Check(text, (*tf.unstack(counted), *tf.unstack(here)), is_close))
    return checks


def sources_check(y_true: Any, y_pred: Any, sources: dict[str, Any]) -> Check:
    """Check that no other source drops positions within ``lengths``, for Counts without ``local``."""
    text = (
        "denominator holds Counts, but Keras's mask or padding_value drops positions within lengths, which were "
        "counted. Give the number instead (found: how many)"
    )
    if sources["lengths"] is None or (sources["padding_value"] is None and sources["keras_mask"] is None):
        return Check(text, 0, True)
    y_true, y_pred = precision.as_tensor(y_true), precision.as_tensor(y_pred)
    sources = {**sources, "mask": None, "sample_weight": None}
    left, _ = weights.of_positions(y_true, y_pred, **sources)
    counted, _ = weights.of_positions(y_true, y_pred, **{**sources, "padding_value": None, "keras_mask": None})
    if counted.mask is None or left.mask is None or counted.mask.shape.rank != left.mask.shape.rank:
        return Check(text, 0, True)
    left_out = tf.math.count_nonzero(counted.mask) - tf.math.count_nonzero(left.mask)
    return Check(text, left_out, left_out == 0)
