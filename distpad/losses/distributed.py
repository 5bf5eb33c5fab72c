"""DistributedLoss: an unreduced loss, averaged exactly over the valid positions of all replicas."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import tensorflow as tf

from distpad import backends, errors, gradients, precision
from distpad.backends import finite, keras_masks
from distpad.collectives import checked
from distpad.losses import arguments, averages, counted, counts, no_rows, weights

_NAME = "DistributedLoss"


@tf.keras.utils.register_keras_serializable("distpad")
class DistributedLoss(tf.keras.losses.Loss):
    r"""Average a loss over the valid positions of all replicas of all workers, exactly.

    With w the weight of each position (mask times sample weight) and l its loss, ``average`` is

    - ``"token"``: :math:`\sum w l / \sum w`;
    - ``"sequence_sum"``: :math:`\sum w l` / number of sequences with :math:`\sum w > 0`;
    - ``"sequence_mean"``: the mean over those sequences of each one's own :math:`\sum w l / \sum w`;
    - a positive number: :math:`\sum w l` / number.

    All sums run over all replicas. A call returns a scalar on each replica. After the engine's own reduction, its
    gradient is the gradient of the average: one optimiser step on N replicas equals one step on one device with the
    concatenated batch. Values at invalid positions (NaN, infinity, labels out of range) change no bit of the loss or of
    a gradient. A global batch without valid positions gives 0 and zero gradients.

    Args:
      loss: a Keras loss (Keras 2 or 3, TensorFlow Addons) of reduction none or of the default reduction, which
        ``average`` replaces; the name of a Keras loss, such as ``"mse"``; or a callable
        ``(y_true, y_pred) -> [batch, ...]``, one value a position, ``[batch]`` with ``per="sequence"``. Autograph does
        not convert a callable: decorate one with Python's ``if`` or ``for`` over tensors with ``tf.function``. A loss
        ``[batch]`` without masks and lengths is plain classification: each row is one position.
      average: "token", "sequence_sum", "sequence_mean", or a positive number.
      per: "position", or "sequence" for a loss with one value a sequence, such as CTC. With "sequence", the average
        "token" divides by the global sum of ``lengths``, the sequence averages by the number of valid sequences.
      padding_value: a scalar; labels equal to it are invalid. A label vector is invalid if all its components are.
      backend: see ``distpad.backends.resolve``; None: detected at each call.
      check_finite: raise on all workers if the loss of an example is NaN or infinite, and name the replica and the
        examples: as ``distpad.check_finite``, in loops with ``batch=batch`` and in ``fit`` with ``for_keras``, there at
        the next window sync or the end of the epoch.
      name: as in Keras.

    Raises:
      TypeError: ``loss`` is no callable, ``average`` no string or number, ``padding_value`` no scalar.
      ValueError: ``loss`` has another reduction or is an unknown name; ``average`` or ``per`` is unknown.

    The README derives the local contribution and its scale.

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
        check_finite: bool = False,
        name: str = "distributed_loss",
    ) -> None:
        is_name = name is None or isinstance(name, str)  # None: Keras makes one
        errors.require(_NAME, is_name, "name", errors.shown(name), "a string", error=TypeError)
        # Keras divides neither a loss of reduction "sum" nor its history by the number of replicas.
        super().__init__(reduction="sum", name=name)
        backends.enable_keras_fit()  # the loss's own backend is detected in the step, which Keras would not reach
        loss = arguments.unreduced(loss)
        arguments.check_ignored(loss, padding_value)
        if isinstance(average, bool) or not isinstance(average, (str, numbers.Real)):
            raise TypeError(errors.sentence(_NAME, "average", errors.shown(average), "a string or a positive number"))
        if isinstance(average, str):
            errors.choice(_NAME, "average", average, ("token", "sequence_sum", "sequence_mean"))
        elif not 0 < errors.number(_NAME, "average", average, finite=False) < float("inf"):
            raise ValueError(errors.sentence(_NAME, "average", average, "a positive number"))
        errors.choice(_NAME, "per", per, ("position", "sequence"))
        if padding_value is not None and not np.isscalar(padding_value):
            raise TypeError(
                errors.sentence(_NAME, "padding_value", errors.shown(padding_value), "one number or string")
            )
        self.loss = loss
        self.average = average if isinstance(average, str) else float(average)  # Keras cannot save NumPy's numbers
        self.per = per
        self.padding_value = padding_value
        self.check_finite = errors.flag(_NAME, "check_finite", check_finite)
        self._backend = backend
        self._ran_on: backends.Backend | None = None
        self._traces_of_no_rows: dict[Any, Any] = {}

    @tf.autograph.experimental.do_not_convert  # conversion would take 3 s of the first trace
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
        """Compute this replica's local contribution to the global mean.

        Masks from all sources are combined with AND. Without any source, all positions are valid.

        Args:
          y_true: labels, a tensor ``[batch, ...]``; a nest reaches the loss unchanged.
          y_pred: floating predictions ``[batch, length, ...]``, or a nest of them.
          sample_weight: numbers, leading axes of the loss, ``[batch]`` at least; all axes but the first may have size
            1. A position of weight 0 is invalid. The weights of ``for_keras`` carry the counts of their step, which the
            loss uses if no other source drops positions.
          lengths: ``[batch]`` integers from 0 to the size of axis 1, the valid positions of each row; padding follows.
          mask: bool, leading axes of the loss. With ``per="sequence"``, a mask ``[batch]`` alone decides which rows
            count: a row of length 0 (an empty text) counts where the mask is True.
          denominator: a count made before the step, a scalar above 0 or ``Counts``. It is 0 only where no position is
            valid. The step then has no collective of its own.
          batch: a batch of ``PaddedBatches``, in place of ``lengths``, ``sample_weight`` and ``denominator``. With
            several losses, ``batch.loss_inputs[NAME]``.

        Returns:
          A scalar of the loss's dtype, float32 at least. Without ``denominator`` its value is the global mean, under
          strategies divided by the number of replicas, and equal on all replicas. With ``denominator``, and on one
          worker with the counts of ``for_keras``, its value is the local contribution: ``global_value`` gives the
          mean, and so does Keras's history, which adds up the replicas. Its gradient is always that of the local
          contribution.

        Raises:
          ValueError, TypeError: wrong arguments; without ``denominator`` all replicas raise.
          tf.errors.InvalidArgumentError: wrong values inside a ``tf.function``. Inside XLA, which drops assertions, the
            loss and all gradients are NaN instead.

        Collective without ``denominator``: one all-reduce of the numerator, the count and the evidence of errors. With
        the counts of ``for_keras`` gradients do not wait for it, and one worker has none.
        """
        backend = backends.resolve_step(self._backend, function=_NAME)
        arguments.refuse_layers(backend)
        if not backends.is_alone():  # a certificate's reference device is alone
            self._ran_on = backend
        sample_weight = keras_masks.unmasked_weights(sample_weight)
        carrier = sample_weight if isinstance(sample_weight, counted.CountedWeights) else None
        sources = {"sample_weight": sample_weight if carrier is None else None, "lengths": lengths, "mask": mask}
        if batch is not None:
            sources, batch_counts = counts.read_batch(batch, sources, denominator)
            denominator = batch_counts if isinstance(self.average, str) else None
        sources.update(keras_mask=keras_masks.of(y_pred), padding_value=self.padding_value)
        if carrier is not None:
            is_counted = carrier.has_counts(backend, sources, self.loss)
            y_true = carrier.labels_of(y_true, y_pred, self.loss)
            given = carrier.sources(self.per)
            sources.update({name: value for name, value in given.items() if sources[name] is None})
        indices = getattr(batch if carrier is None else carrier, "indices", None) if self.check_finite else None
        gate = weights.Gate(indices)
        if denominator is not None:
            return self._average_locally(backend, y_true, y_pred, sources, gate, denominator)
        if not backend.in_replica() and not tf.executing_eagerly():
            return self._rehearse(y_pred)
        if carrier is None or not is_counted:
            return self._average_globally(backend, y_true, y_pred, sources, gate)
        if backend.num_workers > 1:  # errors reach the other workers, and each rank of Horovod has its own history
            return self._average_globally(backend, y_true, y_pred, sources, gate, carrier)
        return self._average_in_fit(backend, y_true, y_pred, sources, gate, carrier)

    @property
    def backend(self) -> Any:
        """The argument ``backend``."""
        return self._backend

    def call(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """Return the unreduced loss, as Keras defines ``call``."""
        if not hasattr(self.loss, "call"):
            return self.loss(y_true, y_pred)
        return self.loss.call(arguments.as_keras_casts(self.loss, y_true, y_pred), y_pred)

    def global_value(self, loss: Any) -> tf.Tensor:
        """Return the global mean for logging, by the backend on which this loss last ran.

        Args:
          loss: the scalar that the call returned; outside ``strategy.run``, the value that ``strategy.run`` returned.

        Returns: a scalar of the loss's dtype, equal on all replicas.

        Collective: one all-reduce.
        """
        return gradients.global_value(loss, backend=self._ran_on or self._backend)

    def _average_globally(
        self,
        backend: backends.Backend,
        y_true: Any,
        y_pred: Any,
        sources: dict,
        gate: weights.Gate,
        carrier: Any = None,
    ) -> tf.Tensor:
        """Divide by the count of all replicas, over one checked all-gather.

        With a ``carrier`` of counts, only the value needs the all-gather: the gradients do not wait for it.
        """
        argument_error = None
        checks: list[checked.Check] = []
        try:
            sums, checks = self._sums(y_true, y_pred, sources, gate)
        except Exception as error:  # The all-gather carries any error, so that no other replica waits for this one.
            argument_error = error
            try:
                sums = averages.Sums(0.0, 0.0, 0.0) if tf.executing_eagerly() else averages.nan_sums(y_pred)
            except ValueError:
                raise error from None
        if carrier is not None and argument_error is None:
            checks.append(carrier.check(sums))
        is_fixed = not isinstance(self.average, str)
        own_count = sums.tokens if self.average == "token" else sums.sequences
        payload = [sums.total, float(self.average) if is_fixed else own_count]
        table = checked.all_gather(backend, _NAME, payload, checks, argument_error)
        total, count = tf.unstack(tf.reduce_sum(table, axis=0))
        count = table[0, 1] if is_fixed else count
        is_ok = tf.logical_not(tf.math.is_nan(count))
        if carrier is not None:
            count = carrier.count_of(self.average)
            is_ok = tf.reduce_all(tf.stack([True, *(check.ok for check in checks)]))
        gate.ok = True if tf.executing_eagerly() else is_ok
        value = tf.math.divide_no_nan(total, count)
        if backend.gradient_reduction == "sum":
            value /= tf.cast(backend.replica_count(), value.dtype)
        contribution = averages.local_contribution(backend, sums, count)
        return averages.value_with_gradient(tf.cast(value, sums.dtype), contribution)

    def _average_in_fit(
        self,
        backend: backends.Backend,
        y_true: Any,
        y_pred: Any,
        sources: dict,
        gate: weights.Gate,
        carrier: counted.CountedWeights,
    ) -> tf.Tensor:
        """Divide by the count that the weights carry, without a collective.

        The value is the local contribution. Keras multiplies it by the number of replicas and averages it over them, so
        that its history shows the sum over the replicas: the global mean.
        """
        sums, checks = self._sums(y_true, y_pred, sources, gate)
        gate.ok = checked.check_locally(backend, _NAME, [*checks, carrier.check(sums)])
        count = carrier.count_of(self.average)
        count = count if gate.ok is True else tf.where(gate.ok, count, tf.constant(np.nan, tf.float64))
        return averages.local_contribution(backend, sums, count)

    def _average_locally(
        self, backend: backends.Backend, y_true: Any, y_pred: Any, sources: dict, gate: weights.Gate, denominator: Any
    ) -> tf.Tensor:
        """Divide by a denominator that was counted before the step, without a collective."""
        count = counts.as_scalar(denominator, self.average)
        is_counts = isinstance(denominator, counts.Counts)
        if is_counts:
            counts.check_sources(denominator, sources, getattr(self.loss, "drops_invalid", False))
        sums, checks = self._sums(y_true, y_pred, sources, gate)
        has_tokens = self.per == "position" or sources["lengths"] is not None or self.padding_value is not None
        checks += counts.checks_of(denominator, count, backend, sums, has_tokens=has_tokens)
        if is_counts and denominator.local is None and self.per == "position":
            checks.append(counts.sources_check(y_true, y_pred, sources))
        gate.ok = checked.check_locally(backend, _NAME, checks)
        count = count if gate.ok is True else tf.where(gate.ok, count, tf.constant(np.nan, tf.float64))
        return averages.local_contribution(backend, sums, count)

    def _rehearse(self, y_pred: Any) -> tf.Tensor:
        """Return NaN of the right shape and dtype for Keras 3, which traces a model once outside any replica.

        That trace has plain tensors in place of the weights of ``for_keras``. Keras never runs it. A run raises an
        error, or inside XLA gives NaN and NaN gradients.
        """
        leaves = tf.nest.flatten(precision.as_tensor(y_pred, nests=True))
        dtype = max((leaf.dtype for leaf in leaves), key=lambda dtype: dtype.size)
        text = f"{_NAME}: called outside strategy.run, expected inside it, where a replica's code runs."
        with tf.control_dependencies([tf.debugging.Assert(False, [text])]):
            return tf.add_n([tf.reduce_sum(tf.cast(leaf, dtype)) for leaf in leaves]) * np.nan

    def _sums(
        self, y_true: Any, y_pred: Any, sources: dict, gate: weights.Gate
    ) -> tuple[averages.Sums, list[checked.Check]]:
        """This replica's sums, and the checks of its arguments."""
        y_true, y_pred = precision.as_tensor(y_true), precision.as_tensor(y_pred, nests=True)
        for name, given in (("y_true", y_true), ("y_pred", y_pred)):
            if isinstance(given, tf.RaggedTensor):
                raise TypeError(f"{_NAME}: {name} is a RaggedTensor, expected a padded tensor. Use distpad.pad.")
        try:
            if self.per == "sequence":
                w, positions, checks = self._of_sequences(y_true, y_pred, sources)
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
        self._warn_unmasked(y_true, y_pred, losses, w, sources)
        if self.per == "sequence" and (sources["lengths"] is not None or self.padding_value is not None):
            arguments.refuse_positions(self.loss, y_true, y_pred)
        w, check = weights.broadcast_to(_NAME, losses, w)
        if gate.indices is not None:
            mask = True if w.effective_mask is None else w.effective_mask
            bad = tf.reshape(~tf.math.is_finite(losses) & mask, [tf.shape(losses)[0], -1])
            rows = tf.reduce_any(bad, axis=1)
            finite.note(tf.reduce_any(rows), gate.indices, rows, "loss", backends.resolve_step(self._backend))
        average = self.average if self.per == "position" else "sequence_sum"
        return averages.sum_up(losses, w, average, gate), [*checks, check]

    def _of_sequences(
        self, y_true: Any, y_pred: Any, sources: dict
    ) -> tuple[weights.Weights, tf.Tensor | None, list[checked.Check]]:
        """As ``weights.of_sequences``, without the sequences that the loss itself drops."""
        w, positions, checks = weights.of_sequences(y_true, y_pred, **sources)
        if w.tokens is None and self.average == "token":
            raise ValueError("lengths are missing, expected [batch]: average='token' divides by their sum")
        if hasattr(self.loss, "filter_invalid"):
            kept, own_checks = self.loss.filter_invalid(y_true, y_pred, w.effective_mask)
            w, checks = w.restrict(kept), checks + own_checks
        return w, positions, checks

    def _unreduced(self, y_true: Any, y_pred: Any) -> tf.Tensor:
        """The losses as a tensor, float32 at least."""
        try:
            losses = self.call(y_true, y_pred)
        except tf.errors.UnimplementedError as error:  # of an operation that runs eagerly
            raise TypeError(
                f"{_NAME}: the loss does not take labels or predictions of these dtypes: {error}"
            ) from error
        if losses is None:
            remedy = (
                "Call it yourself: for tfa.seq2seq.SequenceLoss without averages and sums, "
                "lambda y_true, y_pred: loss(y_true, y_pred, tf.ones_like(y_pred[..., 0]))"
            )
            raise TypeError(errors.sentence(_NAME, "the loss's result", None, "a tensor [batch, ...]", remedy + "."))
        return precision.as_tensor(tf.convert_to_tensor(losses))

    def _warn_unmasked(self, y_true: Any, y_pred: Any, losses: tf.Tensor, w: weights.Weights, sources: dict) -> None:
        """Warn once that padding counts, where no source tells which positions are valid."""
        if self.per == "position":
            is_weighted = w.weight is not None and any(size != 1 for size in w.weight.shape[1:])
            is_unmasked = w.mask is None and not is_weighted and any(size != 1 for size in losses.shape[1:])
        else:
            has_source = any(sources[name] is not None for name in sources if name != "sample_weight")
            is_unmasked = not has_source and weights.has_positions(y_true, y_pred)
        if is_unmasked:
            shape = tuple(losses.shape)
            effect = (
                f"{_NAME}: no mask was given for a loss of shape {shape}, so that all positions count, padding too."
            )
            remedy = (
                "Where there is padding, give the weights of for_keras, batch=, lengths=, mask=, padding_value=, a "
                "sample_weight of 0 there, or use layers that pass on a Keras mask."
            )
            is_certain = self.per == "position"
            keras_masks.warn_unmasked(self, y_pred, effect, remedy, in_any_case=is_certain)

    def get_config(self) -> dict[str, Any]:
        """As in Keras: a saved model keeps the loss. A backend that is no string is not saved, but detected."""
        return {
            "name": self.name,
            "loss": tf.keras.utils.serialize_keras_object(self.loss),
            "average": self.average,
            "per": self.per,
            "padding_value": self.padding_value,
            "check_finite": self.check_finite,
            "backend": self._backend if isinstance(self._backend, str) else None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DistributedLoss:
        loss = config["loss"]
        # In its older formats, Keras 2 restores losses with losses.deserialize alone, functions with the other alone.
        function = isinstance(loss, dict) and loss["class_name"] == "function"
        restore = tf.keras.utils.deserialize_keras_object if function else tf.keras.losses.deserialize
        return cls(**{**config, "loss": restore(loss)})
