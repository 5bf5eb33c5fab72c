"""CharacterErrorRate and WordErrorRate: edits from predicted to true sequences, divided by the true length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from distpad import errors, precision
from distpad.backends import keras_masks
from distpad.collectives import checked, shapes
from distpad.losses import averages, ctc, weights
from distpad.losses.counted import CountedWeights
from distpad.metrics import classes, ratio


class ErrorRate(ratio.Ratio):
    """Insertions, deletions and substitutions of the whole data set, divided by the length of its references."""

    def __init__(
        self,
        *,
        decode: Callable[[Any], Any] | str | None = None,
        blank_index: int = 0,
        frames_per_step: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not (decode is None or decode == "ctc" or callable(decode)):
            raise TypeError(errors.sentence(self._kind, "decode", errors.shown(decode), "'ctc' or a callable (y_pred)"))
        self.decode = decode
        self.blank_index = errors.integer(self._kind, "blank_index", blank_index, least=-1)
        self.frames_per_step = (
            None if frames_per_step is None else errors.integer(self._kind, "frames_per_step", frames_per_step, least=1)
        )

    def _split(self, text: tf.Tensor) -> tf.RaggedTensor:
        """Split strings ``[batch]`` into characters or words."""
        raise NotImplementedError

    @tf.autograph.experimental.do_not_convert
    def update_state(
        self,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any = None,
        *,
        lengths: Any = None,
        mask: Any = None,
        prediction_lengths: Any = None,
    ) -> None:
        """Add a batch to this replica's sums. Values at padded positions do not change the result.

        Args:
          y_true: reference ids ``[batch, length]``, padded, or strings ``[batch]``.
          y_pred: predicted ids ``[batch, any length]``: padded, with ``prediction_lengths`` or the metric's
            ``padding_value``, or a RaggedTensor, or a SparseTensor, such as ``tf.nn.ctc_greedy_decoder`` returns. Or
            strings ``[batch]``, or scores ``[batch, length, classes]`` at the labels' positions, whose largest counts.
          sample_weight: ``[batch]`` or ``[batch, 1]`` weighs sequences. Sample weights of positions remove the
            positions whose weight is 0 from the reference.
          lengths: ``[batch]``, the number of valid positions of each reference. A row of length 0 does not count.
          mask: ``[batch, length]``, the valid positions; or ``[batch]``, the rows that count. A row of length 0 that a
            ``[batch]`` mask includes is an empty text, and any prediction for it is wrong.
          prediction_lengths: ``[batch]``, the number of valid positions of each row of padded predicted ids.

        Raises: as the other metrics. Not collective.
        """
        self._update(
            y_true,
            y_pred,
            sample_weight=sample_weight,
            lengths=lengths,
            mask=mask,
            prediction_lengths=prediction_lengths,
        )

    def _sums(self, y_true: Any, y_pred: Any, sources: dict[str, Any]) -> tuple[averages.Sums, list[checked.Check]]:
        prediction_lengths = sources.pop("prediction_lengths")
        sources["keras_mask"] = keras_masks.of(y_pred)
        y_true = self._tensor("y_true", y_true)
        if not tf.is_tensor(y_true):
            raise TypeError(errors.sentence(self._kind, "y_true", errors.shown(y_true), "a tensor"))
        carrier = sources["sample_weight"] if isinstance(sources["sample_weight"], CountedWeights) else None
        decoded, own_checks = self._decoded(y_pred, carrier)
        y_pred = precision.as_tensor(decoded, widen=False)
        if carrier is not None and carrier.weighs != "positions":
            given = carrier.sources("sequence")
            sources.update(given if sources["lengths"] is None else {"sample_weight": given["sample_weight"]})
        try:
            valid, positions, checks = self._rows(y_true, y_pred, sources)
            predicted, more = self._predicted(y_pred, prediction_lengths)
            reference = self._units("y_true", y_true) if y_true.shape.rank == 1 else None
        except (ValueError, TypeError) as error:
            raise type(error)(f"{self._kind}: {error}.") from error
        if reference is not None and predicted is None:
            found = f"of shape {tuple(y_pred.shape)} and dtype {y_pred.dtype.name}"
            raise ValueError(errors.sentence(self._kind, "y_pred", found, "strings, as y_true, or decoded ids"))
        if reference is None:
            classes.refuse_binary(self._kind, y_true, y_pred, "Write decode= with a function that returns ids.")
            labels, guesses = classes.ids_of(self._kind, y_true, y_pred) if predicted is None else (y_true, None)
            counted = tf.ones_like(labels, tf.bool) if positions is None else shapes.widen(positions, 2)
            counted = tf.broadcast_to(counted, tf.shape(labels))
            reference = tf.ragged.boolean_mask(labels, counted)
            predicted = tf.ragged.boolean_mask(guesses, counted) if predicted is None else predicted
        if (predicted.dtype == tf.string) != (reference.dtype == tf.string):
            expected = f"{reference.dtype.name}, as y_true"
            raise TypeError(errors.sentence(self._kind, "the dtype of y_pred", predicted.dtype.name, expected))
        edits = tf.edit_distance(_sparse(predicted), _sparse(reference), normalize=False)
        edits = tf.ensure_shape(edits, [None])[:-1]  # the rank is unknown where shapes of sparse tensors are
        valid = valid._replace(tokens=tf.cast(reference.row_lengths(), tf.float64))
        edits = tf.cast(edits, tf.float64)
        valid, check = weights.broadcast_to(self._kind, edits, valid)
        return averages.sum_up(edits, valid, "token"), [*own_checks, *checks, *more, check]

    def _decoded(self, y_pred: Any, carrier: CountedWeights | None) -> tuple[Any, list[checked.Check]]:
        """What the model read: its prediction, decoded; and the check of its frames."""
        if not isinstance(self.decode, str):
            return (y_pred if self.decode is None else self.decode(y_pred)), []
        logits = precision.as_tensor(y_pred)
        if not _is_scores(logits) or logits.shape.rank != 3:
            found = f"of shape {tuple(logits.shape)} and dtype {logits.dtype.name}"
            raise ValueError(errors.sentence(self._kind, "y_pred", found, "logits [batch, frames, classes]"))
        frames = ctc.frames_in_fit(self, self._kind, y_pred, carrier, self.frames_per_step, None)
        blank = self.blank_index % (logits.shape[2] or 1)
        most, limit = tf.reduce_max(frames), tf.shape(logits)[1]
        text = "frames_per_step gives more frames than y_pred has, expected at most those (found: both)"
        frames = tf.minimum(frames, limit)
        decoded = tf.nn.ctc_greedy_decoder(tf.transpose(logits, [1, 0, 2]), frames, blank_index=blank)[0][0]
        return decoded, [checked.Check(text, (most, limit), most <= limit)]

    def _rows(
        self, y_true: tf.Tensor, y_pred: Any, sources: dict[str, Any]
    ) -> tuple[weights.Weights, Any, list[checked.Check]]:
        """The rows that count, the positions of the references, and the checks of the lengths."""
        weight = sources["sample_weight"]
        if weight is not None:
            weight = weights.check_weight(weight)
            if ratio.row_weight(weight) is None:
                sources = _with_mask({**sources, "sample_weight": None}, tf.not_equal(weight, 0))
        if _is_scores(y_pred) and self.decode is None and sources["keras_mask"] is not None:
            sources = _with_mask(
                {**sources, "keras_mask": None}, sources["keras_mask"]
            )  # a mask of the labels' positions
        padding_value = None if y_true.shape.rank == 1 else self.padding_value
        return weights.of_sequences(y_true, **sources, padding_value=padding_value)

    def _predicted(self, y_pred: Any, lengths: Any) -> tuple[Any, list[checked.Check]]:
        """Predicted sequences, ragged or sparse; None for scores, which have the labels' positions."""
        if isinstance(y_pred, (tf.RaggedTensor, tf.SparseTensor)):
            return y_pred, []
        if _is_scores(y_pred):
            return None, []
        if not isinstance(y_pred, tf.Tensor):
            raise TypeError(f"y_pred is a {type(y_pred).__name__}, expected ids, scores or strings")
        if y_pred.shape.rank == 1:
            return self._units("y_pred", y_pred), []
        sources = dict.fromkeys(("mask", "keras_mask", "sample_weight"))
        padding_value = self.padding_value
        _, counted, checks = weights.of_sequences(y_pred, lengths=lengths, padding_value=padding_value, **sources)
        counted = tf.ones_like(y_pred, tf.bool) if counted is None else counted
        named = [check._replace(text=f"prediction_{check.text}") for check in checks]
        return tf.ragged.boolean_mask(y_pred, counted), named

    def _units(self, name: str, text: tf.Tensor) -> tf.RaggedTensor:
        if text.dtype != tf.string:
            raise TypeError(
                f"{name} has shape [batch] and dtype {text.dtype.name}, expected ids [batch, length] or text"
            )
        return self._split(text)

    def get_config(self) -> dict[str, Any]:
        """As in Keras."""
        decode = self.decode
        if callable(decode):
            decode = tf.keras.utils.serialize_keras_object(decode)
        options = {"decode": decode, "blank_index": self.blank_index, "frames_per_step": self.frames_per_step}
        return {**super().get_config(), **options}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ErrorRate:
        decode = config["decode"]
        if decode and decode != "ctc":
            decode = tf.keras.utils.deserialize_keras_object(decode)
        return cls(**{**config, "decode": decode})


@tf.keras.utils.register_keras_serializable("distpad")
class CharacterErrorRate(ErrorRate):
    """Character edits of ids, or of strings, whose characters are Unicode characters.

    The rate is total edits divided by total reference length, over the whole data set; not the mean of the rates of
    sequences. ``tf.edit_distance`` counts edits. XLA does not compile it: ``model.compile(..., jit_compile=False)``.

    Args:
      decode: ``y_pred -> ids``, called first; or "ctc", a greedy decoder of a CTC model's logits
        ``[batch, frames, classes]``.
      blank_index: for "ctc", the class of the blank; -1 is the last class.
      frames_per_step: for "ctc" in Keras's ``weighted_metrics``, as in ``distpad.CTC``: with the weights of
        ``for_keras`` it tells the frames of each row. None: Keras's mask tells them, or else all frames count.
      padding_value, backend, name: see ``distpad.metrics``.

    Source: V. I. Levenshtein, Binary codes capable of correcting deletions, insertions and reversals, 1966.

    >>> metric = CharacterErrorRate()
    >>> metric.update_state([[1, 2, 3, 4], [5, 0, 0, 0]], [[1, 3, 4], [5, 0, 0]],
    ...                     lengths=[4, 1], prediction_lengths=[3, 1])
    >>> float(metric.result())
    0.2
    """

    def _split(self, text: tf.Tensor) -> tf.RaggedTensor:
        return tf.strings.unicode_split(text, "UTF-8")


@tf.keras.utils.register_keras_serializable("distpad")
class WordErrorRate(ErrorRate):
    """Word edits of strings, which are split at white space, or of sequences of word ids.

    Edits are divided as in ``CharacterErrorRate``.

    Args:
      decode, blank_index, frames_per_step, padding_value, backend, name: as in ``CharacterErrorRate``.

    >>> metric = WordErrorRate()
    >>> metric.update_state(["the cat sat", "yes"], ["the bat  sat", "yes"])
    >>> float(metric.result())
    0.25
    """

    def _split(self, text: tf.Tensor) -> tf.RaggedTensor:
        return tf.strings.split(text)


def _is_scores(y_pred: Any) -> bool:
    return isinstance(y_pred, tf.Tensor) and y_pred.dtype.is_floating


def _with_mask(sources: dict[str, Any], more: tf.Tensor) -> dict[str, Any]:
    """The sources with the AND of their mask and ``more``."""
    if sources["mask"] is None:
        return {**sources, "mask": more}
    both = [shapes.Source("mask", weights.check_mask(sources["mask"])), shapes.Source("mask", more, True)]
    return {**sources, "mask": shapes.all_of(both)[0]}


def _sparse(sequences: Any) -> tf.SparseTensor:
    """Sequences for ``tf.edit_distance``, with an empty row at the end, since it fails on 0 rows."""
    given = sequences if isinstance(sequences, tf.SparseTensor) else sequences.to_sparse()
    values = given.values if given.dtype == tf.string else tf.cast(given.values, tf.int64)
    return tf.SparseTensor(given.indices, values, tf.add(given.dense_shape, [1, 0]))
