"""Layers whose training step on many devices differs from that of one device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from distpad import layers

_MIXING, _RANDOM = "rows depend on each other in training", "random in training"
# Attributes that make a layer random where they are above 0, and the class names that the first two belong to.
_RATES = {"rate": "Dropout", "stddev": "Noise", "dropout": "", "recurrent_dropout": ""}
# Layers that are alike on any number of replicas.
_EXACT = (layers.BatchNormalization, layers.Dropout, layers.SpatialDropout1D)
# Keras layers that contain others: the note names the outer layer, which the user made.
_OUTER = ("Wrapper", "Bidirectional", "RNN", "MultiHeadAttention", "GroupQueryAttention")


def notes_on(model: Any) -> list[str]:
    """A note for each layer of ``model``, at any depth, that mixes rows or is random in training.

    >>> layers = [tf.keras.layers.Dropout(0.5, name="drop"), tf.keras.layers.Dense(1)]
    >>> notes_on(tf.keras.Sequential(layers))
    ['layer drop (Dropout): random in training']
    """
    return [f"layer {layer.name} ({type(layer).__name__}): {effect}" for layer, effect in _effects(model, set())]


def depend_on_the_batch(model: Any) -> list[str]:
    """The names of the layers of distpad in ``model`` for which micro-batches are another training than one batch.

    Batch normalisation has the moments of a batch, and dropout draws new numbers in each call.
    """
    found = [part for part in _within(model, set()) if isinstance(part, _EXACT)]
    return [part.name for part in found if (part.rate if hasattr(part, "rate") else part.trainable)]


def _within(holder: Any, seen: set[int]) -> Iterator[Any]:
    """``holder`` and the layers and collections inside, each once."""
    if id(holder) not in seen:
        seen.add(id(holder))
        yield holder
        for part in _parts(holder):
            yield from _within(part, seen)


def _effects(holder: Any, seen: set[int]) -> Iterator[tuple[Any, str]]:
    """Each layer with an effect in training, among ``holder`` and the layers inside, once."""
    if id(holder) in seen:
        return
    seen.add(id(holder))
    effect = _effect_of(holder) if isinstance(holder, tf.keras.layers.Layer) else ""
    if effect:
        yield holder, effect
        seen.update(id(part) for part in _parts(holder))
        return
    inner = [found for part in _parts(holder) for found in _effects(part, seen)]
    if inner and _class_names(holder) & set(_OUTER):
        yield holder, " and ".join(dict.fromkeys(effect for _, effect in inner))
    else:
        yield from inner


def _parts(holder: Any) -> list[Any]:
    """Layers and collections in ``holder``. Keras has no public list of all, so ``vars`` reads the attributes."""
    if isinstance(holder, dict):
        held = list(holder.values())
    elif isinstance(holder, (list, tuple)):
        held = list(holder)
    else:
        held = [*getattr(holder, "layers", []), *vars(holder).values()]
    return [part for part in held if isinstance(part, (tf.keras.layers.Layer, dict, list, tuple))]


def _effect_of(layer: Any) -> str:
    """The effect of this layer alone, or an empty string."""
    class_names = _class_names(layer)
    if isinstance(layer, _EXACT):
        return ""
    if "BatchNormalization" in class_names or "BatchNormalizationBase" in class_names:
        return _MIXING if layer.trainable else ""  # a frozen one uses its moving averages
    if type(layer).__name__.startswith("Random") and type(layer).__module__.split(".")[0] in ("keras", "tf_keras"):
        return _RANDOM
    for name, owner in _RATES.items():
        rate = getattr(layer, name, None)
        if rate is None and "MultiHeadAttention" in class_names:  # in Keras 2, only the config has the rate
            rate = layer.get_config().get(name)
        if isinstance(rate, (int, float)) and rate > 0 and any(owner in known for known in class_names):
            return _RANDOM
    return ""


def _class_names(layer: Any) -> set[str]:
    return {known.__name__ for known in type(layer).__mro__}
