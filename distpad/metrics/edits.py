"""CharacterErrorRate and WordErrorRate: edits from the predicted to the true sequences, by the length of the true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from distpad import errors, precision
from distpad.collectives import checked, shapes
from distpad.losses import averages, weights
from distpad.metrics import classes, ratio


class ErrorRate(ratio.Ratio):
    """Insertions, deletions and substitutions of the whole data set, divided by the length of its references."""

    def __init__(self, *, decode: Callable[[Any], Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        if decode is not None and not callable(decode):
            raise TypeError(errors.sentence(self._kind, "decode", repr(decode), "a callable (y_pred)"))
        self.decode = decode

    def _split(self, text: tf.Tensor) -> tf.RaggedTensor:
        """``[batch]`` strings as the units that are counted."""
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
        """Add a batch to this replica's part. What stands at positions that do not count changes nothing.

        Args:
          y_true: reference ids ``[batch, length]``, padded, or strings ``[batch]``.
          y_pred: predicted ids ``[batch, any length]`` (padded, with ``prediction_lengths`` or the metric's
            ``padding_value``; or a SparseTensor, as ``tf.nn.ctc_greedy_decoder`` gives it, or a RaggedTensor), strings
            ``[batch]``, or scores ``[batch, length, classes]`` of the labels' positions, of which the largest is taken.
          sample_weight: ``[batch]`` or ``[batch, 1]`` weighs sequences. Of those of positions it only matters which are
            0: such positions are no part of the reference.
          lengths: ``[batch]``, the valid positions of each reference. A row of length 0 does not count.
          mask: ``[batch, length]``, the valid positions; or ``[batch]``, which rows count: then those of length 0 do,
            too (an empty text, for which any prediction is wrong).
          prediction_lengths: ``[batch]``, the valid positions of each row of padded predicted ids.

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
        sources["keras_mask"] = weights.keras_mask(y_pred)
        y_true = self._tensor("y_true", y_true)
        y_pred = precision.as_tensor(y_pred if self.decode is None else self.decode(y_pred), widen=False)
        try:
            valid, positions, checks = self._rows(y_true, y_pred, sources)
            predicted, more = self._predicted(y_pred, prediction_lengths)
            reference = self._units("y_true", y_true) if y_true.shape.rank == 1 else None
        except (ValueError, TypeError) as error:
            raise type(error)(f"{self._kind}: {error}.") from error
        if reference is None:
            classes.refuse_binary(self._kind, y_true, y_pred, "Write decode= with a function that gives ids.")
            labels, guesses = classes.ids_of(self._kind, y_true, y_pred) if predicted is None else (y_true, None)
            counted = tf.ones_like(labels, tf.bool) if positions is None else shapes.widen(positions, 2)
            counted = tf.broadcast_to(counted, tf.shape(labels))
            reference = tf.ragged.boolean_mask(labels, counted)
            predicted = tf.ragged.boolean_mask(guesses, counted) if predicted is None else predicted
        if (predicted.dtype == tf.string) != (reference.dtype == tf.string):
            expected = f"{reference.dtype.name}, as y_true"
            raise TypeError(errors.sentence(self._kind, "the dtype of y_pred", predicted.dtype.name, expected))
        edits = tf.edit_distance(_sparse(predicted), _sparse(reference), normalize=False)
        edits = tf.ensure_shape(edits, [None])[:-1]  # its rank is lost where shapes of sparse tensors are not known
        valid = valid._replace(tokens=tf.cast(reference.row_lengths(), tf.float64))
        edits = tf.cast(edits, tf.float64)
        valid, check = weights.broadcast_to(self._kind, edits, valid)
        return averages.sum_up(edits, valid, "token"), [*checks, *more, check]

    def _rows(
        self, y_true: tf.Tensor, y_pred: Any, sources: dict[str, Any]
    ) -> tuple[weights.Weights, Any, list[checked.Check]]:
        """Which rows count, which positions are references, and the checks for the lengths."""
        weight = sources["sample_weight"]
        if weight is not None:
            weight = weights.check_weight(weight)
            if ratio.row_weight(weight) is None:
                sources = _with_mask({**sources, "sample_weight": None}, tf.not_equal(weight, 0))
        if _is_scores(y_pred) and self.decode is None and sources["keras_mask"] is not None:
            sources = _with_mask({**sources, "keras_mask": None}, sources["keras_mask"])  # of the labels' positions
        padding_value = None if y_true.shape.rank == 1 else self.padding_value
        return weights.of_sequences(y_true, **sources, padding_value=padding_value)

    def _predicted(self, y_pred: Any, lengths: Any) -> tuple[Any, list[checked.Check]]:
        """Predicted sequences, ragged or sparse; None for scores, which lie on the labels' positions."""
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
        decode = None if self.decode is None else tf.keras.utils.serialize_keras_object(self.decode)
        return {**super().get_config(), "decode": decode}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ErrorRate:
        decode = config["decode"]
        return cls(**{**config, "decode": decode and tf.keras.utils.deserialize_keras_object(decode)})


@tf.keras.utils.register_keras_serializable("distpad")
class CharacterErrorRate(ErrorRate):
    """Edits by characters, of ids or of strings, whose characters are those of Unicode.

    Total edits by total reference length, over the whole data set: not a mean of the sequences' own rates. Edits are
    counted by ``tf.edit_distance``, which XLA does not compile: ``model.compile(..., jit_compile=False)``.

    Args:
      decode: ``y_pred -> ids``, called first: what makes ids of a CTC model's output, in ``compile`` too.
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
    """Edits by words, of strings, which are split at white space, or of sequences of word ids.

    All else is as in ``CharacterErrorRate``.

    Args:
      decode, padding_value, backend, name: as there.

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
    """Sources of which the mask holds where ``more`` does, too."""
    if sources["mask"] is None:
        return {**sources, "mask": more}
    both = [shapes.Source("mask", weights.check_mask(sources["mask"])), shapes.Source("mask", more, True)]
    return {**sources, "mask": shapes.all_of(both)[0]}


def _sparse(sequences: Any) -> tf.SparseTensor:
    """As ``tf.edit_distance`` takes them, with an empty row behind them, since it fails on none."""
    given = sequences if isinstance(sequences, tf.SparseTensor) else sequences.to_sparse()
    values = given.values if given.dtype == tf.string else tf.cast(given.values, tf.int64)
    return tf.SparseTensor(given.indices, values, tf.add(given.dense_shape, [1, 0]))
