"""The user's subject: a model and a loss, or a step, with a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distpad import backends, errors, gradients, losses
from distpad.certification import batch as batches
from distpad.certification import comparison, deviation, layers, rows, steps


def subject(model: Any, loss: Any, step: Any, batch: Any, backend: backends.Backend) -> comparison.Subject:
    """Check the batch, prepare the model, and build both sides of the comparison. Collective among workers."""
    given = batches.checked(batch, ("x", "y") if loss is not None else (), backend)
    notes = _prepare(model, given, backend) if model is not None else []
    training = not notes or step is not None
    if not training:
        notes.append("compared with training=False, which makes these layers deterministic and rows independent")
    if model is not None:
        notes += _equalize(model, backend)
    sides = _both_sides(model, loss, step, given, training, backend)
    on_replicas, on_one_device = sides if model is None else (steps.restoring(side, model) for side in sides)
    takes_no_rows = _takes_no_rows(given, on_one_device)
    mask_rank = 0 if step is not None else rows.rank_of_mask(given.fields, loss)

    def draw(kind: rows.Kind, number: int, seed: Sequence[int]) -> rows.Fields:
        drawn = rows.draw(given.fields, kind, number, seed, mask_rank=mask_rank, takes_no_rows=takes_no_rows)
        return given.counted(drawn)

    is_exact = isinstance(loss, losses.DistributedLoss)
    accumulates = step is None and is_exact
    per_batch = layers.depend_on_the_batch(model) if accumulates and training and model is not None else []
    if per_batch:
        accumulates = False
        what = "which have moments or random numbers of each micro-batch"
        notes.append(f"accumulation is not compared because of {', '.join(per_batch)}, {what}")
    compared = comparison.Comparison(
        draw,
        on_replicas,
        on_one_device,
        backend,
        names=[] if model is None else [getattr(v, "path", v.name) for v in model.trainable_variables],
        takes_no_rows=takes_no_rows,
        takes_denominator=accumulates and isinstance(loss.average, str),
    )
    kinds = rows.kinds(given.fields, mask_rank, takes_no_rows=takes_no_rows, accumulates=accumulates)
    if not takes_no_rows:
        has_filler = rows.Kind.EMPTY_REPLICA in kinds
        consequence = "the empty replica has one row of padding" if has_filler else "no replica is empty"
        notes.append(f"a batch of 0 rows fails on one device: {consequence}")
    if backend.num_replicas > 1 and not is_exact:
        what = "step" if loss is None else "loss"
        notes.append(f"the {what} is compared with itself on one device: a wrong factor on both sides is not detected")
    return comparison.Subject(kinds, [[compared]], _padded(given, loss, on_one_device), tuple(notes))


def _both_sides(
    model: Any, loss: Any, step: Any, given: batches.Given, training: bool, backend: backends.Backend
) -> tuple[steps.Replicas, steps.OneDevice]:
    """The step on all replicas and on one device. Without a loss, the user's step runs on both sides."""
    if step is None:
        return steps.on_replicas(model, loss, training, backend), steps.on_one_device(model, loss, training)
    on_replicas = steps.own_on_replicas(step, given, model, backend)
    if loss is None:
        return on_replicas, steps.own_on_one_device(step, given, model)
    return on_replicas, steps.on_one_device(model, loss, training)


def _prepare(model: Any, given: batches.Given, backend: backends.Backend) -> list[str]:
    """Build the model where it is not built, and return the notes on its layers."""
    with backend.scope():
        if "x" in given.fields and not (getattr(model, "built", True) and model.trainable_variables):
            steps.predict(model, rows.first(given.fields)["x"], False)
    if not model.trainable_variables:
        raise ValueError(errors.sentence("certify", "model", "one without trainable variables", "at least one"))
    return layers.notes_on(model)


def _equalize(model: Any, backend: backends.Backend) -> list[str]:
    """Broadcast the variables of worker 0, as before training; return a note where workers had different ones."""
    if backend.num_workers == 1:
        return []
    flat = lambda: np.concatenate([np.ravel(v.numpy()).astype(np.float64) for v in model.trainable_variables])
    before = flat()
    gradients.broadcast_variables(model.variables, backend=backend)
    if not backend.host_max(np.array([float(not np.array_equal(before, flat()))]))[0]:
        return []
    return ["workers had different variables; all have those of worker 0 now, as by distpad.broadcast_variables"]


def _takes_no_rows(given: batches.Given, on_one_device: steps.OneDevice) -> bool:
    """Whether a replica may have no rows. Some Keras layers fail on a batch of 0 rows."""
    try:
        on_one_device(rows.first(given.fields, 0))
    except Exception:
        return False
    return True


def _padded(given: batches.Given, loss: Any, on_one_device: steps.OneDevice) -> deviation.Line | None:
    """The effect of more padding on the gradients of one device."""
    further = rows.padded_further(given.fields, loss)
    if further is None:
        return None
    try:
        device, other = (on_one_device(rows.first(fields)) for fields in (given.fields, further))
    except Exception:
        return None  # the model takes no other length
    error = float(deviation.off_by(other.gradients, device.gradients).max())
    return deviation.Line("padded further", device.dtype, 1, error, deviation.LIMITS[device.dtype])
