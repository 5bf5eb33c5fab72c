"""Layers whose training step on many devices is not that of one: what a certificate names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

_MIXING, _RANDOM = "rows depend on each other in training", "random in training"
# Attributes that make a layer random where they are above 0; the first two mean something else elsewhere.
_RATES = {"rate": "Dropout", "stddev": "Noise", "dropout": "", "recurrent_dropout": ""}
# Layers of Keras that hold others, whose user knows them as one.
_WHOLE = ("Wrapper", "Bidirectional", "RNN", "MultiHeadAttention", "GroupQueryAttention")


def notes_on(model: Any) -> list[str]:
    """A line for each layer of ``model``, and of the layers inside, that mixes rows or is random; each once.

    >>> layers = [tf.keras.layers.Dropout(0.5, name="drop"), tf.keras.layers.Dense(1)]
    >>> notes_on(tf.keras.Sequential(layers))
    ['layer drop (Dropout): random in training']
    """
    return [f"layer {layer.name} ({type(layer).__name__}): {what}" for layer, what in _found(model, set())]


def _found(holder: Any, seen: set[int]) -> Iterator[tuple[Any, str]]:
    """The layers that ``holder`` is or holds, at any depth, with what is to be said of them."""
    if id(holder) in seen:
        return
    seen.add(id(holder))
    what = _said_of(holder) if isinstance(holder, tf.keras.layers.Layer) else ""
    if what:
        yield holder, what
        seen.update(id(part) for part in _parts(holder))
        return
    inner = [found for part in _parts(holder) for found in _found(part, seen)]
    if inner and _kinds(holder) & set(_WHOLE):
        yield holder, " and ".join(dict.fromkeys(what for _, what in inner))
    else:
        yield from inner


def _parts(holder: Any) -> list[Any]:
    """Layers, and collections that may hold some. Attributes are read as they are: Keras has no public list of them."""
    if isinstance(holder, dict):
        held = list(holder.values())
    elif isinstance(holder, (list, tuple)):
        held = list(holder)
    else:
        held = [*getattr(holder, "layers", []), *vars(holder).values()]
    return [part for part in held if isinstance(part, (tf.keras.layers.Layer, dict, list, tuple))]


def _said_of(layer: Any) -> str:
    kinds = _kinds(layer)
    if "BatchNormalization" in kinds or "BatchNormalizationBase" in kinds:
        return _MIXING if layer.trainable else ""  # frozen, it uses what it has seen before
    if type(layer).__name__.startswith("Random") and type(layer).__module__.split(".")[0] in ("keras", "tf_keras"):
        return _RANDOM
    for name, kind in _RATES.items():
        rate = getattr(layer, name, None)
        if rate is None and "MultiHeadAttention" in kinds:  # Keras 2 tells it in its configuration alone
            rate = layer.get_config().get(name)
        if isinstance(rate, (int, float)) and rate > 0 and any(kind in known for known in kinds):
            return _RANDOM
    return ""


def _kinds(layer: Any) -> set[str]:
    return {known.__name__ for known in type(layer).__mro__}
