"""Keras masks: the one that reaches a loss with the predictions, and one that a layer dropped on the way."""

from __future__ import annotations

import collections
import functools
import posixpath
import re
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from distpad import versions

_searched: weakref.WeakKeyDictionary[tf.Graph, set[str]] = weakref.WeakKeyDictionary()
_warned: weakref.WeakSet[Any] = weakref.WeakSet()


def of(y_pred: Any) -> tf.Tensor | None:
    """Return the mask that Keras layers attach to their output.

    Private: neither Keras 2 nor 3 has a public way to read it; tests/replicas/test_keras.py notices when it changes.
    """
    mask = getattr(y_pred, "_keras_mask", None)
    return mask if isinstance(mask, tf.Tensor) else None


def unmasked_weights(sample_weight: Any) -> Any:
    """Return the sample weights as they were before Keras 2 multiplied them by the predictions' mask."""
    return getattr(sample_weight, "unmasked_weights", (sample_weight,))[0]


def keep_weights() -> None:
    """Make Keras 2 keep the sample weights that it multiplies by the predictions' mask. Later calls do nothing.

    The product has no counts and lengths, and weights of the labels' positions have none with a mask of frames. Losses
    and metrics of distpad read the mask themselves, and take the weights from ``unmasked_weights``. Keras 2 multiplies
    before it calls them, in a private function; tests/replicas/test_fit_ctc.py notices if Keras has no such function.
    """
    module: Any = vars(sys.modules[tf.keras.losses.Loss.__module__]).get("losses_utils")
    original = getattr(module, "apply_mask", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def apply_mask(y_pred: tf.Tensor, weights: Any, mask: tf.Tensor | None) -> Any:
        if mask is None:
            return weights
        if hasattr(weights, "lengths") and not weights.shape.is_compatible_with(mask.shape[: weights.ndim]):
            return weights
        product = original(y_pred, weights, mask)
        product.unmasked_weights = (weights,)
        return product

    module.apply_mask = apply_mask


def warn_unmasked(owner: Any, tensors: Any, effect: str, remedy: str, *, in_any_case: bool = False) -> None:
    """Warn that padding counts, if a layer dropped a Keras mask before ``tensors``. Each owner warns once.

    Args:
      owner: what counts padding, such as a loss.
      tensors: a nest of tensors without Keras masks. Those of a graph know the layers before them, eager ones do not.
      effect, remedy: sentences.
      in_any_case: whether to warn if no mask was dropped.
    """
    if owner in _warned:
        return
    leaves = [leaf for leaf in tf.nest.flatten(tensors) if tf.is_symbolic_tensor(leaf)]
    last = next(_masked([leaf.op for leaf in leaves]), None)
    if last is None and not in_any_case:
        return
    _warned.add(owner)
    cause = ""
    if last is not None:
        *_, maker = _masked([last.op])
        kept = "it" if last is maker else f"layer {_layer(last, False)!r}"
        cause = f" Layer {_layer(maker, True)!r} made a Keras mask, which was dropped after {kept}."
    warnings.warn(f"{effect}{cause} {remedy}", stacklevel=2)


def _masked(operations: list[tf.Operation]) -> Iterator[tf.Tensor]:
    """The tensors with a Keras mask from which these operations compute, the nearest first."""
    if not operations:
        return
    # the operations that compute from no such tensor: a deep network searches before each of many layers
    searched, is_found = _searched.setdefault(operations[0].graph, set()), False
    queue, seen = collections.deque(operations), set(searched)
    while queue:
        operation = queue.popleft()
        if operation.name in seen:
            continue
        seen.add(operation.name)
        queue.extend(tensor.op for tensor in operation.inputs)
        masked = next((tensor for tensor in operation.outputs if of(tensor) is not None), None)
        if masked is not None:
            is_found = True
            yield masked
    if not is_found:
        searched |= seen


def _layer(tensor: tf.Tensor, makes_mask: bool) -> str:
    """The layer that returned a tensor with a Keras mask, by its name scope, such as "model/layer"."""
    scope, mask_scope = (posixpath.dirname(each.op.name) for each in (tensor, tensor._keras_mask))
    names = scope.split("/")
    if makes_mask and f"{scope}/".startswith(f"{mask_scope}/"):
        # Keras 2 makes masks in the layer's scope, Keras 3 in the model's. The layer may have other scopes inside.
        names = names[: mask_scope.count("/") + versions.KERAS - 1]
    names = [name for name in names if not re.fullmatch(r"replica_\d+", name)]
    if versions.KERAS == 3 and versions.KERAS_MINOR < 16:  # which opens each scope twice: TensorFlow numbers the second
        names = [re.sub(r"_\d+$", "", name) for name in names]
    return "/".join(names)
