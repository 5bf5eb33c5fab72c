"""DistributedLoss: a loss of reduction none, averaged exactly over the valid positions of all replicas."""

from __future__ import annotations

import collections.abc
import numbers
import warnings
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import backends, errors, gradients, precision
from distpad.collectives import checked, shapes
from distpad.losses import arguments, averages, masking
from distpad.losses.counts import Counts, LossInputs, WeightedCounts
from distpad.losses.gate import Gate

_NAME = "DistributedLoss"


@tf.keras.utils.register_keras_serializable("distpad")
class DistributedLoss(tf.keras.losses.Loss):
    r"""Average a loss over the valid positions of all replicas of all workers, exactly.

    With w the weight of each position (mask times sample weight) and l its loss, ``average`` is

    - ``"token"``: :math:`\sum w l / \sum w`;
    - ``"sequence_sum"``: :math:`\sum w l` / number of sequences with :math:`\sum w > 0`;
    - ``"sequence_mean"``: the mean over those sequences of each one's own :math:`\sum w l / \sum w`;
    - a positive number: :math:`\sum w l` / number.

    All sums run over all replicas. A call returns, on each replica, the scalar whose gradient is right after the
    engine's own gradient reduction: one optimiser step on N replicas equals one step on one device with the
    concatenated batch. No position that does not count changes a bit of the value or of a gradient, whatever stands
    there (NaN, infinity, labels out of range). No valid position anywhere gives 0 and zero gradients.

    Args:
      loss: a Keras loss (Keras 2 or 3, TensorFlow Addons) of reduction none or of the default reduction, which
        ``average`` replaces; the name of one, such as ``"mse"``; or a callable ``(y_true, y_pred) -> [batch, ...]`` in
        positions, ``[batch]`` with ``per="sequence"``; autograph does not convert it, so one with Python's ``if`` or
        ``for`` over tensors is a ``tf.function`` itself. A loss ``[batch]`` without any mask or lengths is that of
        plain classification: each row is one position.
      average: see above.
      per: "position", or "sequence" for losses with one value a sequence, such as CTC. Then "token" divides by the
        global sum of ``lengths``, the other two by the number of sequences that count.
      padding_value: labels equal to it do not count (vectors: where all components are).
      backend: see ``distpad.backends.resolve``; left out, it is detected at each call.
      name: as in Keras.

    Raises:
      TypeError: ``loss`` is no callable. ValueError: it reduces by itself, or an option is unknown.

    Source: S. Merity et al., and every sequence toolkit since, divide by tokens; that the division must be global is
    shown in the README.

    >>> import tensorflow as tf
    >>> loss_fn = DistributedLoss(tf.keras.losses.MeanAbsoluteError(reduction="none"))
    >>> y_true, y_pred = tf.zeros([2, 3, 1]), tf.constant([[[1.], [1.], [9.]], [[4.], [9.], [9.]]])
    >>> float(loss_fn(y_true, y_pred, lengths=[2, 1]))
    2.0
    """

    def __init__(
        self,
        loss: Any,
        *,
        average: str | float = "token",
        per: str = "position",
        padding_value: Any = None,
        backend: Any = None,
        name: str = "distributed_loss",
    ) -> None:
        # "sum" is what Keras leaves alone: it neither divides such a loss by the replicas nor its history
        super().__init__(reduction="sum", name=name)
        loss = arguments.unreduced(loss)
        arguments.check_ignored(loss, padding_value)
        if isinstance(average, bool) or not isinstance(average, (str, numbers.Real)):
            raise TypeError(errors.sentence(_NAME, "average", repr(average), "a string or a positive number"))
        if isinstance(average, str):
            errors.choice(_NAME, "average", average, ("token", "sequence_sum", "sequence_mean"))
        elif not 0 < average < float("inf"):
            raise ValueError(errors.sentence(_NAME, "average", average, "a positive number"))
        errors.choice(_NAME, "per", per, ("position", "sequence"))
        if padding_value is not None and not np.isscalar(padding_value):
            raise TypeError(errors.sentence(_NAME, "padding_value", repr(padding_value), "one number or string"))
        self.loss = loss
        self.average = average if isinstance(average, str) else float(average)  # NumPy's numbers cannot be saved
        self.per = per
        self.padding_value = padding_value
        self._backend = backend
        self._ran_on: backends.Backend | None = None
        self._has_warned = False
        self._of_no_rows: dict[Any, Any] = {}  # traced functions, by what they are given

    @tf.autograph.experimental.do_not_convert  # it would take three seconds of the first trace
    def __call__(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        *,
        lengths: Any = None,
        mask: Any = None,
        denominator: Any = None,
        batch: Any = None,
    ) -> tf.Tensor:
        """This replica's share of the global mean, a scalar of the loss's dtype, float32 at least.

        Args:
          y_true: labels; a nest is handed on to the loss unchanged.
          y_pred: predictions ``[batch, length, ...]``.
          sample_weight: ``[batch]`` or as many leading axes of the loss as you like; all but the first may be of size
            1. What weighs 0 is treated like padding.
          lengths: ``[batch]`` integers, the valid positions of each row (the rest is padding behind them).
          mask: bool, leading axes of the loss; ``[batch]`` with ``per="sequence"`` says which rows count, those
            of length 0 (an empty text) included.
          denominator: what to divide by, counted beforehand: a scalar, or ``Counts``. The step then has no collective
            of its own, and the value is the replica's share: log it with ``global_value``.
          batch: a batch of ``PaddedBatches``, in place of ``lengths``, ``sample_weight`` and ``denominator``; with
            several losses ``batch.loss_inputs[NAME]``.

        Returns:
          Without ``denominator`` the value is the global mean (over the number of replicas, under strategies, which
          sum), the same on all replicas; its gradient is always that of the replica's share.

        Raises:
          ValueError, TypeError: on all replicas alike where the call is collective; inside a ``tf.function``, what only
            shows while it runs is a ``tf.errors.InvalidArgumentError``. Inside XLA, which drops assertions, the value
            and all gradients are NaN instead.

        Collective without ``denominator``: one all-reduce, of the numerator, the count and the evidence for errors.
        """
        backend = backends.resolve_step(self._backend, function=_NAME)
        arguments.refuse_layers(backend)
        if not backends.is_alone():  # beside the engine, for a certificate
            self._ran_on = backend
        sources = {"sample_weight": sample_weight, "lengths": lengths, "mask": mask}
        if batch is not None:
            denominator = self._take_inputs(batch, sources, denominator)
        sources["keras_mask"] = masking.keras_mask(y_pred)
        gate = Gate()
        if denominator is not None:
            count = self._count_from(denominator, sources)
            sums, checks = self._sums(y_true, y_pred, sources, gate)
            is_nothing = tf.logical_and(tf.equal(count, 0), tf.equal(sums.tokens, 0))
            is_count = tf.logical_or(tf.logical_and(count > 0, tf.math.is_finite(count)), is_nothing)
            text = (
                "denominator is below 0, not finite, or 0 beside valid positions, expected their count (it, valid here)"
            )
            checks.append(checked.Check(text, (count, sums.tokens), is_count))
            if isinstance(denominator, Counts):
                checks += self._counted_checks(backend, denominator, sums, y_true, y_pred, sources)
            gate.ok = checked.check_locally(backend, _NAME, checks)
            count = count if gate.ok is True else tf.where(gate.ok, count, tf.constant(np.nan, tf.float64))
            return self._share(backend, sums, count)
        if not backend.in_replica() and not tf.executing_eagerly():
            return self._rehearse(y_true, y_pred, sources, gate)
        return self._average_globally(backend, y_true, y_pred, sources, gate)

    def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """The loss without any reduction, as Keras defines ``call``."""
        if not hasattr(self.loss, "call"):
            return self.loss(y_true, y_pred)
        return self.loss.call(arguments.as_keras_casts(self.loss, y_true, y_pred), y_pred)

    def global_value(self, loss: Any) -> tf.Tensor:
        """The global mean that ``loss`` is this replica's share of, for logging; by the backend it last ran on.

        Args:
          loss: what the call returned; outside ``strategy.run``, what ``strategy.run`` returned.

        Returns: a scalar, the same on all workers. Collective.
        """
        return gradients.global_value(loss, backend=self._ran_on or self._backend)

    def _take_inputs(self, batch: Any, sources: dict, denominator: Any) -> Any:
        """Put what a batch carries for this loss into ``sources``; returns its counts."""
        inputs = getattr(batch, "loss_inputs", batch)
        if isinstance(inputs, collections.abc.Mapping):
            remedy = "Write batch=batch.loss_inputs[NAME]."
            raise ValueError(errors.sentence(_NAME, "batch", f"of the losses {list(inputs)}", "that of one", remedy))
        if not isinstance(inputs, LossInputs):
            raise TypeError(errors.sentence(_NAME, "batch", type(batch).__name__, "a batch of distpad.PaddedBatches"))
        twice = [name for name in ("lengths", "sample_weight") if sources[name] is not None]
        twice += [] if denominator is None else ["denominator"]
        if twice:
            raise ValueError(
                errors.sentence(_NAME, "batch", f"given beside {', '.join(twice)}", "to bring them itself")
            )
        weight = inputs.sample_weight
        if not (tf.is_tensor(weight) or isinstance(weight, np.ndarray)):
            sources["lengths"] = inputs.lengths
        elif len(weight.shape) > 2:  # of areas, which lengths of one axis do not tell
            sources["sample_weight"] = weight
        else:
            sources.update(lengths=inputs.lengths, sample_weight=weight)
        return None if self._is_fixed() else inputs.counts

    def _average_globally(
        self, backend: backends.Backend, y_true: Any, y_pred: Any, sources: dict, gate: Gate
    ) -> tf.Tensor:
        argument_error = None
        checks: list[checked.Check] = []
        try:
            sums, checks = self._sums(y_true, y_pred, sources, gate)
        except Exception as error:  # whatever the loss raised travels with the numbers: no other replica waits for them
            argument_error = error
            try:
                sums = averages.Sums(0.0, 0.0, 0.0) if tf.executing_eagerly() else averages.abandoned(y_pred)
            except ValueError:
                raise error from None
        payload = [sums.total, self._count_of(sums)]
        table = checked.all_gather(backend, _NAME, payload, checks, argument_error)
        total, count = tf.unstack(tf.reduce_sum(table, axis=0))
        count = table[0, 1] if self._is_fixed() else count
        gate.ok = True if tf.executing_eagerly() else tf.logical_not(tf.math.is_nan(count))
        value = tf.math.divide_no_nan(total, count)
        if backend.gradient_reduction == "sum":
            value /= tf.cast(backend.replica_count(), value.dtype)
        share = self._share(backend, sums, count)
        return averages.value_with_gradient(tf.cast(value, sums.dtype), share)

    def _share(self, backend: backends.Backend, sums: averages.Sums, count: Any) -> tf.Tensor:
        share = tf.math.divide_no_nan(tf.cast(sums.total, tf.float64), tf.cast(count, tf.float64))
        return tf.cast(share * tf.cast(backend.gradient_scale, share.dtype), sums.dtype)

    def _rehearse(self, y_true: Any, y_pred: Any, sources: dict, gate: Gate) -> tf.Tensor:
        """Shapes and dtypes for Keras 3, which traces a model once outside any replica, and never runs that trace. Who
        runs one gets an error, or inside XLA NaN."""
        sums, _ = self._sums(y_true, y_pred, sources, gate, counting=False)
        gate.ok = tf.constant(False)
        text = f"{_NAME}: called outside strategy.run, expected inside it, where a replica's code runs."
        with tf.control_dependencies([tf.debugging.Assert(False, [text])]):
            return tf.cast(sums.total * np.nan, sums.dtype)

    def _is_fixed(self) -> bool:
        return not isinstance(self.average, str)

    def _count_of(self, sums: averages.Sums) -> Any:
        if self._is_fixed():
            return float(self.average)
        return sums.tokens if self.average == "token" else sums.sequences

    def _count_from(self, denominator: Any, sources: dict) -> Any:
        """What ``denominator`` says this average divides by."""
        if self._is_fixed():
            raise ValueError(
                f"{_NAME}: denominator was given with average={self.average}, expected one of them: both say what to "
                "divide by."
            )
        if isinstance(denominator, Counts):
            arguments.check_counted(denominator, sources, self.padding_value)
            if getattr(self.loss, "drops_invalid", False):
                raise ValueError(
                    f"{_NAME}: denominator holds Counts, but the loss leaves sequences out by itself, which the "
                    "pipeline counted. Leave denominator away, or give the number of those that are left."
                )
            denominator = denominator.tokens if self.average == "token" else denominator.sequences
        elif isinstance(denominator, collections.abc.Mapping):
            raise TypeError(
                f"{_NAME}: denominator is a mapping with {list(denominator)}, expected one loss's counts. Write "
                "denominator=counts[NAME]."
            )
        count = tf.convert_to_tensor(denominator)
        if count.shape.rank != 0 or not (count.dtype.is_floating or count.dtype.is_integer):
            raise ValueError(
                f"{_NAME}: denominator has shape {tuple(count.shape)} and dtype {count.dtype.name}, expected one "
                "number or Counts."
            )
        return tf.cast(count, tf.float64)

    def _counted_checks(
        self, backend: backends.Backend, counts: Counts, sums: averages.Sums, y_true: Any, y_pred: Any, sources: dict
    ) -> list[checked.Check]:
        """What was counted ahead of the step is what this call averages over, on as many replicas."""
        checks = []
        if counts.replicas is not None:
            text = (
                "denominator was counted for another number of replicas than run this step, expected the same. Make "
                "PaddedBatches inside `with strategy.scope():`, behind hvd.init(), or with backend= "
                "(counted for, running)"
            )
            for_these = tf.cast(counts.replicas, tf.float64), tf.cast(backend.replica_count(), tf.float64)
            checks.append(checked.Check(text, for_these, tf.equal(*for_these)))
        if counts.local is None:
            if self.per == "position":
                checks.append(masking.counted_check(y_true, y_pred, **sources, padding_value=self.padding_value))
            return checks
        has_tokens = self.per == "position" or sources["lengths"] is not None or self.padding_value is not None
        counted, here = tf.cast(counts.local, tf.float64), tf.stack([sums.tokens, sums.sequences])
        here = here if has_tokens else tf.stack([counted[0], here[1]])
        text = (
            "denominator holds Counts of other positions than this call averages over, expected the same. Give lengths "
            "(and weights) of the feature that tokens= names, no further mask or padding value, or one number as the "
            "denominator (tokens and sequences: counted, and averaged over)"
        )
        error = 1e-4 if isinstance(counts, WeightedCounts) else 1e-7  # sums of weights are rounded, of ones hardly
        is_close = tf.reduce_all(tf.abs(counted - here) <= error * tf.maximum(tf.abs(counted), tf.abs(here)))
        return [*checks, checked.Check(text, (*tf.unstack(counted), *tf.unstack(here)), is_close)]

    def _sums(
        self, y_true: Any, y_pred: Any, sources: dict, gate: Gate, counting: bool = True
    ) -> tuple[averages.Sums, list[checked.Check]]:
        """This replica's numerator and counts."""
        y_true = precision.wide(masking.as_tensor(y_true))
        y_pred = tf.nest.map_structure(precision.wide, masking.as_tensor(y_pred))
        for name, given in (("y_true", y_true), ("y_pred", y_pred)):
            if isinstance(given, tf.RaggedTensor):
                raise TypeError(f"{_NAME}: {name} is a RaggedTensor, expected a padded tensor. Use distpad.pad.")
        sources = {**sources, "padding_value": self.padding_value}
        try:
            if self.per == "sequence":
                valid, positions, checks = masking.of_sequences(y_true, y_pred, **sources)
                valid, own_checks = self._filtered(y_true, y_pred, self._with_tokens(valid), counting)
                checks += own_checks
            else:
                valid, checks = masking.of_positions(y_true, y_pred, **sources)
                positions = valid.effective_mask
            rows = valid.effective_mask
        except (ValueError, TypeError) as error:
            raise type(error)(f"{_NAME}: {error}") from error
        losses = self._losses(
            masking.clean(y_true, positions, prediction=False), masking.clean(y_pred, rows, prediction=True, gate=gate)
        )
        valid = masking.of_rows(valid, losses)
        arguments.check_rank(losses, self.per, valid, y_true, y_pred)
        if self.per == "sequence" and (sources["lengths"] is not None or self.padding_value is not None):
            arguments.refuse_positions(self.loss, y_true, y_pred)
        if self.per == "position":
            self._warn_unmasked(losses, valid)
        average = self.average if self.per == "position" else "sequence_sum"
        sums = averages.sum_up(_NAME, losses, valid, average, gate)
        return sums, [*checks, masking.broadcast_check(sums.rows, sums.is_broadcastable)]

    def _filtered(
        self, y_true: Any, y_pred: Any, valid: masking.Valid, counting: bool
    ) -> tuple[masking.Valid, list[checked.Check]]:
        """Without the sequences that such a loss leaves out, and its checks."""
        if not hasattr(self.loss, "filter_invalid"):
            return valid, []
        kept, checks = self.loss.filter_invalid(y_true, y_pred, valid.effective_mask, counting=counting)
        if kept is None:
            return valid, checks
        sources = [shapes.Source("mask", mask) for mask in (valid.mask, kept) if mask is not None]
        return valid._replace(mask=shapes.all_of(sources)[0]), checks

    def _warn_unmasked(self, losses: tf.Tensor, valid: masking.Valid) -> None:
        """Once, where a loss has positions and nothing says which of them are valid."""
        weighted = valid.weight is not None and valid.weight.shape.rank > 1
        if self._has_warned or valid.mask is not None or weighted or losses.shape.rank < 2:
            return
        self._has_warned = True
        shape = tuple(losses.shape)
        warnings.warn(
            f"{_NAME}: no mask was given for a loss of shape {shape}, so that all positions count, padding too. Where "
            "there is padding, give batch=, lengths=, mask=, padding_value=, a sample_weight of 0 there, or use layers "
            "that pass on a Keras mask.",
            stacklevel=2,
        )

    def _losses(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """The unreduced losses. One a sequence is not asked about no rows, since tf.nn.ctc_loss fails on them."""
        first = next((leaf for leaf in tf.nest.flatten(y_pred) if leaf.dtype.is_floating), None)
        if self.per == "position" or first is None or not first.shape.rank or (first.shape[0] or 0) > 0:
            return self._asked(y_true, y_pred)
        if first.shape[0] == 0:
            return self._traced_for_any_rows(y_true, y_pred)

        def none() -> tf.Tensor:
            return tf.reduce_sum(first, axis=list(range(1, first.shape.rank)))

        return tf.cond(tf.shape(first)[0] > 0, lambda: tf.cast(self._asked(y_true, y_pred), first.dtype), none)

    def _traced_for_any_rows(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """The losses of no rows, traced for any number of them: the gradient then reaches all that it would with rows,
        as zeros, the variables of the loss too. A missing one would leave Horovod's other ranks waiting for it."""
        leaves = tf.nest.flatten((y_true, y_pred))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, tf.Tensor)]
        specs = [
            tf.TensorSpec([None, *leaf.shape[1:]] if leaf.shape[:1] == [0] else leaf.shape, leaf.dtype)
            for leaf in (leaves[i] for i in tensors)
        ]
        others = [leaf for leaf in leaves if not isinstance(leaf, tf.Tensor)]
        key = (repr(tf.nest.map_structure(lambda _: 0, (y_true, y_pred))), tuple(specs), tuple(map(id, others)))
        if key not in self._of_no_rows:

            @tf.function(input_signature=specs, autograph=False)
            def of_any_rows(*given: tf.Tensor) -> tf.Tensor:
                named = dict(zip(tensors, given))
                every = [named.get(i, leaf) for i, leaf in enumerate(leaves)]
                return self._losses(*tf.nest.pack_sequence_as((y_true, y_pred), every))

            # concrete, so that it is a graph also where tf.config.run_functions_eagerly wants none
            self._of_no_rows[key] = of_any_rows.get_concrete_function()
        return self._of_no_rows[key](*(leaves[i] for i in tensors))

    def _asked(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        losses = self.call(y_true, y_pred)
        if losses is None:
            remedy = (
                "Call it yourself: for tfa.seq2seq.SequenceLoss without averages and sums, "
                "lambda y_true, y_pred: loss(y_true, y_pred, tf.ones_like(y_pred[..., 0]))"
            )
            raise TypeError(errors.sentence(_NAME, "the loss's result", None, "a tensor [batch, ...]", remedy + "."))
        return precision.wide(tf.convert_to_tensor(losses))

    def _with_tokens(self, valid: masking.Valid) -> masking.Valid:
        if valid.tokens is None and self.average == "token":
            raise ValueError("lengths are missing, expected [batch]: average='token' divides by their sum")
        return valid

    def get_config(self) -> dict[str, Any]:
        """As in Keras: a saved model keeps the loss. A backend that is no string is detected when the loss runs."""
        return {
            "name": self.name,
            "loss": tf.keras.utils.serialize_keras_object(self.loss),
            "average": self.average,
            "per": self.per,
            "padding_value": self.padding_value,
            "backend": self._backend if isinstance(self._backend, str) else None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DistributedLoss:
        loss = config["loss"]
        # from its older formats, Keras 2 finds losses by losses.deserialize alone, and functions by the other alone
        function = isinstance(loss, dict) and loss["class_name"] == "function"
        restore = tf.keras.utils.deserialize_keras_object if function else tf.keras.losses.deserialize
        return cls(**{**config, "loss": restore(loss)})
