"""DistributedLoss: a loss of reduction none, averaged exactly over the valid positions of all replicas."""

from __future__ import annotations

import numbers
import warnings
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import backends, errors, gradients, precision
from distpad.collectives import checked, shapes
from distpad.losses import arguments, averages, counts, no_rows, weights

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
        self._traces_of_no_rows: dict[Any, Any] = {}

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
        if not backends.is_alone():  # alone: the reference device of a certificate
            self._ran_on = backend
        sources = {"sample_weight": sample_weight, "lengths": lengths, "mask": mask}
        if batch is not None:
            sources, counted = counts.read_batch(batch, sources, denominator)
            denominator = counted if isinstance(self.average, str) else None
        sources.update(keras_mask=weights.keras_mask(y_pred), padding_value=self.padding_value)
        if denominator is not None:
            return self._average_locally(backend, y_true, y_pred, sources, denominator)
        if not backend.in_replica() and not tf.executing_eagerly():
            return self._rehearse(y_true, y_pred, sources)
        return self._average_globally(backend, y_true, y_pred, sources)

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

    def _average_globally(self, backend: backends.Backend, y_true: Any, y_pred: Any, sources: dict) -> tf.Tensor:
        """Divide by the count of all replicas, over one checked all-gather."""
        gate, argument_error = weights.Gate(), None
        checks: list[checked.Check] = []
        try:
            sums, checks = self._sums(y_true, y_pred, sources, gate)
        except Exception as error:  # any error travels in the all-gather, so that no other replica waits for this one
            argument_error = error
            try:
                sums = averages.Sums(0.0, 0.0, 0.0) if tf.executing_eagerly() else averages.nan_sums(y_pred)
            except ValueError:
                raise error from None
        is_fixed = not isinstance(self.average, str)
        own_count = sums.tokens if self.average == "token" else sums.sequences
        payload = [sums.total, float(self.average) if is_fixed else own_count]
        table = checked.all_gather(backend, _NAME, payload, checks, argument_error)
        total, count = tf.unstack(tf.reduce_sum(table, axis=0))
        count = table[0, 1] if is_fixed else count
        gate.ok = True if tf.executing_eagerly() else tf.logical_not(tf.math.is_nan(count))
        value = tf.math.divide_no_nan(total, count)
        if backend.gradient_reduction == "sum":
            value /= tf.cast(backend.replica_count(), value.dtype)
        contribution = averages.local_contribution(backend, sums, count)
        return averages.value_with_gradient(tf.cast(value, sums.dtype), contribution)

    def _average_locally(
        self, backend: backends.Backend, y_true: Any, y_pred: Any, sources: dict, denominator: Any
    ) -> tf.Tensor:
        """Divide by a denominator that was counted before the step, without a collective."""
        count = counts.as_scalar(denominator, self.average)
        is_counts = isinstance(denominator, counts.Counts)
        if is_counts:
            counts.check_sources(denominator, sources, getattr(self.loss, "drops_invalid", False))
        gate = weights.Gate()
        sums, checks = self._sums(y_true, y_pred, sources, gate)
        has_tokens = self.per == "position" or sources["lengths"] is not None or self.padding_value is not None
        checks += counts.checks_of(denominator, count, backend, sums, has_tokens=has_tokens)
        if is_counts and denominator.local is None and self.per == "position":
            checks.append(counts.sources_check(y_true, y_pred, sources))
        gate.ok = checked.check_locally(backend, _NAME, checks)
        count = count if gate.ok is True else tf.where(gate.ok, count, tf.constant(np.nan, tf.float64))
        return averages.local_contribution(backend, sums, count)

    def _rehearse(self, y_true: Any, y_pred: Any, sources: dict) -> tf.Tensor:
        """Return NaN of the right shape and dtype for Keras 3, which traces a model once outside any replica.

        Keras never runs that trace. A run raises an error, or inside XLA gives NaN and NaN gradients.
        """
        gate = weights.Gate()
        sums, _ = self._sums(y_true, y_pred, sources, gate, counting=False)
        gate.ok = tf.constant(False)
        text = f"{_NAME}: called outside strategy.run, expected inside it, where a replica's code runs."
        with tf.control_dependencies([tf.debugging.Assert(False, [text])]):
            return tf.cast(sums.total * np.nan, sums.dtype)

    def _sums(
        self, y_true: Any, y_pred: Any, sources: dict, gate: weights.Gate, counting: bool = True
    ) -> tuple[averages.Sums, list[checked.Check]]:
        """This replica's sums, and the checks of its arguments."""
        y_true, y_pred = precision.as_tensor(y_true), precision.as_tensor(y_pred, nests=True)
        for name, given in (("y_true", y_true), ("y_pred", y_pred)):
            if isinstance(given, tf.RaggedTensor):
                raise TypeError(f"{_NAME}: {name} is a RaggedTensor, expected a padded tensor. Use distpad.pad.")
        try:
            if self.per == "sequence":
                w, positions, checks = self._of_sequences(y_true, y_pred, sources, counting)
                rows = w.effective_mask
            else:
                w, checks = weights.of_positions(y_true, y_pred, **sources)
                positions = rows = w.effective_mask
        except (ValueError, TypeError) as error:
            raise type(error)(f"{_NAME}: {error}") from error
        clean_true = weights.clean(y_true, positions, prediction=False, gate=gate)
        clean_pred = weights.clean(y_pred, rows, prediction=True, gate=gate)
        if self.per == "sequence":
            losses = no_rows.losses_of(self._unreduced, clean_true, clean_pred, self._traces_of_no_rows)
        else:
            losses = self._unreduced(clean_true, clean_pred)
        arguments.check_rank(losses, self.per, w, y_true, y_pred)
        if self.per == "position":
            self._warn_unmasked(losses, w)
        elif sources["lengths"] is not None or self.padding_value is not None:
            arguments.refuse_positions(self.loss, y_true, y_pred)
        w, check = weights.broadcast_to(_NAME, losses, w)
        average = self.average if self.per == "position" else "sequence_sum"
        return averages.sum_up(losses, w, average, gate), [*checks, check]

    def _of_sequences(
        self, y_true: Any, y_pred: Any, sources: dict, counting: bool
    ) -> tuple[weights.Weights, tf.Tensor | None, list[checked.Check]]:
        """As ``weights.of_sequences``, without the sequences that the loss itself leaves out."""
        w, positions, checks = weights.of_sequences(y_true, y_pred, **sources)
        if w.tokens is None and self.average == "token":
            raise ValueError("lengths are missing, expected [batch]: average='token' divides by their sum")
        if hasattr(self.loss, "filter_invalid"):
            kept, own_checks = self.loss.filter_invalid(y_true, y_pred, w.effective_mask, counting=counting)
            both = [shapes.Source("mask", w.mask), shapes.Source("mask", kept)]
            w, checks = w._replace(mask=shapes.all_of(both)[0]), checks + own_checks
        return w, positions, checks

    def _unreduced(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """The losses as a tensor, float32 at least."""
        losses = self.call(y_true, y_pred)
        if losses is None:
            remedy = (
                "Call it yourself: for tfa.seq2seq.SequenceLoss without averages and sums, "
                "lambda y_true, y_pred: loss(y_true, y_pred, tf.ones_like(y_pred[..., 0]))"
            )
            raise TypeError(errors.sentence(_NAME, "the loss's result", None, "a tensor [batch, ...]", remedy + "."))
        return precision.as_tensor(tf.convert_to_tensor(losses))

    def _warn_unmasked(self, losses: tf.Tensor, w: weights.Weights) -> None:
        """Warn once that all positions count, where a loss has positions and no source tells which are valid."""
        weighted = w.weight is not None and w.weight.shape.rank > 1
        if self._has_warned or w.mask is not None or weighted or losses.shape.rank < 2:
            return
        self._has_warned = True
        shape = tuple(losses.shape)
        warnings.warn(
            f"{_NAME}: no mask was given for a loss of shape {shape}, so that all positions count, padding too. Where "
            "there is padding, give batch=, lengths=, mask=, padding_value=, a sample_weight of 0 there, or use layers "
            "that pass on a Keras mask.",
            stacklevel=2,
        )

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
