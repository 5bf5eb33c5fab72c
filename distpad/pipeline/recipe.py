"""Recipe: the arguments of PaddedBatches, checked, and what follows from them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distpad import errors
from distpad.ladder import Ladder
from distpad.pipeline.features import Name, Pad

_NAME = "PaddedBatches"


@dataclass(frozen=True)
class Recipe:
    """How batches are made: the same on all workers.

    Attributes:
      tokens: losses and the features whose positions they count; a single loss is called None.
      weights: the losses that are weighted, and by which feature.
      window: micro-batches, a multiple of ``accumulate``.
      slow_after_s, limit_s: the only two that may differ between workers.
    """

    batch_size: int | None
    padding: Mapping[Name, Pad]
    tokens: Mapping[Any, Name]
    weights: Mapping[Any, Name]
    ladders: Mapping[Name, Ladder] | None
    window: int
    accumulate: int
    drop_remainder: bool
    replicated: bool
    slow_after_s: float
    limit_s: float

    @property
    def axes(self) -> list[tuple[Name, int]]:
        """All ragged axes, in the order in which their sizes travel."""
        return [(name, axis) for name, pad in self.padding.items() for axis in pad.axes]

    @property
    def axis_ladders(self) -> list[Ladder] | None:
        """The ladder of each of them."""
        return [self.ladders[name] for name, _ in self.axes] if self.ladders else None

    def check_sizes(self, sizes: Sequence[int]) -> None:
        """Raise ValueError where one is above its ladder; ``sizes`` are of ``axes``."""
        for ladder, (name, axis), size in zip(self.axis_ladders or (), self.axes, sizes):
            try:
                ladder.index(size)
            except ValueError as error:
                raise ValueError(f"{_NAME}: axis {axis} of {name!r}: {error}") from None

    def as_json(self) -> dict[str, Any]:
        """What is compared between workers."""
        return {
            "batch_size": self.batch_size,
            "padding": {str(n): {"axis": list(pad.axes), "value": str(pad.value)} for n, pad in self.padding.items()},
            "tokens": {str(loss): str(name) for loss, name in self.tokens.items()},
            "weights": {str(loss): str(name) for loss, name in self.weights.items()},
            "ladder": {str(name): repr(ladder) for name, ladder in (self.ladders or {}).items()},
            "window": self.window,
            "accumulate": self.accumulate,
            "drop_remainder": self.drop_remainder,
            "replicated": self.replicated,
        }


def checked(
    *,
    batch_size: Any,
    padding: Any,
    tokens: Any,
    weights: Any,
    ladder: Any,
    window: Any,
    accumulate: Any,
    drop_remainder: Any,
    replicated: Any,
    slow_after_s: float,
    limit_s: float,
) -> Recipe:
    """Raises ValueError or TypeError for the first argument that is wrong."""
    if batch_size is not None:
        batch_size = errors.whole_number(_NAME, "batch_size", batch_size, least=1)
    accumulate = errors.whole_number(_NAME, "accumulate", accumulate, least=1)
    window = errors.whole_number(_NAME, "window", window, least=1)
    for name, seconds in (("slow_after_s", slow_after_s), ("limit_s", limit_s)):
        if not errors.real_number(_NAME, name, seconds) > 0:
            raise ValueError(errors.sentence(_NAME, name, seconds, "above 0 seconds"))
    padding = _checked_padding(padding)
    tokens = _checked_tokens(tokens, padding)
    return Recipe(
        batch_size=batch_size,
        padding=padding,
        tokens=tokens,
        weights=_checked_weights(weights, tokens),
        ladders=_checked_ladders(ladder, padding),
        window=-(-window // accumulate) * accumulate,
        accumulate=accumulate,
        drop_remainder=bool(drop_remainder),
        replicated=bool(replicated),
        slow_after_s=float(slow_after_s),
        limit_s=float(limit_s),
    )


def _checked_padding(padding: Any) -> dict[Name, Pad]:
    if not isinstance(padding, Mapping) or not padding:
        raise TypeError(errors.sentence(_NAME, "padding", repr(padding), "a mapping from features to distpad.Pad"))
    for name, pad in padding.items():
        if not isinstance(pad, Pad):
            raise TypeError(errors.sentence(_NAME, f"padding[{name!r}]", repr(pad), "a distpad.Pad"))
    return {name: padding[name] for name in sorted(padding, key=str)}


def _checked_tokens(tokens: Any, padding: Mapping[Name, Pad]) -> dict[Any, Name]:
    losses = dict(tokens) if isinstance(tokens, Mapping) else {None: tokens}
    if not losses:
        raise ValueError(errors.sentence(_NAME, "tokens", "empty", "at least one loss"))
    if isinstance(tokens, Mapping) and None in losses:
        raise ValueError(errors.sentence(_NAME, "tokens", repr(tokens), "names of losses; for a single one, a feature"))
    for name in losses.values():
        _check_name("tokens", name)
        if name not in padding:
            raise ValueError(errors.sentence(_NAME, "tokens", repr(name), f"a padded feature: {list(padding)}"))
        if len(padding[name].axes) > 1:
            found = f"{name!r}, with {len(padding[name].axes)} ragged axes"
            raise ValueError(errors.sentence(_NAME, "tokens", found, "a feature with one, whose lengths are counted"))
    return losses


def _checked_weights(weights: Any, tokens: Mapping[Any, Name]) -> dict[Any, Name]:
    if weights is None:
        return {}
    for name in weights.values() if isinstance(weights, Mapping) else [weights]:
        _check_name("weights", name)
    if not isinstance(weights, Mapping):
        return dict.fromkeys(tokens, weights)
    unknown = [loss for loss in weights if loss not in tokens]
    if unknown:
        raise ValueError(errors.sentence(_NAME, "weights", f"for {unknown}", f"losses of tokens: {list(tokens)}"))
    return dict(weights)


def _check_name(argument: str, name: Any) -> None:
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        rule = "a feature's name, or a mapping from losses to features"
        raise TypeError(errors.sentence(_NAME, argument, repr(name), rule))


def _checked_ladders(ladder: Any, padding: Mapping[Name, Pad]) -> dict[Name, Ladder] | None:
    if ladder is None:
        return None
    ladders = dict(ladder) if isinstance(ladder, Mapping) else dict.fromkeys(padding, ladder)
    for name, given in ladders.items():
        if not isinstance(given, Ladder):
            raise TypeError(errors.sentence(_NAME, "ladder", repr(given), "a distpad.Ladder, or a mapping to them"))
        if name not in padding:
            raise ValueError(errors.sentence(_NAME, "ladder", f"for {name!r}", f"padded features: {list(padding)}"))
    missing = [name for name in padding if name not in ladders]
    if missing:
        raise ValueError(errors.sentence(_NAME, "ladder", f"without {missing}", "one for each padded feature"))
    rungs = {name: len(given.boundaries) for name, given in ladders.items()}
    if len(set(rungs.values())) > 1:
        remedy = "A step uses the same rung of each."
        raise ValueError(errors.sentence(_NAME, "ladder", f"with rungs {rungs}", "equally many for each", remedy))
    return ladders
